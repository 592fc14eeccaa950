"""Real guests, observed and asked: Debian from its saved state, and QEMUs without a machine."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.decision import guest_work, powerdown
from qkilld.decision.powerdown import ENDS, AskMethod, Conclusion
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.errors import (
    CommandRefused,
    InvalidArgs,
    MonitorBusy,
    MonitorError,
    MonitorUnreachable,
)
from qkilld.model.guest_state import (
    Button,
    EventKind,
    GuestEvent,
    GuestOrder,
    KeptMonitor,
    ShutdownSign,
)
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.job_monitor import JobMonitor, JobMonitors
from qkilld.monitor.qmp import QmpEvent
from qkilld.monitor.reach import read_listeners
from tests.evidence.until import until
from tests.lab.debian import FILES, boot_debian
from tests.lab.guest import Guest
from tests.monitor.connecting import run_for

Start = Callable[..., Guest]

pytestmark = pytest.mark.timeout(900)


@asynccontextmanager
async def controlled(
    guest: Guest, on_event: Callable[[GuestEvent], None] | None = None
) -> AsyncIterator[GuestControl]:
    """Open the guest's monitor, once nobody else uses it."""
    process = open_process(guest.pid)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                control = await GuestControl.open(process, listening_unix, on_event=on_event)
                break
            except MonitorUnreachable:
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
        try:
            yield control
        finally:
            control.close()
    finally:
        process.close()


def stop(guest: Guest) -> None:
    """Send SIGSTOP, and wait until it has stopped the process."""
    os.kill(guest.pid, SIGSTOP)
    until(lambda: procfs.read_stat(guest.pid).state, "T".__eq__)


