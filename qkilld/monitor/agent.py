"""A client for the guest agent. Source: QEMU's docs/interop/qemu-ga-ref.

Replies come from inside the guest, which is not trusted. Replies have no id, so a late reply would
be taken for the reply to the next command. So the connection is closed if a reply is late.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from typing import Any, Final, Self

from qkilld.model.errors import CommandRefused, MonitorError, MonitorProtocolError
from qkilld.model.text import printable
from qkilld.monitor.channel import Channel, Lines, decode_object

SYNC_S: Final = 3.0
"""Timeout of the first command, guest-sync-delimited. Proxmox VE uses the same timeout for its
ping."""
_MARK: Final = b"\xff"
"""The byte before guest-sync-delimited and before its reply. Before the command, it makes the agent
discard an incomplete command of an earlier client."""


class AgentClient(Channel):
    def __init__(self) -> None:
        super().__init__()
        self._lines = Lines()
        self._sync: int | None = None
        """The id in the expected reply to guest-sync-delimited; None if no such reply is
        expected."""
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._is_sent = False
        """Whether the last command was sent."""

    @classmethod
    async def open(cls, connection: socket.socket, *, timeout_s: float = SYNC_S) -> Self:
        """Take over a connected socket, and synchronize with the agent.

        If this fails, closes the socket and raises MonitorError (MonitorTimeout if no reply comes
        in time).
        """
        client = await cls._over(connection)
        try:
            client._sync = int.from_bytes(os.urandom(4)) >> 1
            arguments = {"id": client._sync}
            await client._call("guest-sync-delimited", arguments, timeout_s=timeout_s, before=_MARK)
        except BaseException:
            client.close()
            raise
        return client

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Any:
        """Callers must run only one command at a time.

        Raises CommandRefused if the agent refuses. On any other MonitorError, the connection is
        closed.
        """
        try:
            message = await self._call(command, arguments, timeout_s=timeout_s)
        except BaseException:
            self.close()
            raise
        if "return" in message:
            return message["return"]
        match message["error"]:
            case {"class": str(name), "desc": str(text)}:
                raise CommandRefused(command, printable(name), printable(text))
        raise CommandRefused(command, "", "no reason was given")

    async def send(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> None:
        """Run a command. A late, lost or invalid reply is not an error, because the agent may still
        execute the command. Raises CommandRefused if the agent refuses, and another MonitorError if
        the command was not sent."""
        self._is_sent = False
        try:
            await self.execute(command, arguments, timeout_s=timeout_s)
        except MonitorError as error:
            if isinstance(error, CommandRefused) or not self._is_sent:
                raise

    async def _call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        *,
        timeout_s: float,
        before: bytes = b"",
    ) -> dict[str, Any]:
        assert self._answer is None, "one command at a time"
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        self._answer = self._future()
        try:
            self._send(before + json.dumps(request).encode() + b"\n")
            self._is_sent = not self._is_closing
            until = self._loop.time() + timeout_s
            message: dict[str, Any] = await self._wait(self._answer, until, command)
            return message
        finally:
            self._answer = None

    def _feed(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            if self._sync is not None:
                self._take_sync(line)
            else:
                self._take(decode_object(line))

    def _take_sync(self, line: bytes) -> None:
        """Skip everything before the marker. Also skip replies to other clients, which have another
        id."""
        _, mark, text = line.rpartition(_MARK)
        if not mark:
            return
        try:
            message = decode_object(text)
        except MonitorError:
            return
        if message.get("return") == self._sync:
            self._sync = None
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "return" not in message and "error" not in message:
            raise MonitorProtocolError("The agent sent a message that is not a reply")
        if self._answer is None or self._answer.done():
            raise MonitorProtocolError("The agent sent a reply although no command was pending")
        self._answer.set_result(message)
