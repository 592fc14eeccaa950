"""The Varlink service: it works as described, and checks the permissions of its callers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qkilld import __version__
from qkilld.engine.call_limits import MAX_WAITS
from qkilld.varlink.idl import Type, WrongValue, parse
from tests.evidence.until import until
from tests.lab.bus import Daemon, daemon, private_bus
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID, TOP
from tests.lab.varlink import VarlinkClient, VarlinkError
from tests.varlink.conftest import VarlinkService

TEXT = (TOP / "dbus/org.qkilld1.varlink").read_text()
DESCRIPTION = parse(TEXT)
Make = Callable[..., Guest]


def refused(client: VarlinkClient, method: str, **given: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(VarlinkError) as caught:
        client.call(method, **given)
    return caught.value.name, caught.value.parameters


def check(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Check a reply against the description."""
    DESCRIPTION.check(parameters, DESCRIPTION.methods[method].gives)
    return parameters


def test_the_live_service_describes_itself_by_the_file(varlink: VarlinkClient) -> None:
    info = varlink.call("org.varlink.service.GetInfo")
    assert info["version"] == __version__
    assert info["interfaces"] == ["org.varlink.service", "org.qkilld1"]
    found = varlink.call("org.varlink.service.GetInterfaceDescription", interface="org.qkilld1")
    assert found == {"description": TEXT}
    about = varlink.call(
        "org.varlink.service.GetInterfaceDescription", interface="org.varlink.service"
    )
    described = parse(about["description"])
    described.check(info, described.methods["GetInfo"].gives)


def test_every_method_answers(varlink: VarlinkClient, fake_qemu: Make) -> None:
    """Every method of the description exists and replies as described."""
    guest = fake_qemu(stubborn=True)
    endless = {"graceUSec": 2**62}
    replied = varlink.call("Terminate", pid=guest.pid, flags=["force"], options=endless)
    job = check("Terminate", replied)["state"]["job"]
    last = fake_qemu(stubborn=True)
    given: dict[str, dict[str, Any]] = {
        "Terminate": {"pid": last.pid, "flags": ["nowait"]},
        "TerminateUnit": {"unit": "nosuch.service"},
        "TerminateAll": {"processes": [{"pid": 1}]},
        "Plan": {"pid": guest.pid, "flags": ["force"]},
        "Inspect": {"pid": guest.pid},
        "GetJobByPID": {"pid": guest.pid},
        "Extend": {"job": job, "usec": 1},
        **{name: {"job": job} for name in ("Hold", "Release", "Force", "Wait", "Cancel")},
    }
    # Wait replies only when the job has ended, so call it after Force, which ends the job.
    for name in sorted(DESCRIPTION.methods, key=lambda name: name in ("Wait", "Cancel")):
        try:
            check(name, varlink.call(name, **given.get(name, {})))
        except VarlinkError as error:
            assert name == "TerminateUnit", name
            errors = DESCRIPTION.errors
            DESCRIPTION.check(error.parameters, errors[error.name.rpartition(".")[2]])


def test_one_call_is_start_progress_and_wait(varlink: VarlinkClient, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True, name="web")
    options = {"graceUSec": 700_000, "reason": "a test"}
    replies = list(varlink.stream("Terminate", pid=guest.pid, flags=["force"], options=options))
    for reply in replies:
        check("Terminate", reply)
    first, *between, last = replies
    state = first["state"]
    # On a busy host, the command line may be read late. A guest without a known name may have
    # storage on a network, so qkilld first searches for the servers of this storage.
    assert (state["phase"], state["name"]) in [("terminate", "web"), ("quit", "")]
    assert state["result"] is None
    assert [each["state"]["phase"] for each in between]
    assert last["state"]["result"] == "killed"
    assert [rung["action"] for rung in last["receipt"]["rungs"]] == ["SIGTERM", "SIGKILL"]
    assert last["receipt"]["reason"] == "a test"


