"""Wait for values in /proc and /sys. The kernel does not report when they change."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def until(
    read: Callable[[], _T], wanted: Callable[[_T], object], timeout: float = 30, every: float = 0.01
) -> _T:
    """Return the first reading that satisfies `wanted`. Raises AssertionError with the last reading
    after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        if wanted(found := read()):
            return found
        assert time.monotonic() < deadline, f"still not after {timeout} s: {found}"
        time.sleep(every)
