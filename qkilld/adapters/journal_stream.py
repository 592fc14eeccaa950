"""Imports little, to start fast."""

from __future__ import annotations

import os
import sys


def stderr_is_journal() -> bool:
    """Return whether standard error is connected to the journal, according to $JOURNAL_STREAM
    (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False
