"""A start that fails because of a wrong configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

REFUSE = """
import sys
from qkilld.failed_start import refuse_calls
from qkilld.model.bus_address import BusAddress

class Broken:
    def write(self, text): pass
    def flush(self): raise OSError(28, "No space left on device")

sys.stderr = {}
refuse_calls("this is a test", BusAddress(address="unix:path=/nonexistent"))
"""


@pytest.mark.parametrize("stderr", ["Broken()", "None"])
def test_the_exit_code_does_not_depend_on_stderr(
    monkeypatch: pytest.MonkeyPatch, stderr: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent")
    code = REFUSE.format(stderr)
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 2
