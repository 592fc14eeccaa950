"""The features that desktop tools use: all objects in one call, signals about them, and standard
errors."""

from __future__ import annotations

import signal
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest

from qkilld.bus.guest_objects import MAX_WATCHERS_PER_UID
from qkilld.engine.guest_watch import SCAN_INTERVAL_S
from qkilld.model.constants import (
    GUEST_INTERFACE,
    JOB_INTERFACE,
    MANAGER_INTERFACE,
    MANAGER_PATH,
    UNKNOWN,
)
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import CallError, Client, Daemon, plain
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID, TOP

Make = Callable[..., Guest]
Start = Callable[..., Daemon]
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PROPERTIES = "org.freedesktop.DBus.Properties"
HOSTILE = "\x1b[2J\n[bold]\u202ex"
FORCE = 1
VALUE = ("u", 1)


def managed(client: Client) -> dict[str, dict[str, dict[str, Any]]]:
    (objects,) = client.call("GetManagedObjects", interface=OBJECT_MANAGER)
    return {
        path: {name: plain(values) for name, values in interfaces.items()}
        for path, interfaces in objects.items()
    }


def guests_in(objects: dict[str, dict[str, dict[str, Any]]]) -> dict[int, tuple[str, Any]]:
    """Return the object path and the properties of each guest, by pid."""
    found = {path: one[GUEST_INTERFACE] for path, one in objects.items() if GUEST_INTERFACE in one}
    return {values["PID"]: (path, values) for path, values in found.items()}


def test_all_objects_in_one_call(client: Client, fake_qemu: Make, qemu: Make) -> None:
    web = fake_qemu(name=f"web{HOSTILE}", stubborn=True)
    real = qemu(name="real", qmp=True)
    job = client.terminate(web.pid)
    objects = managed(client)
    path, values = guests_in(objects)[web.pid]
    assert (values["StartTime"], values["UUID"]) == (web.start_time, web.uuid)
    assert values["Name"].isprintable() and values["Name"].startswith("web")
    assert (values["Monitor"], values["Agent"]) == ("none", "none")
    assert guests_in(objects)[real.pid][1]["Monitor"] == "qmp"
    assert list(objects[job]) == [JOB_INTERFACE]
    # Repeat this, because the job may take a sample between the two calls.
    until(
        lambda: (managed(client)[job][JOB_INTERFACE], client.properties(job, JOB_INTERFACE)),
        lambda both: both[0] == both[1],
    )
    # No value contains a path of the guest's files.
    assert not [text for text in values.values() if isinstance(text, str) and "/" in text]
    # The object itself returns the same properties.
    assert client.properties(path, GUEST_INTERFACE) == values
    assert guests_in(managed(client))[web.pid] == (path, values)


