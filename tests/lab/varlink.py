"""A client of the daemon's Varlink socket, without a library: JSON and NUL bytes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.lab import needs


class VarlinkError(Exception):
    """An error reply, with the name of the error and its parameters."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(f"{name}: {parameters}")
        self.name = name
        self.parameters = parameters


class VarlinkClient:
    """A blocking client; a context manager."""

    def __init__(self, path: Path, uid: int | None = None) -> None:
        """`uid`: connect as this user; needs root."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        # The daemon uses the credentials at the time of connect().
        with effective_uid(uid):
            self.socket.connect(str(path))
        self._incoming = b""

    def send(
        self,
        method: str,
        *,
        more: bool = False,
        oneway: bool = False,
        descriptors: Sequence[int] = (),
        **given: Any,
    ) -> None:
        """Send a call without waiting. A `method` without an interface belongs to org.qkilld1."""
        name = method if "." in method else f"org.qkilld1.{method}"
        call: dict[str, Any] = {"method": name, "parameters": given}
        if more:
            call["more"] = True
        if oneway:
            call["oneway"] = True
        data = json.dumps(call).encode() + b"\0"
        if descriptors:
            assert socket.send_fds(self.socket, [data], descriptors) == len(data)
        else:
            self.send_raw(data)

    def send_raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """Return the next reply as it was sent. Raises EOFError if the daemon closes the
        connection."""
        while b"\0" not in self._incoming:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._incoming += data
        reply, _, self._incoming = self._incoming.partition(b"\0")
        found: dict[str, Any] = json.loads(reply)
        return found

    def reply(self) -> tuple[dict[str, Any], bool]:
        """Return the parameters of the next reply, and whether more follow. Raises VarlinkError."""
        found = self.receive()
        if "error" in found:
            raise VarlinkError(found["error"], found.get("parameters", {}))
        return found["parameters"], found.get("continues", False)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        self.send(method, **given)
        parameters, continues = self.reply()
        assert not continues
        return parameters

    def stream(self, method: str, **given: Any) -> Iterator[dict[str, Any]]:
        """Yield the parameters of every reply to a call with `more`, until the last one."""
        self.send(method, more=True, **given)
        continues = True
        while continues:
            parameters, continues = self.reply()
            yield parameters

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> VarlinkClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def effective_uid(uid: int | None) -> Iterator[None]:
    if uid is None:
        yield
        return
    needs.root("to connect as another user")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
