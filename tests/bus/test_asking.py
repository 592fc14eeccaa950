"""Guests that are asked to shut down: their reaction, and the receipt.

The guests boot a real Linux in two seconds. They listen to the power button, and have no agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from qkilld.monitor.reach import read_listeners
from tests.evidence.until import until
from tests.lab.bus import Bus, Client, Daemon
from tests.lab.guest import Guest, boot_guest, make_disk
from tests.lab.qmp import Qmp

FORCE, POWERDOWN = 1, 4
S = 1_000_000
JOB = "org.qkilld1.Job"
Start = Callable[..., Daemon]
Boot = Callable[..., Guest]


@pytest.fixture
def boot() -> Iterator[Boot]:
    """A function like boot_guest. The guest has a monitor, and `power` says how it reacts to its
    power button."""
    with ExitStack() as stack:

        def boot(power: str, *arguments: str, append: str = "", **options: Any) -> Guest:
            append = f"lab.power={power} {append}"
            guest = boot_guest(job="power", append=append, qmp=True, arguments=arguments, **options)
            return stack.enter_context(guest)

        yield boot


@pytest.fixture
def start(start_daemon: Start, lab_dir: Path) -> Iterator[Start]:
    """A function like start_daemon, with one runtime directory for all daemons of a test."""
    lab_dir.chmod(0o700)

    def start() -> Daemon:
        return start_daemon(env={"RUNTIME_DIRECTORY": str(lab_dir)})

    yield start


def actions(receipt: dict[str, Any]) -> list[str]:
    return [action for _, action, _ in receipt["rungs"]]


def at(receipt: dict[str, Any], action: str) -> float:
    """Return the time at which this action was last taken, in seconds after the start."""
    return float(max(usec for _, what, usec in receipt["rungs"] if what == action) / S)


def test_a_guest_that_shuts_down(client: Client, boot: Boot) -> None:
    guest = boot("off")
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN | FORCE))
    assert (result, receipt["guest-asked"], actions(receipt)) == ("exited", "shut-down", ["button"])
    assert guest.wait_gone() == 0


@pytest.mark.parametrize("busy", ["", "lab.busy=1"], ids=["idle", "busy"])
def test_a_guest_that_ignores_it(client: Client, boot: Boot, busy: str) -> None:
    """The guest gets SIGTERM after PowerdownSec=, even if it is busy."""
    guest = boot("nothing", append=busy)
    job = client.terminate(guest.pid, POWERDOWN | FORCE, powerdown_usec=("t", 3 * S))
    result, receipt = client.wait(job)
    assert (result, receipt["guest-asked"]) == ("exited", "ignored")
    assert actions(receipt) == ["button", "SIGTERM"]
    waited = at(receipt, "SIGTERM") - at(receipt, "button")
    print(f"asked after {at(receipt, 'button'):.3f} s, left {waited:.3f} s after that")
    assert 3 <= waited < 10


def test_a_guest_without_acpi_is_deaf(client: Client, boot: Boot) -> None:
    guest = boot("off", append="acpi=off")
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN))
    assert (result, receipt["guest-asked"]) == ("exited", "deaf")
    print(f"known after {at(receipt, 'SIGTERM'):.3f} s")
    assert at(receipt, "SIGTERM") < 30, "half of PowerdownSec="


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_guest_that_boots_is_waited_for(client: Client, boot: Boot, seconds: int) -> None:
    guest = boot("off", wait=False)
    time.sleep(seconds)
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN))
    assert (result, receipt["guest-asked"]) == ("exited", "shut-down")
    assert set(actions(receipt)) == {"button"}


def test_a_guest_that_restarts_instead(daemon: Daemon, client: Client, boot: Boot) -> None:
    """The guest is asked again after its restart. After the second restart, it gets SIGTERM."""
    guest = boot("reboot", "-action", "reboot=reset")
    # On a busy host, the guest boots for more than a minute, and does not use its disks.
    job = client.terminate(guest.pid, POWERDOWN, powerdown_usec=("t", 300 * S))
    result, receipt = client.wait(job, timeout=600)
    assert (result, receipt["guest-asked"]) == ("exited", "ignored")
    assert (actions(receipt)[0], actions(receipt)[-1]) == ("button", "SIGTERM")
    assert actions(receipt).count("button") >= 2
    daemon.wait_for("it restarts instead of shutting down")


def test_a_guest_that_has_powered_off_has_its_qemu_told_to_quit(client: Client, boot: Boot) -> None:
    guest = boot("off", "-no-shutdown")
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN))
    assert (result, receipt["guest-asked"]) == ("exited", "shut-down")
    assert actions(receipt) == ["button", "quit"]
    assert guest.wait_gone() == 0


def test_a_guest_whose_monitor_another_program_uses(client: Client, boot: Boot) -> None:
    """qkilld does not use the monitor, and the stop continues without it."""
    guest = boot("off")
    with Qmp(guest):
        result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN))
    assert (result, receipt["guest-asked"]) == ("exited", "unreachable")
    assert at(receipt, "SIGTERM") < 10


@pytest.mark.parametrize("resume", [False, True])
def test_a_paused_guest(client: Client, boot: Boot, resume: bool) -> None:
    guest = boot("off")
    with Qmp(guest) as qmp:
        qmp.call("stop")
    job = client.terminate(guest.pid, POWERDOWN, resume=("b", resume))
    result, receipt = client.wait(job)
    outcome = "shut-down" if resume else "not-running"
    assert (result, receipt["guest-asked"]) == ("exited", outcome)


def test_a_qemu_that_crashes_is_no_guest_that_shut_down(client: Client, boot: Boot) -> None:
    guest = boot("nothing")
    job = client.terminate(guest.pid, POWERDOWN)
    until(lambda: client.properties(job, JOB)["GuestAsked"], "asked".__eq__)
    guest.signal(SIGKILL)
    result, receipt = client.wait(job)
    assert (result, receipt["guest-asked"]) == ("exited", "asked")


def test_a_long_shutdown_outlives_the_daemon_again_and_again(
    private_bus: Bus, start: Start, boot: Boot, lab_dir: Path
) -> None:
    """The daemon is killed three times: before the guest is asked, right after that, and during the
    shutdown, which takes longer than PowerdownSec=.

    A guest without an agent gives none of the signs that only a shutdown gives. So the next daemon
    must know that the guest's work began after the press.
    """
    for number in range(4):
        disk = make_disk(lab_dir / f"disk{number}.qcow2")
        guest = boot("work", append="lab.seconds=70", disk=disk)
        with private_bus.client() as client:
            try:
                result, receipt = stopped_by_many(client, start, guest)
            except MonitorStaysInUse:
                guest.signal(SIGKILL)
                continue
        assert (result, receipt["guest-asked"]) == ("exited", "shut-down"), str(receipt)
        assert actions(receipt) == ["button"], str(receipt)
        assert guest.wait_gone() == 0
        return
    pytest.fail("each QEMU kept the connection of a daemon that was killed")


class MonitorStaysInUse(Exception):
    """QEMU keeps the connection of a daemon that was killed.

    If a connection ends during its negotiation or a command, QEMU sometimes does this for 40 s or
    more. Such a guest cannot be asked again.
    """


def stopped_by_many(client: Client, start: Start, guest: Guest) -> tuple[str, dict[str, Any]]:
    """Return the result and the receipt. Raises MonitorStaysInUse."""
    daemon = start()
    job = client.terminate(guest.pid, POWERDOWN | FORCE, powerdown_usec=("t", 20 * S))
    daemon = killed(daemon, start, guest)
    until(lambda: client.properties(job, JOB)["GuestAsked"], "asked".__eq__)
    daemon = killed(daemon, start, guest)
    began = time.monotonic()
    for _ in range(2):
        found = until(
            lambda: client.properties(job, JOB),
            lambda found: found["Verdict"] == "guest-shutdown" or found["Result"],
        )
        if found["Result"]:
            break  # The receipt says why the job has ended.
        daemon = killed(daemon, start, guest)
        if time.monotonic() - began > 15:
            break  # On a busy machine, the guest may have shut down before the next kill.
    return client.wait(job, timeout=300)


def killed(daemon: Daemon, start: Start, guest: Guest) -> Daemon:
    """Kill the daemon; return the next one.

    Without systemd, nobody keeps the connection to the monitor. Wait until QEMU has noticed its
    end, because the monitor serves only one client. Raises MonitorStaysInUse.
    """
    daemon.process.kill()
    daemon.wait_gone()
    if not becomes_free(guest):
        raise MonitorStaysInUse
    return start()


def becomes_free(guest: Guest, timeout: float = 20) -> bool:
    """Wait up to `timeout` seconds; return whether the guest's monitor then has no client."""
    deadline = time.monotonic() + timeout
    while any(each.in_use for each in read_listeners(guest.pid)):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True
