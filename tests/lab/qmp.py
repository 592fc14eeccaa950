"""QEMU's own monitor, for tests that have a QEMU do something. Source: QEMU's docs, qmp-spec."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.lab.guest import Guest


class Qmp:
    """The one connection to the guest's QMP socket, as a context manager."""

    def __init__(self, guest: Guest) -> None:
        """Of a guest started with `qmp`. Raises OSError."""
        assert guest.qmp is not None, f"{guest.name} has no QMP socket"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(30)
            self._socket.connect(str(guest.qmp))
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
        """What QEMU returns; AssertionError with what it says where it refuses."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "event" not in answer:
                assert "return" in answer, f"QEMU refuses {command}: {answer}"
                return answer["return"]
        raise AssertionError(f"QEMU closed its QMP socket instead of answering {command}")

    def hmp(self, line: str) -> str:
        """A line for the human monitor; what it printed."""
        printed: str = self.call("human-monitor-command", **{"command-line": line})
        return printed
