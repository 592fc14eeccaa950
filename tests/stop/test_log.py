"""The lines that qkilld-stop prints on stderr."""

from __future__ import annotations

import errno
import sys
from unittest.mock import Mock

import pytest

from qkilld.stop.log import say


def test_a_full_disk_does_not_end_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """StandardError= may be a file. systemd would send SIGKILL at the timeout."""
    full = Mock()
    full.flush.side_effect = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sys, "stderr", full)
    say("a guest is still there")
    full.flush.assert_called_once_with()


def test_a_hostile_name_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("web\n<3>qkilld-stop: forged\udcff\x1b[2J")
    printed = "web\ufffd<3>qkilld-stop: forged\ufffd\ufffd[2J"
    assert capsys.readouterr().err == f"qkilld-stop: {printed}\n"
