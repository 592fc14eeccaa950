"""Hostile other ends: whatever they send, the result is a MonitorError."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.process import open_process
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.errors import (
    CommandRefused,
    MonitorBusy,
    MonitorClosed,
    MonitorError,
    MonitorProtocolError,
    MonitorTimeout,
    MonitorUnreachable,
)
from qkilld.monitor import channel, guest_control
from qkilld.monitor.agent import AgentClient
from qkilld.monitor.endpoints import Endpoint, GuestEndpoints, Role, UnixListener
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.hmp import HmpClient
from qkilld.monitor.qmp import QmpClient, QmpEvent
from qkilld.monitor.reach import connect_blocking
from qkilld.monitor.tcp import connect_in_netns
from tests.lab.lingering import lingering_sockets
from tests.monitor.connecting import run, run_for

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
MIB = 1 << 20

Opened = QmpClient | HmpClient | AgentClient


@asynccontextmanager
async def peer(
    script: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[socket.socket]:
    """Yield a socket whose other end runs a script, and then stays silent."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)

    async def follow() -> None:
        try:
            await script(reader, writer)
            await reader.read(-1)
        except OSError:
            pass

    task = asyncio.ensure_future(follow())
    try:
        yield ours
    finally:
        task.cancel()
        await asyncio.wait([task])
        writer.transport.abort()
        await asyncio.sleep(0)


async def answer_qmp(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int = 1
) -> int:
    """Greet, and answer the first commands correctly; return the number of the last one."""
    writer.write(GREETING)
    number = 0
    for _ in range(count):
        number = json.loads(await reader.readline())["id"]
        writer.write(b'{"return": {}, "id": %d}\r\n' % number)
    return number


