"""The clients with a real QEMU, compared with QEMU's own Python library."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from qkilld.model.errors import CommandRefused, MonitorClosed, MonitorError, MonitorTimeout
from qkilld.monitor.hmp import HmpClient
from qkilld.monitor.qmp import QmpClient, QmpEvent
from tests.lab.guest import Guest
from tests.lab.log import wait_for_path
from tests.monitor.connecting import run

Start = Callable[..., Guest]


def connection(path: Path) -> socket.socket:
    ours = socket.socket(socket.AF_UNIX)
    ours.connect(str(path))
    return ours


async def open_qmp(
    path: Path | None, on_event: Callable[[QmpEvent], None] | None = None
) -> QmpClient:
    assert path is not None
    return await QmpClient.open(connection(path), on_event, timeout_s=30)


def test_commands_errors_and_events(qemu: Start) -> None:
    guest = qemu()
    events: list[QmpEvent] = []

    async def talk() -> None:
        client = await open_qmp(guest.qmp, events.append)
        try:
            assert client.oob
            assert (await client.execute("query-status", timeout_s=30))["status"] == "running"
            assert await client.execute_oob("query-yank", timeout_s=30)
            assert await client.hmp("info status", timeout_s=30) == "VM status: running\n"
            with pytest.raises(CommandRefused, match="unknown command"):
                await client.hmp("no-such-command", timeout_s=30)
            with pytest.raises(CommandRefused, match="no-such-command") as refused:
                await client.execute("no-such-command", timeout_s=30)
            assert refused.value.error_class == "CommandNotFound"
            await client.execute("stop", timeout_s=30)
            assert [event.name for event in events] == ["STOP"]
        finally:
            client.close()
        with pytest.raises(MonitorClosed):
            await client.execute("query-status", timeout_s=30)

    run(talk())


def test_it_answers_as_qemus_own_library_does(qemu: Start) -> None:
    guest = qemu()
    commands: list[tuple[str, dict[str, Any] | None]] = [
        ("query-version", None),
        ("query-name", None),
        ("query-chardev", None),
        ("query-block", {}),
        ("qom-list", {"path": "/"}),
        ("no-such-command", None),
        ("qom-list", {"path": "/nowhere"}),
        ("qom-list", {"path": 1}),
    ]

    async def ours() -> list[object]:
        client = await open_qmp(guest.qmp)
        answers: list[object] = []
        for command, arguments in commands:
            try:
                answers.append(await client.execute(command, arguments, timeout_s=30))
            except CommandRefused as error:
                answers.append((error.error_class, str(error).partition("refused: ")[2]))
        client.close()
        return answers

    async def theirs() -> list[object]:
        client = QMPClient("test")
        await client.connect(str(guest.qmp))
        answers: list[object] = []
        for command, arguments in commands:
            try:
                answers.append(await client.execute(command, arguments))
            except ExecuteError as error:
                answers.append((error.error_class, str(error)))
        await client.disconnect()
        return answers

    def comparable(answers: list[object]) -> list[object]:
        # The reply to query-chardev differs, because it names the monitor's own connection.
        return [answer for number, answer in enumerate(answers) if number != 2]

    assert comparable(run(ours())) == comparable(run(theirs()))


def test_the_pretty_form(qemu: Start, lab_dir: Path) -> None:
    pretty = ("-qmp-pretty", f"unix:{lab_dir}/pretty,server=on,wait=off")
    qemu(arguments=pretty)

    async def talk() -> None:
        client = await open_qmp(lab_dir / "pretty")
        assert (await client.execute("query-status", timeout_s=30))["status"] == "running"
        assert len(await client.execute("query-commands", timeout_s=30)) > 100
        client.close()

    run(talk())


def test_a_qemu_that_does_not_answer(qemu: Start) -> None:
    """Even after a timeout, the next in-band command waits for the late reply to the previous
    one."""
    guest = qemu()

    async def talk() -> None:
        client = await open_qmp(guest.qmp)
        guest.signal(signal.SIGSTOP)
        with pytest.raises(MonitorTimeout, match="query-status"):
            await client.execute("query-status", timeout_s=0.1)
        with pytest.raises(MonitorTimeout, match="was not sent"):
            await client.execute("query-name", timeout_s=0.1)
        with pytest.raises(MonitorTimeout):
            await client.execute_oob("query-yank", timeout_s=0.1)
        guest.signal(signal.SIGCONT)
        answers = await asyncio.gather(
            client.execute("query-name", timeout_s=30),
            client.execute("query-status", timeout_s=30),
            client.execute_oob("query-yank", timeout_s=30),
        )
        assert answers[0] == {"name": "lab"} and answers[1]["status"] == "running"
        client.close()

    run(talk())


def test_the_end_of_qemu(qemu: Start) -> None:
    guest = qemu()
    events: list[QmpEvent] = []

    async def talk() -> None:
        client = await open_qmp(guest.qmp, events.append)
        guest.signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(client.execute("query-status", timeout_s=30))
        behind = asyncio.ensure_future(client.execute("query-name", timeout_s=30))
        await asyncio.sleep(0.1)
        guest.signal(signal.SIGKILL)
        for task in (waiting, behind):
            with pytest.raises(MonitorClosed):
                await task
        assert client.closed

    run(talk())


def test_quit_says_why(qemu: Start) -> None:
    guest = qemu()
    events: list[QmpEvent] = []

    async def talk() -> None:
        client = await open_qmp(guest.qmp, events.append)
        await client.execute("quit", timeout_s=30)
        with pytest.raises(MonitorError):
            while True:
                await client.execute("query-status", timeout_s=30)
        client.close()

    run(talk())
    assert [(event.name, event.data["reason"]) for event in events] == [
        ("SHUTDOWN", "host-qmp-quit")
    ]


def test_the_human_monitor(qemu: Start, lab_dir: Path) -> None:
    monitor = ("-M", "pc", "-monitor", f"unix:{lab_dir}/hmp,server=on,wait=off")
    guest = qemu(arguments=monitor)
    wait_for_path(lab_dir / "hmp", 30)

    async def talk() -> None:
        client = await HmpClient.open(connection(lab_dir / "hmp"), timeout_s=30)
        assert await client.hmp("info status", timeout_s=30) == "VM status: running\n"
        assert await client.hmp("info name", timeout_s=30) == "lab\n"
        assert "acpi-evt" in await client.hmp("info mtree", timeout_s=30)
        assert await client.hmp("system_powerdown", timeout_s=30) == ""
        for line in ("no-such-command", "i /2xh nothing"):
            with pytest.raises(CommandRefused):
                await client.hmp(line, timeout_s=30)
        assert await client.hmp("info name", timeout_s=30) == "lab\n"
        guest.signal(signal.SIGSTOP)
        with pytest.raises(MonitorTimeout):
            await client.hmp("info name", timeout_s=0.1)
        # The reply may still come, so the connection cannot be used any more.
        with pytest.raises(MonitorClosed):
            await client.hmp("info status", timeout_s=30)

    run(talk())
