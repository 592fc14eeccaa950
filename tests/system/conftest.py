"""Fixtures of the layer that runs on a real systemd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import container as lab_container


@pytest.fixture(scope="session")
def container() -> Iterator[lab_container.Container]:
    """One throwaway system for all tests of a run; each test uses units and names of its own."""
    with lab_container.boot() as booted:
        yield booted


@pytest.fixture(scope="session")
def installed(container: lab_container.Container) -> lab_container.Container:
    """The same after `make install`, with nothing started: /usr/bin/qkilld and the rest."""
    lab_container.install(container)
    return container
