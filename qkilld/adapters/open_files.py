"""The limit of open files."""

from __future__ import annotations

import resource


def raise_limit() -> None:
    """Raise the limit of this program's open files to the maximum."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