GARBAGE = [
    b"\n\n \n",
    b"[]\n",
    b"1\n",
    b"{}\n",
    b"{\n}\n",
    b"{\n" * 10 + b"}\n",
    b"{" * 300_000,
    b"{\n" + b'"a": 1,\n' * 100_000,
    b"x" * 300_000 + b"\n",
    b'{"QMP": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    b'{"QMP": ' + b'{"a":' * 40_000 + b"1" + b"}" * 40_000 + b"}\n",
    b'{"QMP": 1}\n',
    b'{"QMP": []}\n',
    b'{"QMP": {"version": [], "capabilities": {}}}\n' * 3,
    b'{"QMP": {"version": NaN}}\n',
    b'{"QMP": {"version": ' + b"9" * 100_000 + b"}}\n",
    b'{"event": 1}\n',
    b'{"event": "X", "data": 1}\n',
    b'{"event": ["X"], "data": {}}\n',
    b'{"return": {}, "id": {}}\n{"return": {}, "id": []}\n',
    b'{"error": {}}\n{"error": 1, "id": null}\n',
    b'{"return": {}, "id": 1}\n' * 3,
    b"\xff\xfe\x00\n",
    b"\xff" * 300_000,
    b'\xff{"return": "x"}\n\xff{"return": {}}\n\xff{"return": 1e400}\n',
    b'{"\\ud800": "\\udfff"}\n',
    b"QEMU\r\n(qemu) (qemu) ",
    b"\x1b[" * 100_000 + b"(qemu) ",
    b"(qemu) " * 50_000,
    b"",
]


@pytest.mark.parametrize("kind", [QmpClient, HmpClient, AgentClient])
@pytest.mark.parametrize("end", [False, True])
def test_garbage_instead_of_a_greeting(kind: type[Opened], end: bool) -> None:
    async def talk(garbage: bytes) -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(garbage)
            await writer.drain()
            if end:
                writer.write_eof()

        async with peer(script) as ours:
            with pytest.raises(MonitorError) as raised:
                (await kind.open(ours, timeout_s=1)).close()
            assert str(raised.value).isprintable()
            await asyncio.sleep(0.01)
            assert ours.fileno() == -1, "it is closed"

    async def all_of_it() -> None:
        await asyncio.gather(*map(talk, GARBAGE))

    run(all_of_it())


def test_garbage_instead_of_an_answer() -> None:
    async def talk(garbage: bytes) -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer_qmp(reader, writer)
            await reader.readline()
            writer.write(garbage)

        async with peer(script) as ours:
            client = await QmpClient.open(ours, lambda event: None, timeout_s=30)
            with pytest.raises(MonitorError) as raised:
                await client.execute("query-status", timeout_s=1)
            assert str(raised.value).isprintable()
            client.close()

    async def all_of_it() -> None:
        await asyncio.gather(*map(talk, GARBAGE))

    run(all_of_it())


def test_random_bytes() -> None:
    choice = random.Random(1)
    pieces = [GREETING, b'{"return": {}, "id": 1}\n', b'{"event": "X"}\n', b"(qemu) ", b"\xff"]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(50):
            piece = bytearray(choice.choice(pieces))
            if choice.random() < 0.7:
                piece[choice.randrange(len(piece))] = choice.randrange(256)
            writer.write(piece[: choice.randrange(len(piece) + 1)])
            await asyncio.sleep(0)
        writer.write_eof()

    async def talk(kind: type[Opened]) -> None:
        async with peer(script) as ours:
            try:
                client = await kind.open(ours, timeout_s=0.1)
                if not isinstance(client, AgentClient):
                    await client.hmp("info status", timeout_s=0.1)
            except MonitorError:
                return
            client.close()

    async def all_of_them() -> None:
        for kind in (QmpClient, HmpClient, AgentClient) * 40:
            await talk(kind)

    run(all_of_them())


@pytest.mark.parametrize(
    ("piece", "size"),
    [
        (b'{"event": "X", "data": {}}\r\n' * 1000, 6 * MIB),
        (b'{"event": "X", "data": {"a": "' + b"a" * 250_000 + b'"}}\n', 6 * MIB),
        (b"\r\n" * 32768, 6 * MIB),
        (b"a", 300_000),
        (b"a" * 65536, 64 * MIB),
    ],
)
def test_floods(piece: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine may need more than FLOW_S for the flood.
    monkeypatch.setattr(channel, "FLOW_S", 600)
    sent = 0
    events = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await answer_qmp(reader, writer)
        # From Python 3.12 on, the cost of a write grows with the number of writes that wait.
        writer.transport.set_write_buffer_limits(high=0)
        for _ in range(size // len(piece) + 1):
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    def count(event: QmpEvent) -> None:
        nonlocal events
        events += 1

    async def talk() -> None:
        async with peer(script) as ours:
            client = await QmpClient.open(ours, count)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises((MonitorProtocolError, MonitorClosed), match="more than"):
                await client.execute("query-status", timeout_s=30)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
            assert client.closed

    run(talk())
    # The received bytes, and those queued in the socket and the script.
    assert sent < channel.MAX_FLOW + 2 * MIB


def test_a_message_byte_by_byte() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in GREETING:
            writer.write(bytes([number]))
            await asyncio.sleep(0)
        await answer_qmp_rest(reader, writer)

    async def answer_qmp_rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = json.loads(await reader.readline())["id"]
        event = b'{"event": "A"}\n{"timestamp": {}, "event": "B", "data": {}}\n'
        writer.write(event + b'{"return": {}, "id": %d}\r' % number)
        await asyncio.sleep(0.05)
        writer.write(b"\n")

    async def talk() -> None:
        names = []
        async with peer(script) as ours:
            client = await QmpClient.open(ours, lambda event: names.append(event.name))
            assert names == ["A", "B"]
            client.close()

    run(talk())


def test_replies_with_a_wrong_id_are_ignored() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_qmp(reader, writer)
        number = json.loads(await reader.readline())["id"]
        for wrong in (number + 1, number - 1, 0, -1, "null", f'"{number}"', "{}", "1.5"):
            writer.write(f'{{"return": "wrong", "id": {wrong}}}\n'.encode())
        writer.write(b'{"return": "right", "id": %d}\n' % number)

    async def talk() -> None:
        async with peer(script) as ours:
            client = await QmpClient.open(ours)
            assert await client.execute("x", timeout_s=10) == "right"
            client.close()

    run(talk())


def test_an_event_and_an_error_with_hostile_names() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_qmp(reader, writer)
        number = json.loads(await reader.readline())["id"]
        writer.write(json.dumps({"event": "\x1b[2J\n" + "A" * 9999}).encode() + b"\n")
        error = {"class": "\x1b[2J", "desc": "\u202e\ud800" + "B" * 9999}
        writer.write(json.dumps({"error": error, "id": number}).encode() + b"\n")

    async def talk() -> None:
        names = []
        async with peer(script) as ours:
            client = await QmpClient.open(ours, lambda event: names.append(event.name))
            with pytest.raises(CommandRefused) as refused:
                await client.execute("x", timeout_s=10)
            client.close()
        assert all(text.isprintable() for text in (*names, str(refused.value)))
        assert len(names[0]) < 300 and len(str(refused.value)) < 400

    run(talk())


async def fake_agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Like a real agent, discard all input before the marker, such as half a command."""
    request = (await reader.readline()).rpartition(b"\xff")[2]
    number = json.loads(request)["arguments"]["id"]
    stale = b'{"return": 5}\n\xff{"return": 17}\n\xff\xff{bad\n'
    writer.write(stale + b'junk\xff{"return": %d}\n' % number)


def test_the_agent() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await fake_agent(reader, writer)
        assert json.loads(await reader.readline()) == {"execute": "guest-ping"}
        writer.write(b'{"return": {}}\n')
        await reader.readline()
        writer.write(b'{"error": {"class": "GenericError", "desc": "frozen"}}\n')
        await reader.readline()  # guest-shutdown: no answer

    async def talk() -> None:
        async with peer(script) as ours:
            client = await AgentClient.open(ours)
            assert await client.execute("guest-ping", timeout_s=10) == {}
            with pytest.raises(CommandRefused, match="frozen"):
                await client.execute("guest-fsfreeze-thaw", timeout_s=10)
            with pytest.raises(MonitorTimeout):
                await client.execute("guest-shutdown", {"mode": "powerdown"}, timeout_s=0.1)
            assert client.closed, "a late answer would pass for the next one"

    run(talk())


REFUSED = b'{"error": {"class": "GenericError", "desc": "frozen"}}\n'


@pytest.mark.parametrize(
    ("before", "answer", "asked"),
    [
        (b"", b"", True),
        (b"", b"{}\n", True),
        (b"", b"\0" * 9 + b"\n", True),
        (b"", REFUSED, False),
        (b"{}\n", b"", False),
    ],
)
def test_an_agent_that_was_asked_may_answer_anything(
    before: bytes, answer: bytes, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest may be shutting down, and must not be asked again."""
    monkeypatch.setattr(guest_control, "AGENT_REFUSAL_S", 0.2)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await fake_agent(reader, writer)
        writer.write(before)
        await reader.readline()
        writer.write(answer)

    async def ask() -> None:
        process = open_process(os.getpid())
        endpoint = Endpoint(Role.QMP, UnixListener(0, ()))
        control = GuestControl(process, GuestEndpoints(), endpoint, listening_unix)
        try:
            async with peer(script) as ours:
                monkeypatch.setattr(control, "_connect_agent", lambda: _soon(ours))
                monkeypatch.setattr(control, "begin_watch", partial(asyncio.sleep, 0.05))
                with contextlib.nullcontext() if asked else pytest.raises(MonitorError):
                    await control.ask_agent()
        finally:
            process.close()

    run(ask())


async def _soon(connection: socket.socket) -> socket.socket:
    return connection


@pytest.mark.parametrize("answer", [b'{"return": 1}\n', b"\xff\n", b"{}\n", b'{"event": "X"}\n'])
def test_an_agent_that_talks_out_of_turn(answer: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await fake_agent(reader, writer)
        writer.write(answer)

    async def talk() -> None:
        async with peer(script) as ours:
            try:
                client = await AgentClient.open(ours)
                await asyncio.sleep(0.05)
                await client.execute("guest-ping", timeout_s=0.2)
            except MonitorError:
                return
            raise AssertionError("nothing was noticed")

    run(talk())


def test_a_peer_that_does_not_read() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_qmp(reader, writer)
        await asyncio.sleep(30)

    async def talk() -> None:
        async with peer(script) as ours:
            client = await QmpClient.open(ours)
            with pytest.raises(MonitorTimeout):
                await client.execute("x", {"large": "x" * MIB}, timeout_s=0.2)
            for _ in range(100):
                with pytest.raises(MonitorTimeout, match="not sent"):
                    await client.execute("x", timeout_s=0.001)
            client.close()

    run(talk())


def test_a_silent_human_monitor() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async def talk() -> None:
        async with peer(script) as ours:
            with pytest.raises(MonitorBusy):
                await HmpClient.open(ours, timeout_s=0.1)

    run(talk())


def test_very_many_silent_monitors(lab_dir: Path) -> None:
    """It takes a second to recognise that a monitor is silent."""
    listen = (
        "import socket, sys, time; kept = []\n"
        "for n in range(50):\n"
        "    kept.append(socket.socket(socket.AF_UNIX))\n"
        "    kept[-1].bind(f'm{n}'); kept[-1].listen()\n"
        "print(flush=True); time.sleep(600)"
    )
    options = [word for n in range(50) for word in ("-qmp", f"unix:m{n},server=on")]

    async def look(pid: int) -> float:
        process = open_process(pid)
        began = time.monotonic()
        try:
            with pytest.raises(MonitorUnreachable, match="silent"):
                await GuestControl.open(process, listening_unix)
        finally:
            process.close()
        return time.monotonic() - began

    command = [sys.executable, "-c", listen, *options]
    with subprocess.Popen(command, cwd=lab_dir, stdout=subprocess.PIPE) as target:
        try:
            assert target.stdout is not None and target.stdout.readline()
            assert run_for(100, look(target.pid)) < 30
        finally:
            target.kill()


@pytest.mark.parametrize("way", ["path", "abstract"])
def test_a_descriptor_that_lingers_in_a_connection(lab_dir: Path, way: str) -> None:
    """A process can send a descriptor, and exit before qkilld knows to which process the connection
    leads. Closing the connection does not block."""
    path = str(lab_dir / "s")
    name = path if way == "path" else f"@{path}"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(name.replace("@", "\0"))
        listener.listen()
        inode = os.fstat(listener.fileno()).st_ino
        endpoint = Endpoint(Role.QMP, UnixListener(inode, (name,)))
        if way == "path":
            identity = procfs.read_identity(os.getpid())
            connection = connect_blocking(identity, endpoint, lambda: None)
        else:
            connection = connect_in_netns(os.getpid(), endpoint)
        peer = stack.enter_context(listener.accept()[0])
        make = stack.enter_context(lingering_sockets(5))
        with make() as passed:
            socket.send_fds(peer, [b"x"], [passed.fileno()])
        since = time.monotonic()
        connection.close()
        assert time.monotonic() - since < 3