def test_introspection_of_a_guest_is_the_xml(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    path, values = guests_in(managed(client))[guest.pid]
    element = ET.parse(TOP / f"dbus/{GUEST_INTERFACE}.xml").getroot().find("interface")
    assert element is not None
    declared = {one.attrib["name"]: one.attrib["type"] for one in element.iterfind("property")}
    assert declared.keys() == values.keys()
    for where, wanted in ((path, GUEST_INTERFACE), (MANAGER_PATH, OBJECT_MANAGER)):
        (text,) = client.call(
            "Introspect", path=where, interface="org.freedesktop.DBus.Introspectable"
        )
        names = [one.attrib["name"] for one in ET.fromstring(text).iterfind("interface")]
        assert wanted in names
    (text,) = client.call(
        "Introspect",
        path="/org/qkilld1/guest",
        interface="org.freedesktop.DBus.Introspectable",
    )
    assert path.rpartition("/")[2] in [
        one.attrib["name"] for one in ET.fromstring(text).iterfind("node")
    ]


def test_guests_come_and_go(client: Client, fake_qemu: Make) -> None:
    client.subscribe()
    before = managed(client)
    guest = fake_qemu(name="late")
    while True:
        _, (path, interfaces) = client.signal("InterfacesAdded", timeout=30)
        if plain(interfaces[GUEST_INTERFACE])["PID"] == guest.pid:
            break
    assert path not in before
    assert guests_in(managed(client))[guest.pid][0] == path
    guest.signal(signal.SIGKILL)
    while (path, [GUEST_INTERFACE]) != client.signal("InterfacesRemoved", timeout=30)[1]:
        pass
    with pytest.raises(CallError, match="UnknownObject"):
        client.properties(path, GUEST_INTERFACE)


def test_nobody_looks_for_guests_once_all_who_asked_have_left(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    guest = fake_qemu()
    client.subscribe()
    with daemon.bus.client() as other:
        path = guests_in(managed(other))[guest.pid][0]
        # The objects exist for all clients, as long as one client watches guests.
        assert client.properties(path, GUEST_INTERFACE)["PID"] == guest.pid
    deadline = time.monotonic() + 15 * SCAN_INTERVAL_S
    with pytest.raises(CallError, match="UnknownObject"):
        while time.monotonic() < deadline:
            client.properties(path, GUEST_INTERFACE)
            time.sleep(0.2)
    # The number of a guest is never reused.
    assert guests_in(managed(client))[guest.pid][0] != path


def test_it_does_not_end_while_somebody_wants_to_hear(start_daemon: Start, fake_qemu: Make) -> None:
    daemon = start_daemon("--exit-idle", "5s")
    with daemon.bus.client() as client:
        client.subscribe()
        managed(client)
        time.sleep(7)
        fake_qemu(name="late")
        client.signal("InterfacesAdded", timeout=30)
    daemon.wait_gone()


def test_jobs_are_objects_with_signals(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    client.subscribe()
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 1_000_000))
    _, (path, interfaces) = client.signal("InterfacesAdded", path=MANAGER_PATH)
    values = plain(interfaces[JOB_INTERFACE])
    assert (path, values["PID"]) == (job, guest.pid)
    assert (values["BytesWritten"], values["Reasons"]) == (UNKNOWN, [])
    _, (interface, changed, _) = client.signal("PropertiesChanged", path=MANAGER_PATH)
    assert (interface, plain(changed)) == (MANAGER_INTERFACE, {"NJobs": 1})
    client.wait(job)
    _, (_, changed, _) = client.signal("PropertiesChanged", path=MANAGER_PATH)
    assert plain(changed) == {"NJobs": 0}


def test_other_users_see_no_private_properties(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    needs.root("to be another user")
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid)
    with daemon.bus.client(uid=OTHER_UID) as stranger:
        objects = managed(stranger)
    assert guest.pid in guests_in(objects)
    seen = objects[job][JOB_INTERFACE]
    assert (seen["BytesWritten"], seen["Rate"], seen["Reasons"]) == (UNKNOWN, UNKNOWN, [])


def test_more_watchers_than_are_remembered(daemon: Daemon, fake_qemu: Make) -> None:
    """One user has more connections than the daemon remembers, so it remembers the newest ones."""
    guest = fake_qemu()
    clients = [daemon.bus.client() for _ in range(3 * MAX_WATCHERS_PER_UID)]
    try:
        paths = {guests_in(managed(client))[guest.pid][0] for client in clients}
        assert len(paths) == 1
        for client in clients[:-1]:
            client.close()
        time.sleep(2 * SCAN_INTERVAL_S + 1)
        assert clients[-1].properties(paths.pop(), GUEST_INTERFACE)["PID"] == guest.pid
    finally:
        clients[-1].close()


@pytest.mark.parametrize(
    ("path", "interface", "member", "signature", "body", "error"),
    [
        (
            MANAGER_PATH,
            PROPERTIES,
            "Set",
            "ssv",
            (MANAGER_INTERFACE, "NJobs", VALUE),
            "ReadOnly",
        ),
        (
            MANAGER_PATH,
            PROPERTIES,
            "Set",
            "ssv",
            (MANAGER_INTERFACE, "No", VALUE),
            "UnknownProp",
        ),
        (MANAGER_PATH, PROPERTIES, "Set", "ssv", ("a.b", "NJobs", VALUE), "UnknownInterface"),
        (MANAGER_PATH, PROPERTIES, "GetAll", "s", ("a.b",), "UnknownInterface"),
        (MANAGER_PATH, "a.b", "Frobnicate", "", (), "UnknownInterface"),
        (MANAGER_PATH, OBJECT_MANAGER, "Frobnicate", "", (), "UnknownMethod"),
        (MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects", "s", ("x",), "UnknownMethod"),
        ("/org/qkilld1/guest/1", PROPERTIES, "GetAll", "s", (GUEST_INTERFACE,), "UnknownObject"),
        ("/org/qkilld1/guest/01", PROPERTIES, "GetAll", "s", (GUEST_INTERFACE,), "UnknownObject"),
        ("/org/qkilld1/job", OBJECT_MANAGER, "GetManagedObjects", "", (), "UnknownObject"),
        ("/nowhere", OBJECT_MANAGER, "GetManagedObjects", "", (), "UnknownObject"),
    ],
)
def test_standard_errors(
    client: Client,
    path: str,
    interface: str,
    member: str,
    signature: str,
    body: tuple[Any, ...],
    error: str,
) -> None:
    with pytest.raises(CallError) as caught:
        client.call(member, signature, *body, path=path, interface=interface)
    assert caught.value.name.startswith("org.freedesktop.DBus.Error.")
    assert error in caught.value.name
