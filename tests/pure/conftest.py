"""Fixtures for pure code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qkilld.engine.fair_shares import set_subordinate_uids


@pytest.fixture
def subordinate_uids() -> Iterator[None]:
    """Give uid 1000 the subordinate uids from 100000 to 165535."""
    set_subordinate_uids([(100_000, 165_535, 1000)])
    yield
    set_subordinate_uids([])
