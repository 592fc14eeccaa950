"""Journal events of the helper. For the events of jobs, see engine.events."""

from __future__ import annotations

from qkilld.model.constants import GuestAsked
from qkilld.model.event import Event, MessageId, Priority
from qkilld.model.guest import Guest, Identity, Label, Unit
from qkilld.model.text import printable
from qkilld.stop.guest_stop import GuestStop


def guest_of(stop: GuestStop, unit: Unit | None) -> Guest:
    """Return the guest of a stop. Unknown values are empty."""
    uid, name = (stop.state["uid"], stop.state["name"]) if stop.state else (0, "")
    process = stop.process
    identity = Identity(process.pid, process.start_time or 0, uid, "", "", "", False)
    return Guest(identity, Label(name, "", unit))


def stop_fallback(guest: Guest, why: str) -> Event:
    return _of_guest(
        MessageId.STOP_ALONE,
        Priority.NOTICE,
        f"qkilld-stop stops {guest.title} without qkilld: {why}.",
        guest,
    )


def stop_limited(guest: Guest, warning: str) -> Event:
    return _of_guest(
        MessageId.STOP_LIMITED,
        Priority.WARNING,
        f"{guest.title[:1].upper()}{guest.title[1:]} may be killed before it has written "
        f"everything: {warning}.",
        guest,
    )


def asked_by_libvirt(guest: Guest, name: str) -> Event:
    return _of_guest(
        MessageId.GUEST_ASKED,
        Priority.INFO,
        f'Asked {guest.title}, libvirt\'s domain "{printable(name)}", to shut down, with virsh.',
        guest,
        QKILLD_METHOD="virsh",
    )


def libvirt_refused(guest: Guest, name: str, why: str) -> Event:
    return _of_guest(
        MessageId.ASKING_ENDED,
        Priority.NOTICE,
        f'{guest.title[:1].upper()}{guest.title[1:]}, libvirt\'s domain "{printable(name)}", '
        f"cannot be asked to shut down: {why}.",
        guest,
        QKILLD_GUEST_ASKED=GuestAsked.UNREACHABLE.value,
    )


def stop_given_up(guest: Guest, why: str) -> Event:
    return _of_guest(
        MessageId.STOP_GIVEN_UP,
        Priority.WARNING,
        f"qkilld-stop exits, and {guest.title} is still there: {why}. systemd decides what happens "
        "to the guest now.",
        guest,
    )


def stop_kept(guest: Guest, keeper: str) -> Event:
    return _of_guest(
        MessageId.STOP_KEPT,
        Priority.INFO,
        f"{guest.title[:1].upper()}{guest.title[1:]} is left to {keeper}, which is shutting it "
        "down.",
        guest,
    )


def stop_overrun(guest: Guest) -> Event:
    return _of_guest(
        MessageId.STOP_OVERRUN,
        Priority.WARNING,
        f"systemd's timeout for stopping {guest.title} expired early, because `systemctl "
        "daemon-reload` drops extensions. qkilld-stop asks for more time and continues. "
        "After another reload, the guest may get SIGKILL.",
        guest,
    )


def _of_guest(
    id: MessageId, priority: Priority, message: str, guest: Guest, **fields: str
) -> Event:
    return Event(id, priority, message, guest, {"QKILLD_GUEST": guest.label.shown_name} | fields)
