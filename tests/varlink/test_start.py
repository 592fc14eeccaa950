"""The start by the first call on the socket: that call is answered before the bus is served."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkilld.engine.call_limits import Cost
from qkilld.engine.turns import Turns
from qkilld.varlink.server import Method, VarlinkCall, VarlinkServer
from tests.evidence.until import until
from tests.lab.bus import Daemon
from tests.lab.guest import Guest
from tests.lab.varlink import VarlinkClient

ACTIVATED = """
import os, select, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + ".new")
listener.listen()
os.rename(sys.argv[1] + ".new", sys.argv[1])
select.select([listener], [], [])
if listener.fileno() != 3:
    os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "varlink"}
os.execv(sys.executable, [sys.executable, "-m", "qkilld", *sys.argv[2:]])
"""
"""Starts qkilld once there is a connection, as systemd does."""


def test_a_call_that_lasts_does_not_keep_it_from_the_bus(
    start_daemon: Callable[..., Daemon], socket_path: Path, fake_qemu: Callable[..., Guest]
) -> None:
    guest = fake_qemu(stubborn=True)
    program = (sys.executable, "-c", ACTIVATED, str(socket_path))
    daemon = start_daemon(program=program, ready=False)
    until(socket_path.exists, bool)
    with VarlinkClient(socket_path) as client:
        client.send("Terminate", more=True, pid=guest.pid, options={"graceUSec": 600_000_000})
        state, continues = client.reply()
        assert state["state"]["phase"] == "terminate" and continues
        daemon.wait_for("serves the bus at")
        assert daemon.stop() == 0


class SlowMethods:
    """Answers each call once `release` is set. Implements server.Methods."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.release = asyncio.Event()

    def find(self, name: str) -> Method:
        return self._answer

    def costs(self, name: str, parameters: Mapping[str, Any]) -> list[Cost]:
        return [Cost.OTHER]

    async def _answer(self, call: VarlinkCall, parameters: dict[str, Any]) -> dict[str, Any]:
        self.begun.set()
        await self.release.wait()
        return {}


def test_the_first_calls_are_awaited(lab_dir: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(lab_dir / "socket"))
    listener.listen()

    async def live() -> None:
        methods = SlowMethods()
        server = VarlinkServer(methods, Turns(frozenset({os.getuid()})), _fault)
        server.listen(listener)
        with VarlinkClient(lab_dir / "socket") as client:
            client.send("ListJobs")
            waiting = asyncio.create_task(server.answer_first(600))
            await methods.begun.wait()
            assert not waiting.done()
            methods.release.set()
            await asyncio.wait_for(waiting, 60)
            assert client.reply() == ({}, False)
        server.close()

    asyncio.run(live())


def test_a_connection_without_a_call_is_not_awaited_for_long(lab_dir: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(lab_dir / "socket"))
    listener.listen()

    async def live() -> None:
        server = VarlinkServer(SlowMethods(), Turns(frozenset({os.getuid()})), _fault)
        server.listen(listener)
        with VarlinkClient(lab_dir / "socket"):
            await asyncio.wait_for(server.answer_first(0.01), 60)
        server.close()

    asyncio.run(live())


def _fault(doing: str, error: BaseException) -> None:
    raise AssertionError(doing) from error
