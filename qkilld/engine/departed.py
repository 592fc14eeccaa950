"""A process that was gone before anybody here could take hold of it."""

from __future__ import annotations

from collections.abc import Callable
from signal import Signals

from qkilld.model.guest import Guest, Identity, Label


class Departed:
    """Implements engine.ports.Process."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def identify(self) -> Identity:
        return self.guest.identity

    def set_label(self, label: Label) -> None:
        self.guest = Guest(self.guest.identity, label)

    def signal(self, number: Signals) -> None:
        raise ProcessLookupError

    def exited(self) -> bool:
        return True

    def collected(self) -> bool:
        return True

    def watch(self, callback: Callable[[], None]) -> None:
        """Nothing comes any more: who asks `exited` first has the answer."""

    def fileno(self) -> None:
        return None

    def close(self) -> None: ...
