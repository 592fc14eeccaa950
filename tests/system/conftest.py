"""Fixtures of the tests that run on a real systemd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.lab import container as lab_container

AT_ONE_GO: Final = 5
"""How many successive tests of a file one worker of pytest-xdist runs. They share the set-up of
their module. With a smaller number, the set-up would be repeated more often. With a greater one, a
single worker would run all of the longest file."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests of this directory for `--dist loadgroup`."""
    seen: Counter[Path] = Counter()
    for item in items:
        if item.path.parent == Path(__file__).parent:
            part = seen[item.path] // AT_ONE_GO
            seen[item.path] += 1
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{part}"))


@pytest.fixture(scope="session")
def container() -> Iterator[lab_container.Container]:
    """One throwaway system for all tests of a process. Each test uses its own units and names."""
    with lab_container.boot() as booted:
        yield booted


@pytest.fixture(scope="session")
def installed(container: lab_container.Container) -> lab_container.Container:
    """The throwaway system after `make install`, with nothing started."""
    lab_container.install(container)
    return container
