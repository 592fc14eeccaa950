"""Invalid calls and floods, and the answers to them."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from jeepney import DBusAddress, HeaderFields, new_signal  # type: ignore[import-untyped]

from tests.evidence.until import until
from tests.lab.bus import CallError, Client, Daemon, private_bus
from tests.lab.bus import daemon as daemon_on
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID

Make = Callable[..., Guest]

OURS = "org.qkilld1.Error."
JOB = "org.qkilld1.Job"
DBUS = "org.freedesktop.DBus.Error."
INSIDE = re.compile(r"Traceback|File \"|\.py|/usr/|/proc|/home|qkilld\.(?!conf)|object at 0x")


def refused(client: Client, member: str, signature: str, *body: Any, **where: Any) -> CallError:
    """Return the error reply to a call. Check that its text shows no internals of the program."""
    with pytest.raises(CallError) as caught:
        client.call(member, signature, *body, **where)
    text = caught.value.text
    assert text
    assert not re.search(
        r"Traceback|File \"|\.py|/usr/|/proc|/home|qkilld\.(?!conf)|object at 0x", text
    )
    return caught.value


@pytest.fixture
def thread_id() -> Iterator[int]:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    stop.set()
    thread.join()


@pytest.mark.parametrize("member", ["Terminate", "Inspect"])
def test_pids_that_are_no_guest(
    daemon: Daemon, client: Client, thread_id: int, member: str
) -> None:
    more = ("ut", 1) if member == "Terminate" else ("u",)

    def error(pid: int) -> str:
        return refused(client, member, more[0], pid, *more[1:]).name.removeprefix(OURS)

    assert error(0) == "InvalidArgs"
    assert error(1) == "NotQemu"
    assert error(2**32 - 1) == "NoSuchProcess"
    assert error(2**31 - 1) == "NoSuchProcess"
    assert error(thread_id) == "NoSuchProcess"
    assert error(daemon.pid) == "NotQemu"
    assert error(os.getpid()) == "NotQemu"


def test_kernel_threads(client: Client) -> None:
    """Kernel threads are not QEMU. (In a PID namespace, there are none, so nothing is tested.)"""
    # process_iter() with an attribute skips processes that have ended meanwhile.
    for process in psutil.process_iter(["ppid"]):
        if process.info["ppid"] == 2:
            assert refused(client, "Terminate", "ut", process.pid, 1).name == OURS + "NotQemu"


def test_a_process_of_another_user(daemon: Daemon, fake_qemu: Make) -> None:
    roots = fake_qemu(name="secret")
    own = fake_qemu(uid=OTHER_UID)
    with daemon.bus.client(uid=OTHER_UID) as client, daemon.bus.client() as root:
        denied = DBUS + "AccessDenied"
        assert refused(client, "Terminate", "ut", roots.pid, 1).name == denied
        assert refused(client, "Inspect", "u", roots.pid).name == denied
        # For a process that is not QEMU, the denial is the same. So denials do not show which
        # processes are QEMU.
        assert refused(client, "Terminate", "ut", os.getpid(), 1).name == denied
        job = root.terminate(roots.pid, 0)
        job2 = root.terminate(own.pid, 0)
        error = refused(client, "Cancel", "", path=job, interface=JOB)
        assert error.name == denied
        assert root.wait(job)[0] == root.wait(job2)[0] == "exited"


def test_a_user_may_stop_their_own(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(uid=OTHER_UID, stubborn=True)
    with daemon.bus.client(uid=OTHER_UID) as client:
        assert client.call("Inspect", "u", guest.pid)[0]["uid"] == ("u", OTHER_UID)
        job = client.terminate(guest.pid, 1, grace_usec=("t", 100_000))
        result, receipt = client.wait(job)
    assert result == "killed"
    assert receipt["requested-by"] == OTHER_UID


@pytest.mark.parametrize("flags", [16, 1 | 32, 1 << 63, 2**64 - 1])
def test_unknown_flags(client: Client, fake_qemu: Make, flags: int) -> None:
    guest = fake_qemu()
    error = refused(client, "Terminate", "ut", guest.pid, flags)
    assert error.name == OURS + "InvalidArgs"
    assert hex(flags & ~15) in error.text
    assert guest.alive


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start_time": ("t", 1)}, 'Unknown option "start_time"'),
        ({"powerdown_usec": ("t", 1)}, 'Unknown option "powerdown_usec"'),
        ({"powerdown-usec": ("u", 1)}, 'Option "powerdown-usec" is of type t, not u'),
        ({"resume": ("s", "yes")}, 'Option "resume" is of type b, not s'),
        ({"evil\n\x1b[2J": ("s", "")}, 'Unknown option "evil'),
        ({"start-time": ("u", 1)}, 'Option "start-time" is of type t, not u'),
        ({"start-time": ("s", "1")}, 'Option "start-time" is of type t, not s'),
        ({"grace-usec": ("x", -1)}, 'Option "grace-usec" is of type t, not x'),
        ({"reason": ("t", 1)}, 'Option "reason" is of type s, not t'),
        ({"reason": ("as", ["a"])}, 'Option "reason" is of type s, not as'),
        ({"reason": ("s", "x" * 257)}, 'Option "reason" is longer than 256 characters'),
    ],
)
def test_wrong_options(client: Client, fake_qemu: Make, options: Any, text: str) -> None:
    guest = fake_qemu()
    error = refused(client, "TerminateWithOptions", "uta{sv}", guest.pid, 1, options)
    assert error.name == OURS + "InvalidArgs"
    assert error.text.startswith(text)
    assert error.text.isprintable()
    assert guest.alive


def test_wrong_calls(client: Client) -> None:
    properties = "org.freedesktop.DBus.Properties"
    manager = "org.qkilld1.Manager"
    wrong = refused(client, "Terminate", "s", "1")
    assert (wrong.name, wrong.text) == (
        OURS + "InvalidArgs",
        "Terminate takes (u pid, t flags), not (s)",
    )
    assert refused(client, "ListGuests", "u", 1).name == OURS + "InvalidArgs"
    assert refused(client, "Kill", "").name == DBUS + "UnknownMethod"
    for path in ("/", "/org", "/org/qkilld2", "/org/qkilld1/job"):
        assert refused(client, "ListJobs", "", path=path).name == DBUS + "UnknownObject"
    for path in ("/org/qkilld1/job/77", "/org/qkilld1/job/x", "/org/qkilld1/job/1/2"):
        error = refused(client, "Wait", "", path=path, interface=JOB)
        assert error.name == OURS + "NoSuchJob"
    assert refused(client, "GetJobByPID", "u", 1).name == OURS + "NoSuchJob"
    error = refused(client, "Wait", "", interface=JOB)
    assert error.name == DBUS + "UnknownInterface"
    for member, signature, body, name in (
        ("Get", "ss", (manager, "Nothing"), "UnknownProperty"),
        ("Get", "ss", ("org.other", "Version"), "UnknownInterface"),
        ("GetAll", "s", ("org.other",), "UnknownInterface"),
        ("Set", "ssv", (manager, "NJobs", ("u", 1)), "PropertyReadOnly"),
        ("Steal", "", (), "UnknownMethod"),
    ):
        error = refused(client, member, signature, *body, interface=properties)
        assert error.name == DBUS + name
    assert refused(client, "Get", "s", "x", interface=properties).name == OURS + "InvalidArgs"


@pytest.mark.each_library
def test_a_hostile_guest_name_is_defused(client: Client, daemon: Daemon, fake_qemu: Make) -> None:
    name = 'x" [job 7]\n\x1b]0;owned\x07\N{RIGHT-TO-LEFT OVERRIDE}' + "y" * 5000
    guest = fake_qemu(name=name)
    row = next(row for row in client.call("ListGuests")[0] if row[0] == guest.pid)
    assert row[1].isprintable()
    assert len(row[1]) == 256
    assert client.wait(client.terminate(guest.pid))[0] == "exited"
    daemon.wait_for(r"exited after")
    log = daemon.stderr.text()
    assert "\x1b" not in log
    assert all(not line.startswith("owned") for line in log.splitlines())


def test_a_name_that_is_no_utf8(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(arguments=[os.fsdecode(b"-name"), os.fsdecode(b"\xff\xfeweb")])
    row = next(row for row in client.call("ListGuests")[0] if row[0] == guest.pid)
    assert row[1] == "\N{REPLACEMENT CHARACTER}" * 2 + "web"


@pytest.fixture
def roomy_daemon() -> Iterator[Daemon]:
    """A daemon on a bus with the limits of a session bus, because a system bus allows only 128 open
    calls."""
    with private_bus(limits={"max_replies_per_connection": 50_000}) as bus, daemon_on(bus) as up:
        yield up


def test_a_hundred_thousand_calls_in_a_row(roomy_daemon: Daemon, fake_qemu: Make) -> None:
    """One client floods the daemon. Another client is still served, and the memory is freed
    afterwards."""
    daemon = roomy_daemon
    guest = fake_qemu(stubborn=True)
    with daemon.bus.client() as client, daemon.bus.client() as flood:
        job = client.terminate(guest.pid, grace_usec=("t", 600_000_000))
        rest, rss = 100_000, 0
        while rest:
            if rest == 80_000:  # a burst is allowed again by now
                rss = psutil.Process(daemon.pid).memory_info().rss
            batch = [flood.send("Terminate", "ut", 2**31 - 1 - i % 7, 1) for i in range(1_000)]
            assert client.call("GetJobByPID", "u", guest.pid, timeout=5) == (job,)
            for serial in batch:
                with pytest.raises(CallError, match="No process has the id"):
                    flood.reply(serial)
            rest -= len(batch)
        until(
            lambda: [tuple(row) for row in client.call("ListJobs")[0]],
            lambda rows: rows == [(1, job, guest.pid, "terminate", "idle")],
        )
    assert psutil.Process(daemon.pid).memory_info().rss - rss < 8 << 20


def test_a_client_that_disconnects_during_wait(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid)
    descriptors = psutil.Process(daemon.pid).num_fds()
    for _ in range(20):
        with daemon.bus.client() as other:
            serial = other.send("Wait", path=job, interface=JOB)
            assert other.call("ListJobs")  # its reply shows that Wait has arrived
            assert serial
    assert client.properties()["NJobs"] == 1
    guest.signal(signal.SIGKILL)
    assert client.wait(job)[0] == "exited"
    assert psutil.Process(daemon.pid).num_fds() < descriptors
    assert "error" not in daemon.stderr.text().lower()


def test_too_many_waits_of_one_user(roomy_daemon: Daemon, fake_qemu: Make) -> None:
    """The limit is for all connections of a user together. Other users are not affected, and root
    has no limit."""
    guest = fake_qemu(stubborn=True)
    bus = roomy_daemon.bus
    with (
        bus.client() as root,
        bus.client(uid=OTHER_UID) as first,
        bus.client(uid=OTHER_UID) as second,
        bus.client(uid=1) as other,
    ):
        job = root.terminate(guest.pid)

        def wait(client: Client, times: int) -> list[int]:
            serials = [client.send("Wait", path=job, interface=JOB) for _ in range(times)]
            assert client.call("ListJobs")  # the calls have arrived
            return serials

        waits = wait(first, 512) + wait(second, 512)
        (late,) = wait(second, 1)
        with pytest.raises(CallError, match=rf"Uid {OTHER_UID} has 1024 calls of Wait") as caught:
            second.reply(late)
        assert caught.value.name == OURS + "Busy"
        others = wait(other, 100)
        roots = [serial for _ in range(5) for serial in wait(root, 300)]
        # Closing a connection ends its calls.
        first.close()
        assert other.call("ListJobs")
        (more,) = wait(second, 1)
        guest.signal(signal.SIGKILL)
        assert second.reply(more)[0] == second.reply(waits[-1])[0] == "exited"
        assert other.reply(others[-1])[0] == root.reply(roots[-1])[0] == "exited"


def test_more_waiting_callers_than_match_rules(fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    with (
        private_bus({"max_match_rules_per_connection": 2}) as bus,
        daemon_on(bus) as daemon,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(bus.client()) for _ in range(4)]
        job = clients[0].terminate(guest.pid)
        serials = [one.send("Wait", path=job, interface=JOB) for one in clients]
        assert [one.properties()["NJobs"] for one in clients] == [1] * 4  # the calls have arrived
        guest.signal(signal.SIGKILL)
        results = [one.reply(serial)[0] for one, serial in zip(clients, serials, strict=True)]
        assert results == ["exited"] * 4
        # The daemon has removed its earlier match rules, so it can add one to notice that a later
        # caller leaves.
        other = stack.enter_context(bus.client())
        second = fake_qemu(stubborn=True)
        job = other.terminate(second.pid)
        other.send("Wait", path=job, interface=JOB)
        assert other.properties()["NJobs"] == 1
        other.close()
        daemon.wait_for("no longer waits")


def test_a_wait_that_wants_no_answer_is_none(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid)
    with daemon.bus.client() as other:
        for _ in range(5000):  # more than the limit
            other.send("Wait", path=job, interface=JOB, no_reply=True)
        serial = other.send("Wait", path=job, interface=JOB)
        assert other.call("ListJobs")
        guest.signal(signal.SIGKILL)
        assert other.reply(serial)[0] == "exited"


@pytest.mark.parametrize("length", [16 << 10, 3 << 20])
def test_a_message_that_is_too_long(client: Client, fake_qemu: Make, length: int) -> None:
    guest = fake_qemu()
    options = {"reason": ("s", "x" * length)}
    error = refused(client, "TerminateWithOptions", "uta{sv}", guest.pid, 1, options)
    assert error.name == OURS + "InvalidArgs"
    assert "16384 bytes" in error.text
    assert client.properties()["NJobs"] == 0
    assert guest.alive


def test_a_header_that_is_too_long(client: Client) -> None:
    """The message is skipped, and later calls are answered."""
    client.send("Terminate", path="/x" * 10_000)
    assert client.properties()["NJobs"] == 0


@pytest.mark.each_library
def test_signatures_without_end(daemon: Daemon) -> None:
    """For the signatures of a message of 1 MiB, dbus-next kept 183 MB forever."""
    source = random.Random(1)
    with daemon.bus.client(uid=OTHER_UID) as client:

        def attack() -> None:
            numbers = ["".join(source.choice("ynqiuxt") for _ in range(200)) for _ in range(40)]
            variants = [(f"({kinds})", (1,) * len(kinds)) for kinds in numbers]
            error = refused(client, "Terminate", "av", variants)
            assert error.text.startswith("Terminate takes (u pid, t flags), not (av)")
            options = {"reason": variants[0]}
            error = refused(client, "TerminateWithOptions", "uta{sv}", 1, 1, options)
            assert error.name == OURS + "InvalidArgs"

        for _ in range(20):  # a burst is allowed again by now
            attack()
        before = psutil.Process(daemon.pid).memory_info().rss
        for _ in range(200):
            attack()
        # dbus-next kept 300 MB for 24,000 signatures of 200 types each.
        assert psutil.Process(daemon.pid).memory_info().rss - before < 5 << 20


@pytest.mark.each_library
def test_signals_and_replies_of_strangers(daemon: Daemon, fake_qemu: Make) -> None:
    """A stranger sends a signal that looks as if the bus reported the end of another client. The
    Wait of that client must continue."""
    guest = fake_qemu(stubborn=True)
    with daemon.bus.client() as waiting, daemon.bus.client(uid=OTHER_UID) as liar:
        job = waiting.terminate(guest.pid)
        serial = waiting.send("Wait", path=job, interface=JOB)
        assert waiting.call("ListJobs")
        name = waiting.unique_name
        for body in ((name, name, ""), (name, name, name), (name,)):
            signature = "s" * len(body)
            driver = DBusAddress("/org/freedesktop/DBus", None, "org.freedesktop.DBus")
            spoof = new_signal(driver, "NameOwnerChanged", signature, body)
            spoof.header.fields[HeaderFields.destination] = "org.qkilld1"
            liar._connection.send(spoof)
        assert liar.call("ListJobs")
        guest.signal(signal.SIGKILL)
        assert waiting.reply(serial)[0] == "exited"
        assert "Nobody waits" not in daemon.stderr.text()


def test_a_flood_of_one_user_and_the_calls_of_another(
    roomy_daemon: Daemon, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    bus = roomy_daemon.bus
    with bus.client(uid=OTHER_UID) as flood, bus.client() as client:
        job = client.terminate(guest.pid)
        for _ in range(20):
            for _ in range(500):
                flood.send("ListGuests", no_reply=True)
            assert client.call("GetJobByPID", "u", guest.pid, timeout=10) == (job,)
        # Calls over the limit get an error, unless they want no reply.
        serials = [flood.send("ListGuests") for _ in range(3000)]
        answers = Counter[str]()
        for serial in serials:
            try:
                flood.reply(serial)
                answers["answered"] += 1
            except CallError as error:
                answers[error.name] += 1
        assert set(answers) <= {"answered", OURS + "Busy"}
        assert answers.total() == 3000
