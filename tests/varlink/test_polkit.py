"""polkit decides about callers on Varlink by their pidfd. This polkit is a stand-in: the one of
Debian 12 does not know the subject (tests/system/test_polkit.py)."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    HeaderFields,
    MessageType,
    new_error,
    new_method_call,
    new_method_return,
)
from jeepney.io.blocking import open_dbus_connection  # type: ignore[import-untyped]

from tests.evidence.until import until
from tests.lab.bus import Bus
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID
from tests.lab.varlink import VarlinkError
from tests.varlink.conftest import StartDaemon, VarlinkService

Make = Callable[..., Guest]
POLKIT = "org.freedesktop.PolicyKit1"


class Authority:
    """A stand-in for polkit that answers each question with `answer`, or with an error if that is
    None."""

    def __init__(self, bus: Bus, *, descriptors: bool) -> None:
        self.answer: tuple[bool, bool] | None = (True, False)
        self.questions: list[tuple[int, int, str, dict[str, str]]] = []
        """For each question: the process, the uid, the action and the details."""
        self._connection = open_dbus_connection(bus.address, enable_fds=descriptors)
        driver = DBusAddress(
            "/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus"
        )
        request = new_method_call(driver, "RequestName", "su", (POLKIT, 4))
        self._connection.send_and_get_reply(request)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            message = self._connection.receive()
            if message.header.message_type is not MessageType.method_call:
                continue
            if message.header.fields.get(HeaderFields.member) != "CheckAuthorization":
                return
            self._connection.send(self._reply(message))

    def _reply(self, message: Any) -> Any:
        (kind, subject), action, details, _, _ = message.body
        assert kind == "unix-process" and set(subject) == {"pidfd", "uid"}
        pidfd = subject["pidfd"][1].to_raw_fd()
        try:
            text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        finally:
            os.close(pidfd)
        (pid,) = re.findall(r"^Pid:\s+(\d+)$", text, re.MULTILINE)
        self.questions.append((int(pid), subject["uid"][1], action, details))
        if self.answer is None:
            return new_error(message, f"{POLKIT}.Error.Failed")
        return new_method_return(message, "(bba{ss})", ((*self.answer, {}),))

    def close(self, bus: Bus) -> None:
        with bus.client() as client:
            client.send("Quit", path="/", interface=POLKIT, destination=POLKIT, no_reply=True)
        self._thread.join(30)
        self._connection.close()


@contextmanager
def authority(bus: Bus, *, descriptors: bool = True) -> Iterator[Authority]:
    one = Authority(bus, descriptors=descriptors)
    try:
        yield one
    finally:
        one.close(bus)


@pytest.fixture
def on_system_bus(private_bus: Bus, start_daemon: StartDaemon, socket_path: Path) -> VarlinkService:
    daemon = start_daemon("--varlink", str(socket_path), system_bus=True)
    daemon.wait_for("serves the system bus")
    return VarlinkService(daemon, socket_path)


def refused(service: VarlinkService, guest: Guest, **given: Any) -> str:
    with service.client(OTHER_UID) as client, pytest.raises(VarlinkError) as caught:
        client.call("Terminate", pid=guest.pid, **given)
    assert caught.value.name == "org.varlink.service.PermissionDenied"
    return str(caught.value.parameters["message"])


def test_an_authorized_caller_may_stop_the_guest(
    private_bus: Bus, on_system_bus: VarlinkService, fake_qemu: Make
) -> None:
    guest = fake_qemu(name="web")
    with authority(private_bus) as polkit, on_system_bus.client(OTHER_UID) as client:
        job = client.call("Terminate", pid=guest.pid)["state"]["job"]
        assert client.call("Wait", job=job)["state"]["result"] == "exited"
    ((pid, uid, action, details),) = polkit.questions
    assert (pid, uid, action) == (os.getpid(), OTHER_UID, "org.qkilld1.terminate")
    assert details["guest"] == "web"


@pytest.mark.parametrize("answer", [(False, False), (False, True), None])
def test_any_answer_but_yes_is_a_denial(
    private_bus: Bus,
    on_system_bus: VarlinkService,
    fake_qemu: Make,
    answer: tuple[bool, bool] | None,
) -> None:
    guest = fake_qemu()
    with authority(private_bus) as polkit:
        polkit.answer = answer
        assert "D-Bus" in refused(on_system_bus, guest, flags=["force"])
    assert [question[2] for question in polkit.questions] == ["org.qkilld1.force"]
    assert guest.alive


def test_one_that_takes_no_descriptors_is_no(
    private_bus: Bus, on_system_bus: VarlinkService, fake_qemu: Make
) -> None:
    guest = fake_qemu()
    with authority(private_bus, descriptors=False) as polkit:
        assert "D-Bus" in refused(on_system_bus, guest)
    assert polkit.questions == [] and guest.alive


def test_nobody_is_asked_on_another_bus(
    private_bus: Bus, service: VarlinkService, fake_qemu: Make
) -> None:
    """On other buses, anyone can own polkit's name."""
    guest = fake_qemu()
    with authority(private_bus) as polkit:
        assert "D-Bus" in refused(service, guest)
    assert polkit.questions == [] and guest.alive


def test_nothing_is_left_open(
    private_bus: Bus, on_system_bus: VarlinkService, fake_qemu: Make
) -> None:
    guest = fake_qemu()
    descriptors = Path(f"/proc/{on_system_bus.daemon.pid}/fd")
    with authority(private_bus) as polkit:
        polkit.answer = (False, False)
        refused(on_system_bus, guest)
        before = len(list(descriptors.iterdir()))
        for _ in range(5):
            refused(on_system_bus, guest)
        until(lambda: len(list(descriptors.iterdir())), lambda now: now <= before)
