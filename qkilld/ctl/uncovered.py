"""Find uncovered guests: QEMU processes on this host that qkilld ignores, because they do not match
Executables=."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from qkilld.adapters import procfs
from qkilld.ctl.output import Output, user_name
from qkilld.ctl.process_stats import process_stats
from qkilld.ctl.targets import GuestRow
from qkilld.debug_log import ignore
from qkilld.model.policy import is_qemu
from qkilld.model.text import printable
from qkilld.unitcheck.comparison import coverage_line
from qkilld.unitcheck.context import looks_like_qemu

_SHOWN: Final = 1000


class UncoveredGuests:
    """The uncovered guests that the caller can see: root can see all, and other users their own."""

    def __init__(self, executables: Sequence[str]) -> None:
        self._executables = executables
        self._guests: dict[GuestRow, str] = {}
        """The executable of each guest."""
        for pid in procfs.pids():
            with ignore(f"looking at process {pid}", OSError):
                path = procfs.read_executable(pid)[0]
                if looks_like_qemu(path) and not is_qemu(path, executables):
                    # Names are not read, because reading a command line may block forever.
                    unit = procfs.read_unit(pid)
                    row = GuestRow(pid, "", "", procfs.read_uid(pid), unit.name if unit else "")
                    self._guests[row] = path

    def as_json(self) -> list[dict[str, Any]]:
        return [
            row._asdict()
            | {"user": user_name(row.uid)}
            | process_stats(row.pid, row.uid).as_json()
            | {"covered": False, "executable": path, "line": self._line([path])}
            for row, path in self._guests.items()
        ]

    def show(self, output: Output) -> None:
        if not self._guests:
            return
        output.line("Executables= does not cover these guests, so qkilld ignores them:")
        output.table(
            ("PID", "USER", "UNIT", "EXECUTABLE"),
            [
                (str(row.pid), user_name(row.uid), row.unit, path)
                for row, path in self._guests.items()
            ],
        )
        output.line("If only root can write to them, add to [Target] of /etc/qkilld/qkilld.conf:")
        places = dict.fromkeys(self._guests.values())
        output.line(f"  {printable(self._line(list(places)), _SHOWN)}")

    def _line(self, places: Sequence[str]) -> str:
        return coverage_line((*self._executables, *places[:-1]), places[-1])
