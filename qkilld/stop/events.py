"""What the helper itself has to say in the journal; of its engine's jobs see engine.events."""

from __future__ import annotations

from qkilld.engine.events import Event, MessageId, Priority
from qkilld.model.guest import Guest


def stop_alone(guest: Guest, why: str) -> Event:
    return _of_guest(
        MessageId.STOP_ALONE,
        Priority.NOTICE,
        f"qkilld-stop stops {guest.title} by itself: {why}.",
        guest,
    )


def stop_limited(guest: Guest, warning: str) -> Event:
    return _of_guest(
        MessageId.STOP_LIMITED,
        Priority.WARNING,
        f"{guest.title[:1].upper()}{guest.title[1:]} may be ended before it has written "
        f"everything: {warning}.",
        guest,
    )


def stop_left(guest: Guest, why: str) -> Event:
    return _of_guest(
        MessageId.STOP_LEFT,
        Priority.WARNING,
        f"qkilld-stop leaves {guest.title}, which is still there: {why}. What happens to it now is "
        "up to systemd.",
        guest,
    )


def stop_overrun(guest: Guest) -> Event:
    return _of_guest(
        MessageId.STOP_OVERRUN,
        Priority.WARNING,
        f"systemd has ended the time for the stop of {guest.title} early, as `systemctl "
        "daemon-reload` makes it do. qkilld-stop asks for more and goes on; at another reload the "
        "guest may get SIGKILL.",
        guest,
    )


def _of_guest(id: MessageId, priority: Priority, message: str, guest: Guest) -> Event:
    return Event(id, priority, message, guest, {"QKILLD_GUEST": guest.label.name})