async def ask(
    control: GuestControl,
    process: PidfdProcess,
    *,
    powerdown_s: float = 120,
    agent: bool = False,
) -> list[Conclusion]:
    """Ask the guest as a job does, until QEMU exits; return the conclusions without repetitions."""
    attempt = powerdown.start(time.monotonic_ns() // 1000)
    conclusions: list[Conclusion] = []
    while not process.exited():
        attempt = powerdown.observe(attempt, await control.observe())
        span = int(powerdown_s * USEC_PER_SEC)
        judgement = powerdown.judge(attempt, powerdown=span, agent=agent)
        if judgement.conclusion not in conclusions[-1:]:
            conclusions.append(judgement.conclusion)
        if judgement.conclusion in ENDS:
            break
        if judgement.conclusion is Conclusion.ASK:
            assert judgement.method is not None
            if judgement.method is AskMethod.AGENT:
                await control.ask_agent()
            else:
                await control.press()
            now = time.monotonic_ns() // 1000
            attempt = powerdown.note_request(attempt, judgement.method, now)
        await asyncio.sleep(0.2)
    return conclusions


async def load_becomes(control: GuestControl, is_reached: Callable[[float], bool]) -> bool:
    """Return whether the kernel's average for the virtual processors satisfies `is_reached` within
    a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        load = (await control.observe()).vcpu_load
        if load is not None and is_reached(load):
            return True
        await asyncio.sleep(0.1)
    return False


def process_of(guest: Guest) -> PidfdProcess:
    return open_process(guest.pid)


async def ask_guest(
    guest: Guest, *, powerdown_s: float = 120, agent: bool = False
) -> tuple[list[Conclusion], list[GuestEvent]]:
    events: list[GuestEvent] = []
    process = process_of(guest)
    try:
        async with controlled(guest, events.append) as control:
            conclusions = await ask(control, process, powerdown_s=powerdown_s, agent=agent)
        return conclusions, events
    finally:
        process.close()


def test_observations_of_an_idle_guest() -> None:
    async def look() -> None:
        with boot_debian() as debian:
            async with controlled(debian.guest) as control:
                first = await control.observe()
                assert (first.runstate, first.button) == ("running", Button.LISTENED)
                assert first.press_pending is False and first.signs == frozenset()
                port = await control.agent_port()
                assert port is not None and port.opened and not port.held
                assert await control.has_agent()
                debian.shell.run("sync; head -c 100000 /dev/zero >/data/x; sync /data/x")
                assert await load_becomes(control, lambda load: load <= guest_work.CALM)
                second = await control.observe()
                assert first.requests is not None and second.requests is not None
                assert second.requests > first.requests
                assert first.vcpu_time is not None and second.vcpu_time is not None
                assert second.vcpu_time > first.vcpu_time
                assert second.disks_idle is not None and second.disks_idle >= 0
                assert not await control.is_frozen()
                debian.shell.tell("while :; do :; done &")
                assert await load_becomes(control, lambda load: load > guest_work.HALF_BUSY)
                with pytest.raises(InvalidArgs):
                    process = process_of(debian.guest)
                    try:
                        await GuestControl.open(process, listening_unix, qmp_socket="/no")
                    finally:
                        process.close()

    run_for(600, look())


@pytest.mark.parametrize("agent", [True, False])
def test_nothing_is_lost_by_asking(agent: bool) -> None:
    with boot_debian() as debian:
        if not agent:
            debian.shell.run("systemctl stop qemu-guest-agent")
        debian.write_files()
        conclusions, events = run_for(600, ask_guest(debian.guest, agent=agent))
        debian.guest.wait_gone(60)
        assert debian.kept() == (FILES, True)
    # If a disk was busy just before, the guest is measured first.
    begun = [one for one in conclusions if one is not Conclusion.MEASURE]
    assert begun[0] is Conclusion.ASK
    # On a busy host the agent's order may show no effect in time; then the button is pressed too.
    assert begun.count(Conclusion.ASK) == 1 or (agent and begun.count(Conclusion.ASK) == 2)
    kinds = [event.kind for event in events]
    assert (EventKind.POWERDOWN in kinds) is (not agent or begun.count(Conclusion.ASK) == 2)
    assert EventKind.SHUTDOWN in kinds
    assert (Conclusion.SHUTTING_DOWN in conclusions) or not agent


def test_the_signs_of_a_shutdown() -> None:
    async def look(guest: Guest) -> frozenset[ShutdownSign]:
        async with controlled(guest) as control:
            await control.press()
            while guest.alive:
                await control.observe()
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            return control.signs

    with boot_debian() as debian:
        signs = run_for(600, look(debian.guest))
    assert signs == {ShutdownSign.AGENT_CLOSED, ShutdownSign.POWERED_OFF}


async def press_as_somebody_else(guest: Guest) -> None:
    """The press still counts as pending although the guest has already noticed it."""
    async with controlled(guest) as control:
        assert not (await control.observe()).press_pending
        await control.hmp("system_powerdown")
        await asyncio.sleep(0.5)
        assert (await control.observe()).press_pending
        await control.begin_watch()
        assert not (await control.observe()).press_pending


def test_a_guest_that_ignores_the_button() -> None:
    with boot_debian() as debian:
        debian.shell.run(
            "mkdir -p /etc/systemd/logind.conf.d;"
            " printf '[Login]\\nHandlePowerKey=ignore\\n' >/etc/systemd/logind.conf.d/lab.conf;"
            " systemctl restart systemd-logind; systemctl stop qemu-guest-agent"
        )
        run_for(60, press_as_somebody_else(debian.guest))
        conclusions, _ = run_for(600, ask_guest(debian.guest, powerdown_s=4))
        assert debian.guest.alive
    assert conclusions[-1] is Conclusion.IGNORED


def test_powered_off_with_no_shutdown() -> None:
    async def look(guest: Guest) -> None:
        process = process_of(guest)
        try:
            async with controlled(guest) as control:
                assert (await ask(control, process))[-1] is Conclusion.SHUT_DOWN
                assert await control.runstate() == "shutdown"
                await control.quit()
        finally:
            process.close()

    with boot_debian(arguments=["-no-shutdown"]) as debian:
        debian.write_files()
        run_for(600, look(debian.guest))
        assert debian.guest.wait_gone(60) == 0
        assert debian.kept() == (FILES, True)


def test_the_human_monitor_alone() -> None:
    with boot_debian(
        qmp=False, arguments=["-monitor", "unix:{directory}/hmp,server,nowait"]
    ) as debian:
        debian.write_files()
        conclusions, events = run_for(600, ask_guest(debian.guest))
        debian.guest.wait_gone(60)
        assert debian.kept() == (FILES, True)
    assert conclusions[0] in (Conclusion.ASK, Conclusion.MEASURE) and events == []


def test_frozen_file_systems() -> None:
    async def look(guest: Guest) -> None:
        async with controlled(guest) as control:
            assert await control.is_frozen()
            with pytest.raises(CommandRefused):
                await control.ask_agent()
            await control.thaw()
            assert not await control.is_frozen()
            await control.ask_agent()

    with boot_debian() as debian:
        debian.write_files()
        freeze = socket.socket(socket.AF_UNIX)
        with freeze:
            freeze.settimeout(300)
            freeze.connect(str(debian.agent))
            freeze.sendall(b'{"execute": "guest-fsfreeze-freeze"}\n')
            assert b"return" in freeze.recv(4096)
        run_for(600, look(debian.guest))
        assert debian.guest.wait_gone(300) == 0
        assert debian.kept() == (FILES, True)


def test_an_agent_that_another_program_uses() -> None:
    async def look(guest: Guest) -> None:
        async with controlled(guest) as control:
            assert not await control.has_agent()
            with pytest.raises(MonitorBusy, match="Another program"):
                await control.ask_agent()

    with boot_debian() as debian, socket.socket(socket.AF_UNIX) as other:
        other.connect(str(debian.agent))
        run_for(600, look(debian.guest))


def test_a_stopped_agent() -> None:
    async def look(guest: Guest) -> None:
        async with controlled(guest) as control:
            assert not await control.has_agent()
            with pytest.raises(MonitorUnreachable, match="No agent runs"):
                await control.ask_agent()

    with boot_debian() as debian:
        debian.shell.run("systemctl stop qemu-guest-agent")
        run_for(600, look(debian.guest))


def test_an_agent_that_is_restarted_is_no_sign_any_more() -> None:
    async def look(guest: Guest, run: Callable[[str], str]) -> None:
        async with controlled(guest) as control:
            await control.press()
            run("systemctl stop qemu-guest-agent")
            assert (await control.observe()).signs == {ShutdownSign.AGENT_CLOSED}
            run("systemctl start qemu-guest-agent; sleep 10")
            assert (await control.observe()).signs == frozenset()

    with boot_debian() as debian:
        # No program handles the power button.
        debian.shell.run("systemctl mask --now systemd-logind")
        run_for(600, look(debian.guest, debian.shell.run))


def test_a_boot_is_waited_for() -> None:
    """qkilld waits until the booting guest listens, and then presses the button."""
    with boot_debian(state=False, wait=False) as debian:
        conclusions, _ = run_for(600, ask_guest(debian.guest))
        debian.guest.wait_gone(200)
    assert Conclusion.WAIT_FOR_LISTENER in conclusions[:2]
    assert Conclusion.ASK in conclusions and Conclusion.DEAF not in conclusions


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_firmware_alone_is_deaf(qemu: Start, machine: str) -> None:
    guest = qemu(arguments=["-M", machine, "-accel", "tcg"])
    conclusions, _ = run_for(100, ask_guest(guest))
    assert conclusions[-1] is Conclusion.DEAF


def test_a_guest_that_reports_its_shutdown(qemu: Start) -> None:
    """The guest reports its shutdown through its pvpanic device (QEMU 9.1 and later)."""
    guest = qemu(arguments=["-M", "pc", "-accel", "tcg", "-device", "pvpanic"])

    async def look() -> None:
        async with controlled(guest) as control:
            assert control.qmp is not None
            version = (await control.qmp.execute("query-version", timeout_s=30))["qemu"]
            await control.begin_watch()
            assert control.signs == frozenset()
            if (version["major"], version["minor"]) >= (9, 1):
                await control.hmp("o/b 0x505 4")
            else:
                control._take_event(QmpEvent("GUEST_PVSHUTDOWN", {"action": "run"}, 0))
            async with asyncio.timeout(60):
                # QEMU 11 then powers the guest off, which is another sign.
                while ShutdownSign.PVSHUTDOWN not in control.signs:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    run_for(100, look())


def test_a_paused_guest(qemu: Start) -> None:
    async def look(guest: Guest) -> None:
        async with controlled(guest) as control:
            assert await control.runstate() == "prelaunch"
            await control.resume()
            assert await control.runstate() == "running"

    guest = qemu(arguments=["-M", "pc", "-S"])
    assert run_for(100, ask_guest(guest))[0] == [Conclusion.NOT_RUNNING]
    run_for(100, look(guest))


def test_yank_spares_the_monitor(qemu: Start, lab_dir: object) -> None:
    chardev = ["-chardev", f"socket,id=other,path={lab_dir}/other,server=on,wait=off"]
    guest = qemu(arguments=chardev)

    async def look() -> None:
        async with controlled(guest) as control:
            (other,) = await control.query_yank()
            assert (other.kind, other.name) == ("chardev", "other")
            assert control.own_chardevs == {"compat_monitor0"}
            await control.yank([other])
            own = type(other)("chardev", "", {"type": "chardev", "id": "compat_monitor0"})
            with pytest.raises(ValueError, match="own"):
                await control.yank([own])

    run_for(100, look())


def test_a_connection_that_another_daemon_had(qemu: Start) -> None:
    guest = qemu()

    async def look() -> None:
        process = process_of(guest)
        try:
            async with controlled(guest) as control:
                assert control.qmp is not None
                kept = socket.socket(fileno=os.dup(control.qmp.fileno()))
                own = control.own_chardevs
            adopted = await GuestControl.adopt(process, kept, own, listening_unix)
            assert adopted.oob and await adopted.query_yank() == ()
            assert await adopted.runstate() == "running"
            adopted.close()
        finally:
            process.close()

    run_for(100, look())


def test_a_daemon_that_goes_on_with_asking() -> None:
    async def look(guest: Guest) -> frozenset[ShutdownSign]:
        process = process_of(guest)
        try:
            async with controlled(guest) as control:
                await control.observe()
                assert control.qmp is not None
                kept = socket.socket(fileno=os.dup(control.qmp.fileno()))
                own = control.own_chardevs
            adopted = await GuestControl.adopt(process, kept, own, listening_unix, was_asked=True)
            assert (await adopted.observe()).signs == frozenset()
            assert await adopted.has_agent()
            await adopted.press()
            while not process.exited():
                await adopted.observe()
                await asyncio.sleep(0.05)
            adopted.close()
            return adopted.signs
        finally:
            process.close()

    with boot_debian() as debian:
        signs = run_for(600, look(debian.guest))
    assert ShutdownSign.AGENT_CLOSED in signs


def test_a_program_that_uses_the_monitor_for_a_moment(qemu: Start) -> None:
    guest = qemu()

    async def look() -> None:
        async with controlled(guest):
            pass
        process = process_of(guest)
        other = socket.socket(socket.AF_UNIX)
        try:
            other.connect(str(guest.qmp))
            asyncio.get_running_loop().call_later(0.3, other.close)
            (await GuestControl.open(process, listening_unix)).close()
        finally:
            other.close()
            process.close()

    run_for(100, look())


@pytest.mark.parametrize("kind", ["qmp", "monitor"])
@pytest.mark.parametrize("was_used", [False, True])
def test_the_monitor_of_a_stopped_process(
    qemu: Start, lab_dir: Path, kind: str, was_used: bool
) -> None:
    """QEMU does not notice that an earlier client has left, so the monitor seems to be in use."""
    place = f"unix:{lab_dir}/monitor,server=on,wait=off"
    guest = qemu(qmp=False, arguments=[f"-{kind}", place])

    async def look() -> None:
        process = process_of(guest)
        try:
            if was_used:
                async with controlled(guest):
                    stop(guest)
            else:
                until(lambda: read_listeners(guest.pid), bool)
                stop(guest)
            with pytest.raises(MonitorUnreachable) as caught:
                await GuestControl.open(process, listening_unix)
            assert "does not answer, because the guest's process is stopped" in str(caught.value)
            assert "nother program" not in str(caught.value)
        finally:
            process.close()

    run_for(100, look())


def test_a_qemu_in_its_first_milliseconds(qemu: Start, lab_dir: object) -> None:
    """QEMU does not listen yet, but its command line shows that it will."""
    guest = qemu(qmp=False, arguments=["-qmp", f"unix:{lab_dir}/qmp,server=on,wait=off"])

    async def look() -> None:
        process = process_of(guest)
        try:
            control = await GuestControl.open(process, listening_unix)
            assert control.oob
            control.close()
        finally:
            process.close()

    run_for(100, look())


@pytest.mark.parametrize(
    ("data", "powered_off"),
    [
        ('{"guest": true, "reason": "guest-shutdown"}', True),
        ('{"guest": true, "reason": "guest-reset"}', True),
        ('{"guest": true, "reason": "guest-panic"}', False),
        ('{"guest": false, "reason": "host-signal"}', False),
        ("[]", False),
    ],
)
def test_the_last_words_in_a_kept_connection(data: str, powered_off: bool) -> None:
    """The data begins in the middle of a message, because the previous daemon has read its
    beginning."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            text = f'": 1}}\r\n{{"event": "SHUTDOWN", "data": {data}}}\r\n{{"event": "RES'
            theirs.sendall(text.encode())
        signs = JobMonitors(listening_unix).read_rest(KeptMonitor(ours.fileno(), ()))
    assert signs == ({ShutdownSign.POWERED_OFF} if powered_off else frozenset())


def test_a_kept_connection_to_another_process(qemu: Start) -> None:
    guest = qemu()

    async def look() -> None:
        process = process_of(guest)
        ours, theirs = socket.socketpair()
        try:
            with pytest.raises(MonitorUnreachable, match="another process"):
                await GuestControl.adopt(process, ours, frozenset(), listening_unix)
        finally:
            theirs.close()
            process.close()

    run_for(100, look())


def test_a_guest_without_a_monitor(qemu: Start) -> None:
    guest = qemu(qmp=False)

    async def look() -> None:
        process = process_of(guest)
        try:
            with pytest.raises(MonitorError, match="no monitor; give the guest"):
                await GuestControl.open(process, listening_unix)
        finally:
            process.close()

    run_for(100, look())


def test_a_yank_whose_reply_never_comes(qemu: Start) -> None:
    guest = qemu()

    async def work() -> None:
        reply: asyncio.Future[str | Exception | None] = asyncio.get_running_loop().create_future()
        async with controlled(guest) as control:
            monitor = JobMonitor(control)
            stop(guest)
            monitor.yank([], reply.set_result)
            await asyncio.sleep(0.1)
            assert not reply.done()
            os.kill(guest.pid, SIGKILL)
            assert await reply is None
            monitor.close()

    run_for(60, work())


def test_work_cancelled_before_it_began_leaves_nothing_behind(qemu: Start) -> None:
    guest = qemu()
    called: list[object] = []

    def begin_all(monitor: JobMonitor) -> None:
        monitor.observe(called.append)
        monitor.order(GuestOrder.BUTTON, called.append)
        monitor.read_disks(called.append)
        monitor.stop_and_flush([], called.append, stop=True, timeout=USEC_PER_SEC)
        monitor.flush_running([], called.append, timeout=USEC_PER_SEC)
        monitor.query_yank(called.append)
        monitor.yank([], called.append)
        monitor.resume_guest(called.append)  # Interrupts the others.

    async def work() -> None:
        async with controlled(guest) as control:
            process = process_of(guest)
            try:
                JobMonitors(listening_unix).open(process, "", called.append)()
                monitor = JobMonitor(control)
                begin_all(monitor)
                monitor.close()
                begin_all(monitor)
                await asyncio.sleep(0.01)
            finally:
                process.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_for(60, work())
        gc.collect()
    assert [str(one.message) for one in caught if one.category is RuntimeWarning] == []
    assert called == []
