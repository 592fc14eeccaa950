"""A QMP client for tests. Source: QEMU's docs, qmp-spec."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.lab.guest import Guest


class Qmp:
    """The only connection to a guest's QMP socket, as a context manager."""

    def __init__(self, guest: Guest | Path) -> None:
        """Connect to a guest that was started with `qmp`, or to a path. Raises OSError."""
        path = guest if isinstance(guest, Path) else guest.qmp
        assert path is not None, f"{guest} has no QMP socket"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(30)
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Qmp:
        self._lines.readline()
        self.call("qmp_capabilities")
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self._socket.close()

    def call(self, command: str, **arguments: object) -> Any:
        """Run a command and return its result. Raises AssertionError with QEMU's message if it
        fails."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "event" not in answer:
                assert "return" in answer, f"QEMU refuses {command}: {answer}"
                return answer["return"]
        raise AssertionError(f"QEMU closed its QMP socket instead of answering {command}")

    def hmp(self, line: str) -> str:
        """Run a line in the human monitor; return its output."""
        printed: str = self.call("human-monitor-command", **{"command-line": line})
        return printed
