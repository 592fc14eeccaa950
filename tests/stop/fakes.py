"""A daemon that replies as the test wants, a clock that the test advances, a recording listener."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkilld.stop.daemon import DaemonStopper
from qkilld.stop.guest_stop import GuestStop
from qkilld.stop.options import Options
from qkilld.stop.process import ProcessHandle


class Clock:
    """time.monotonic() of a test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeDaemon:
    """A listening socket in place of a daemon, because a real daemon cannot be made to stop
    replying at a certain time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """The method without its interface, and the parameters, of each call received."""
        self.connections: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.open()

    def open(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.setblocking(False)

    def take(self) -> tuple[str, dict[str, Any]]:
        """Accept a connection and read its call."""
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.settimeout(10)
        self.connections.append(connection)
        data = b""
        while not data.endswith(b"\0"):
            data += connection.recv(1 << 16)
        call = json.loads(data[:-1])
        self.calls.append((call["method"].removeprefix("org.qkilld1."), call["parameters"]))
        return self.calls[-1]

    @property
    def called(self) -> bool:
        """Whether a connection has a call that was not taken yet. Takes the call."""
        assert self._listener is not None
        try:
            self.take()
        except BlockingIOError:
            return False
        return True

    def say(self, *, continues: bool = True, connection: int = -1, **parameters: Any) -> None:
        reply: dict[str, Any] = {"parameters": parameters}
        if continues:
            reply["continues"] = True
        self.connections[connection].sendall(json.dumps(reply).encode() + b"\0")

    def refuse(self, error: str, message: str) -> None:
        reply = {"error": error, "parameters": {"message": message}}
        self.connections[-1].sendall(json.dumps(reply).encode() + b"\0")

    def hang_up(self) -> None:
        """Close every connection."""
        for connection in self.connections:
            connection.close()

    def close(self) -> None:
        """Disappear, with all connections."""
        self.hang_up()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink()


class Notes:
    """Implements stopper.StopListener."""

    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []

    def heard(self, stop: GuestStop, state: dict[str, Any]) -> None:
        self.said.append(("heard", state["phase"]))

    def ended(self, stop: GuestStop, result: str) -> None:
        self.said.append(("ended", result))

    def refused(self, stop: GuestStop, name: str, message: str) -> None:
        self.said.append(("refused", name))

    def lost(self, stop: GuestStop, why: str) -> None:
        self.said.append(("lost", why))

    def unit_known(self, unit: dict[str, Any], stops: Sequence[GuestStop]) -> None:
        self.said.append(("unit", unit["name"]))

    def unit_unknown(self, why: str) -> None:
        self.said.append(("no unit", why))


class FakeHandle(ProcessHandle):
    """A process that exits when the test says so, with a pipe instead of a pidfd."""

    def __init__(self, pid: int = 4711, start_time: int | None = 17) -> None:
        read, self._write = os.pipe()
        super().__init__(pid, read, start_time)

    def exit(self) -> None:
        os.write(self._write, b"\0")

    def close(self) -> None:
        super().close()
        if self._write >= 0:
            os.close(self._write)
            self._write = -1


def stop_of(process: ProcessHandle) -> GuestStop:
    return GuestStop(process, forced=False, powerdown=None, ask_at_most=None)


def stopper(
    path: Path, notes: Notes, clock: Clock, *, stops_unit: bool = True, **options: Any
) -> DaemonStopper:
    given = Options(**options)
    return DaemonStopper(str(path), given, notes, stops_unit=stops_unit, clock=clock)


def state(pid: int = 4711, **changes: Any) -> dict[str, Any]:
    """Return a State of a job."""
    usual: dict[str, Any] = {
        "job": 7,
        "pid": pid,
        "startTime": 17,
        "uid": 0,
        "name": "web",
        "uuid": "",
        "unit": "",
        "flags": ["powerdown"],
        "phase": "terminate",
        "verdict": "unknown",
        "result": None,
        "startedUSec": 1,
        "deadlineUSec": None,
        "held": False,
        "guestAsked": "not-asked",
        "powerdownOnly": False,
        "nextRung": "none",
        "reasons": [],
        "reason": "",
        "requestedBy": 0,
    }
    return usual | changes