def test_never_and_unknown_are_null(varlink: VarlinkClient, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    options = {"graceUSec": 2**62, "stallUSec": 2**62}
    state = varlink.call("Terminate", pid=guest.pid, flags=["force"], options=options)["state"]
    assert state["deadlineUSec"] is None and state["notBeforeUSec"] == 0
    assert varlink.call("GetStatus")["maxUSec"] is None
    assert "18446744073709551615" not in json.dumps(varlink.call("ListJobs"))
    varlink.call("Extend", job=state["job"], usec=2**62)
    assert (
        check("GetJobByPID", varlink.call("GetJobByPID", pid=guest.pid))["state"]["notBeforeUSec"]
        is None
    )


@pytest.mark.parametrize("usec", [2**63, 2**64 - 2])
def test_no_number_is_greater_than_an_int_of_varlink(
    service: VarlinkService, fake_qemu: Make, usec: int
) -> None:
    """A caller on the bus may have requested times that are greater than such an int."""
    guest = fake_qemu(stubborn=True)
    with service.daemon.bus.client() as on_bus, service.client() as client:
        path = on_bus.terminate(guest.pid, 1, grace_usec=("t", usec), max_usec=("t", usec))
        on_bus.call("Extend", "t", usec, path=path, interface="org.qkilld1.Job")
        state = check("GetJobByPID", client.call("GetJobByPID", pid=guest.pid))["state"]
    assert (state["notBeforeUSec"], state["deadlineUSec"]) == (None, None)


def test_all_in_one_call(varlink: VarlinkClient, fake_qemu: Make) -> None:
    guests = [fake_qemu(), fake_qemu(stubborn=True), fake_qemu()]
    processes = [{"pid": guest.pid, "startTime": guest.start_time} for guest in guests]
    processes += [{"pid": os.getpid()}, {"pid": guests[0].pid, "startTime": 1}]
    first, *rest = varlink.stream(
        "TerminateAll", flags=["force"], options={"graceUSec": 500_000}, processes=processes
    )
    for reply in (first, *rest):
        check("TerminateAll", reply)
    assert [state["pid"] for state in first["states"]] == [guest.pid for guest in guests]
    assert [(each["pid"], each["name"]) for each in first["refused"]] == [
        (os.getpid(), "NotQemu"),
        (guests[0].pid, "ProcessChanged"),
    ]
    ends = {each["state"]["pid"]: each["state"]["result"] for each in rest if "receipt" in each}
    assert ends == {guests[0].pid: "exited", guests[1].pid: "killed", guests[2].pid: "exited"}


def test_an_empty_list_of_processes_has_an_empty_reply(varlink: VarlinkClient) -> None:
    assert list(varlink.stream("TerminateAll", processes=[])) == [{"states": [], "refused": []}]


@pytest.mark.parametrize(
    ("method", "given", "name"),
    [
        ("Terminate", {"pid": 2**31 - 1}, "org.qkilld1.NoSuchProcess"),
        ("Terminate", {"pid": -1}, "org.qkilld1.NoSuchProcess"),
        ("Terminate", {"pid": 2**40}, "org.qkilld1.NoSuchProcess"),
        ("Terminate", {"pid": 1}, "org.qkilld1.NotQemu"),
        ("Terminate", {"pid": 1, "flags": ["powerdown", "fixed"]}, "org.qkilld1.InvalidArgs"),
        ("Terminate", {"pid": 1, "options": {"maxUSec": -1}}, "org.qkilld1.InvalidArgs"),
        ("Wait", {"job": 99}, "org.qkilld1.NoSuchJob"),
        ("Wait", {"job": -1}, "org.qkilld1.NoSuchJob"),
        ("Extend", {"job": 1, "usec": -1}, "org.qkilld1.InvalidArgs"),
    ],
)
def test_errors_have_their_names(
    varlink: VarlinkClient, fake_qemu: Make, method: str, given: dict[str, Any], name: str
) -> None:
    if method == "Extend":
        varlink.call("Terminate", pid=fake_qemu(stubborn=True).pid)
    found, parameters = refused(varlink, method, **given)
    assert found == name
    assert list(parameters) == ["message"]


@pytest.mark.parametrize(
    ("method", "given", "parameter"),
    [
        ("Terminate", {}, "pid"),
        ("Terminate", {"pid": "1"}, "pid"),
        ("Terminate", {"pid": True}, "pid"),
        ("Terminate", {"pid": 1.0}, "pid"),
        ("Terminate", {"pid": 2**63}, "pid"),
        ("Terminate", {"pid": 1, "flags": 1}, "flags"),
        ("Terminate", {"pid": 1, "flags": ["murder"]}, "flags"),
        ("Terminate", {"pid": 1, "options": {"graceusec": 1}}, "options"),
        ("Terminate", {"pid": 1, "options": {"reason": "a\ud800"}}, "options"),
        ("Terminate", {"pid": 1, "options": {"qmpSocket": "/a\0b"}}, "options"),
        ("Terminate", {"pid": 1, "colour": "red"}, "colour"),
        ("GetStatus", {"pid": 1}, "pid"),
        ("org.varlink.service.GetInterfaceDescription", {}, "interface"),
    ],
)
def test_wrong_parameters_are_named(
    varlink: VarlinkClient, method: str, given: dict[str, Any], parameter: str
) -> None:
    expected = ("org.varlink.service.InvalidParameter", {"parameter": parameter})
    assert refused(varlink, method, **given) == expected


def test_unknown_methods_and_interfaces_have_errors(varlink: VarlinkClient) -> None:
    service = "org.varlink.service"
    assert refused(varlink, "Murder")[0] == f"{service}.MethodNotFound"
    assert refused(varlink, "org.other.Murder")[0] == f"{service}.InterfaceNotFound"
    assert refused(varlink, f"{service}.Murder")[0] == f"{service}.MethodNotFound"
    found = refused(varlink, f"{service}.GetInterfaceDescription", interface="org.other")
    assert found == (f"{service}.InterfaceNotFound", {"interface": "org.other"})


def test_root_and_the_owner_and_nobody_else(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    with service.client(OTHER_UID) as stranger:
        for method, given in (
            ("Terminate", {"pid": guest.pid}),
            ("Inspect", {"pid": guest.pid}),
            ("Plan", {"pid": guest.pid}),
        ):
            name, parameters = refused(stranger, method, **given)
            assert name == "org.varlink.service.PermissionDenied"
            assert "D-Bus" in parameters["message"]
        assert stranger.call("GetStatus")["jobs"] == 0
        # The error for a process that is not QEMU is the same.
        name, _ = refused(stranger, "Terminate", pid=os.getpid())
        assert name == "org.varlink.service.PermissionDenied"
        with service.client() as root:
            job = root.call("Terminate", pid=guest.pid)["state"]["job"]
        for method in ("Cancel", "Hold", "Force"):
            name, _ = refused(stranger, method, job=job)
            assert name == "org.varlink.service.PermissionDenied"
        (state,) = stranger.call("ListJobs")["jobs"]
        assert state["job"] == job and state.get("bytesWritten") is None
    own = fake_qemu(stubborn=True, uid=OTHER_UID)
    with service.client(OTHER_UID) as owner:
        assert owner.call("Terminate", pid=own.pid)["state"]["uid"] == OTHER_UID


def test_jobs_are_the_same_on_the_bus(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    with service.client() as varlink, service.daemon.bus.client() as client:
        number = varlink.call("Terminate", pid=guest.pid)["state"]["job"]
        path = client.terminate(guest.pid, 1)
        assert path == f"/org/qkilld1/job/{number}"
        assert varlink.call("GetJobByPID", pid=guest.pid)["state"]["flags"] == ["force"]
        varlink.send("Wait", job=number)
        client.cancel(path)
        assert varlink.reply()[0]["state"]["result"] == "cancelled"


def test_limits_are_shared_with_the_bus(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    endless = {"graceUSec": 2**62}
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(service.client())
        state = root.call("Terminate", pid=guest.pid, flags=["force"], options=endless)["state"]
        job = state["job"]
        for _ in range(10):
            on_bus = stack.enter_context(service.daemon.bus.client(OTHER_UID))
            for _ in range(100):
                on_bus.send("Wait", path=f"/org/qkilld1/job/{job}", interface="org.qkilld1.Job")
            on_bus.call("ListJobs")  # The reply shows that the waits are open.
        clients = [service.client(OTHER_UID) for _ in range(25)]
        for each in clients:
            each.send("Wait", more=True, job=job)
        # The first reply to a wait is the current state.
        answers = [each.receive() for each in clients]
        for each in clients:
            each.close()
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert errors == ["org.qkilld1.Busy"]


def test_a_message_is_at_most_64_kib(service: VarlinkService, varlink: VarlinkClient) -> None:
    call = json.dumps({"method": "org.qkilld1.ListJobs"}).encode()
    varlink.send_raw(call + b" " * ((64 << 10) - len(call)) + b"\0")
    assert varlink.reply()[0] == {"jobs": []}
    with service.client() as other:
        other.send_raw(call + b" " * ((64 << 10) - len(call) + 1) + b"\0")
        with pytest.raises((EOFError, ConnectionResetError)):
            other.receive()
    assert varlink.call("ListJobs") == {"jobs": []}


def test_many_processes_in_a_call_are_as_many_calls(service: VarlinkService) -> None:
    """60 calls with 5,500 processes each took 50 s, in which nobody else was answered."""
    with service.client(OTHER_UID) as other, service.client() as root:
        for count, error in ((64, None), (65, "org.qkilld1.Busy")):
            processes = [{"pid": 1}] * count
            for client, wanted in ((other, error), (root, None)):
                client.send("TerminateAll", processes=processes)
                answer = client.receive()
                assert answer.get("error") == wanted
                assert len(answer["parameters"].get("refused", [])) == (0 if wanted else count)
        # The limits are released.
        assert "error" not in other.call("TerminateAll", processes=[{"pid": 1}] * 64)
        other.send("ListJobs")
        assert other.receive()["parameters"] == {"jobs": []}
        call = json.dumps({"method": "org.qkilld1.ListJobs"}).encode()
        other.send_raw(call + b" " * ((16 << 10) - len(call) + 1) + b"\0")
        with pytest.raises((EOFError, ConnectionResetError)):
            other.receive()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"method": 1}',
        b'{"method": "org.qkilld1.ListJobs", "more": 1}',
        b'{"method": "org.qkilld1.ListJobs", "parameters": []}'[:-1],
        b'{"method": "org.qkilld1.ListJobs", "parameters": [1]}',
        b'{"method": "org.qkilld1.ListJobs"}\xff',
        b"[" * 60_000,
        b'{"method": ' + b"1" * 60_000 + b"}",
        b'{"method": NaN}',
    ],
)
def test_a_malformed_message_ends_only_its_own_connection(
    service: VarlinkService, varlink: VarlinkClient, message: bytes
) -> None:
    with service.client() as other:
        other.send_raw(message + b"\0")
        with pytest.raises((EOFError, ConnectionResetError)):
            other.receive()
    assert varlink.call("ListJobs") == {"jobs": []}


def test_calls_sent_ahead_are_answered_in_order(
    service: VarlinkService, varlink: VarlinkClient
) -> None:
    names = ["ListJobs", "GetStatus", "ListGuests", "org.varlink.service.GetInfo", "ListJobs"]
    for name in names:
        varlink.send(name)
    keys = [min(varlink.reply()[0]) for _ in names]
    assert keys == ["jobs", "graceUSec", "guests", "interfaces", "jobs"]
    # A client may close its sending side before it reads the reply.
    with service.client() as other:
        for name in names:
            other.send(name)
        other.socket.shutdown(socket.SHUT_WR)
        assert [min(other.reply()[0]) for _ in names] == keys
        with pytest.raises(EOFError):
            other.receive()


def test_oneway_is_done_without_a_word(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu()
    with service.client() as client:
        client.send("Terminate", oneway=True, pid=guest.pid)
        # The caller may disconnect before the guest is stopped.
    guest.wait_gone()


def test_a_requester_that_disconnects_is_reported(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True, name="web")
    with service.client() as client:
        client.send("Terminate", more=True, pid=guest.pid)
        client.reply()
    service.daemon.wait_for(r"^warning: .*web.*")
    with service.client() as client:
        assert client.call("ListJobs")["jobs"][0]["result"] is None
        until(lambda: client.call("GetStatus")["jobs"], lambda jobs: jobs == 1)


def test_waits_that_were_given_up_do_not_count(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    with service.client() as root:
        state = root.call("Terminate", pid=guest.pid, options={"graceUSec": 2**62}, flags=["force"])
        job = state["state"]["job"]
        for _ in range(1100):
            with service.client(OTHER_UID) as waiter:
                waiter.send("Wait", more=True, job=job)
                assert waiter.reply()[0]["state"]["job"] == job


def test_descriptors_that_nobody_wants_are_closed(
    service: VarlinkService, varlink: VarlinkClient
) -> None:
    def opened() -> int:
        return len(list(Path(f"/proc/{service.daemon.pid}/fd").iterdir()))

    varlink.call("ListJobs")
    before = opened()
    call = json.dumps({"method": "org.qkilld1.ListJobs"}).encode() + b"\0"
    with contextlib.ExitStack() as stack:
        pipe = os.pipe()
        for descriptor in pipe:
            stack.callback(os.close, descriptor)
        for _ in range(20):
            socket.send_fds(varlink.socket, [call], pipe)
            assert varlink.reply()[0] == {"jobs": []}
        # The daemon sends the reply a moment before it closes the descriptors.
        until(opened, lambda count: count <= before)
        with service.client() as other:
            socket.send_fds(other.socket, [call], [pipe[0]] * 9)
            with pytest.raises((EOFError, ConnectionResetError)):
                other.receive()
        until(opened, lambda count: count <= before)


def test_a_client_that_does_not_read_keeps_nobody_waiting(
    service: VarlinkService, varlink: VarlinkClient, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    job = varlink.call("Terminate", pid=guest.pid, options={"graceUSec": 2**62})["state"]["job"]
    with service.client() as deaf:
        deaf.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            for _ in range(100_000):
                deaf.socket.send(b'{"method":"org.varlink.service.GetInfo"}\0' * 100)
        began = time.monotonic()
        for _ in range(200):
            varlink.call("Extend", job=job, usec=1)
        assert time.monotonic() - began < 20


def test_the_daemon_ends_and_waiters_see_it_go(
    service: VarlinkService, varlink: VarlinkClient, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    varlink.send("Terminate", more=True, pid=guest.pid)
    varlink.reply()
    assert service.daemon.stop() == 0
    replies = []
    with pytest.raises((EOFError, ConnectionResetError)):
        while True:
            replies.append(varlink.reply()[0])
    assert replies[-1]["state"]["result"] == "cancelled"
    assert guest.alive
    assert not service.path.exists()


def test_without_a_bus_it_starts_serves_and_ends(
    private_bus: Any, start_daemon: Callable[..., Daemon], socket_path: Any, fake_qemu: Make
) -> None:
    """The daemon requests its name when the bus has started."""
    private_bus.stop()
    daemon = start_daemon("--varlink", str(socket_path))
    guest = fake_qemu()
    with VarlinkClient(socket_path) as client:
        *_, last = client.stream("Terminate", pid=guest.pid)
        assert last["state"]["result"] == "exited"
    daemon.wait_for("qkilld has no bus .* it serves only Varlink until a bus appears")
    assert daemon.stop() == 0


def test_losing_the_bus_ends_its_waits(socket_path: Path, fake_qemu: Make) -> None:
    """Waits that stayed open would count against the limits of their user until the end of the job.
    The daemon does not report that the client no longer waits, because the client may wait again on
    Varlink."""
    guest = fake_qemu(stubborn=True, uid=OTHER_UID)
    limits = {"max_replies_per_connection": 2 * MAX_WAITS}
    with private_bus(limits) as bus, daemon(bus, "--varlink", str(socket_path)) as running:
        service = VarlinkService(running, socket_path)
        running.wait_for("serves the bus at")
        with bus.client(OTHER_UID) as user:
            path = user.terminate(guest.pid, grace_usec=("t", 600_000_000))
            for number in range(MAX_WAITS):
                user.send("Wait", path=path, interface="org.qkilld1.Job")
                if number % 64 == 63:
                    user.call("Ping", interface="org.freedesktop.DBus.Peer")
            with service.client(OTHER_UID) as client:
                assert "calls of Wait open" in refused(client, "Wait", job=1)[1]["message"]
            bus.stop()
            running.wait_for("qkilld has no bus")
        with service.client(OTHER_UID) as client:
            assert next(client.stream("Wait", job=1))["state"]["pid"] == guest.pid
            # When this client leaves, the daemon reports it.
            assert "no longer waits" not in running.stderr.text()
        with service.client() as client:
            client.call("Force", job=1)
        assert guest.wait_gone() == -9


def test_losing_the_bus_ends_nothing(service: VarlinkService, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    with service.client() as client:
        options = {"graceUSec": 1_500_000}
        client.send("Terminate", more=True, pid=guest.pid, flags=["force"], options=options)
        client.reply()
        service.daemon.wait_for("serves the bus at")
        service.daemon.bus.stop()
        service.daemon.wait_for("qkilld has no bus")
        client.socket.settimeout(60)
        continues = True
        while continues:
            last, continues = client.reply()
        assert last["state"]["result"] == "killed"
        assert client.call("GetStatus")["jobs"] == 0
    assert service.daemon.stop() == 0


def test_a_type_of_every_kind() -> None:
    description = parse(
        "interface a.b\n# a comment\ntype T (one, two)\n"
        "method M(l: []?T, m: [string]int, o: object, s: (x: bool)) -> ()\nerror E ()\n"
    )
    hint = description.methods["M"].takes
    good: dict[str, Any] = {"l": ["one", None], "m": {"k": 1}, "o": {}, "s": {"x": True}}
    description.check(good, hint)
    wrong: tuple[dict[str, Any], ...] = (
        {"l": ["three"]},
        {"l": "one"},
        {"m": {"k": "1"}},
        {"m": []},
        {"o": 1},
        {"s": {"x": 1}},
        {"s": None},
    )
    for bad in wrong:
        with pytest.raises(WrongValue, match=next(iter(bad))):
            description.check(good | bad, hint)
    assert hint.fields is not None
    assert hint.fields["o"] == Type("object")


@pytest.mark.parametrize(
    "text", ["", "interface", "interface a.b\nmethod M()", "interface a.b x ()"]
)
def test_a_description_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|neither|cannot"):
        parse(text)


def test_a_signal_does_not_disturb(service: VarlinkService, varlink: VarlinkClient) -> None:
    os.kill(service.daemon.pid, signal.SIGWINCH)
    assert varlink.call("ListJobs") == {"jobs": []}


def test_a_guest_that_is_gone_at_once_takes_one_reply(
    service: VarlinkService, fake_qemu: Make
) -> None:
    """With `byUnit`, the unit is not read if the guest exits soon enough."""
    guest = fake_qemu()
    with service.client() as client:
        (reply,) = client.stream("Terminate", pid=guest.pid, byUnit=True)
    assert check("Terminate", reply)["state"]["result"] == "exited"


def test_the_first_reply_does_not_wait_for_the_unit(
    varlink: VarlinkClient, fake_qemu: Make
) -> None:
    """The caller must know of the job in case the daemon crashes. The unit's limits come in a later
    reply. Here they are unknown, because this bus has no systemd."""
    guest = fake_qemu(stubborn=True)
    options = {"graceUSec": 1_500_000}
    first, *rest = varlink.stream(
        "Terminate", pid=guest.pid, byUnit=True, flags=["force"], options=options
    )
    state = check("Terminate", first)["state"]
    assert state["phase"] == "terminate" and "unitError" not in first
    assert rest[-1]["state"]["result"] == "killed"
    assert any("unitError" in reply for reply in rest)


def test_of_many_the_first_reply_comes_before_the_first_end(
    varlink: VarlinkClient, fake_qemu: Make
) -> None:
    guests = [fake_qemu(), fake_qemu(stubborn=True)]
    first, *rest = varlink.stream(
        "TerminateAll",
        processes=[{"pid": guest.pid} for guest in guests],
        flags=["force"],
        options={"graceUSec": 900_000},
        byUnit=True,
    )
    assert [state["pid"] for state in first["states"]] == [guest.pid for guest in guests]
    assert rest[0]["state"]["result"] == "exited" and "unitError" not in first
    assert [reply for reply in rest if "unitError" in reply]
    assert rest[-1]["state"]["result"] == "killed"
