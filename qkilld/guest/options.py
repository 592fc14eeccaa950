"""The file of a guest: one option of QEMU a line. Pure.

    # A comment; blank lines do not count either.
    /usr/bin/qemu-system-aarch64
    -m 2G
    -drive file=disk one.qcow2,if=virtio

A line is an option and, after blanks, its value up to the end of the line: no quotes, no variables,
no line that goes on. An absolute path in place of an option is the QEMU to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qkilld.model.errors import ConfigError
from qkilld.model.text import printable

_DISPLAYS: Final = frozenset({"display", "nographic", "vnc", "spice", "curses", "sdl"})
_NOT_OURS: Final = {
    "daemonize": "systemd keeps the process",
    "pidfile": "systemd knows the process",
    "S": "nobody would start its processor",
    "preconfig": "nobody would configure it",
}
"""Options that a unit cannot do with, and why."""


@dataclass(frozen=True, slots=True)
class GuestFile:
    program: str
    """"" where the file names none."""
    lines: tuple[tuple[str, ...], ...]
    """An option and, where it has one, its value."""

    def has(self, *options: str) -> bool:
        return any(line[0].lstrip("-") in options for line in self.lines)


def parse(text: str, path: str) -> GuestFile:
    """`path`: for complaints. Raises ConfigError with a line for everything that is wrong."""
    program, lines, wrong = "", [], []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        option = words[0].lstrip("-")
        complaint = ""
        if "\0" in line:
            complaint = "it has a NUL byte"
        elif words[0].startswith("/"):
            if program:
                complaint = "a QEMU is named already"
            program = line.strip()
        elif not words[0].startswith("-") or not option:
            complaint = (
                f'"{printable(words[0], 80)}" is no option: each line begins with one of QEMU\'s, '
                "with its dash"
            )
        elif option in _NOT_OURS:
            complaint = f"leave -{option} out: {_NOT_OURS[option]}"
        else:
            lines.append((words[0], *(value.rstrip() for value in words[1:])))
        if complaint:
            wrong.append(f"{printable(path, 4096)}:{number}: {complaint}")
    if not lines and not wrong:
        wrong.append(f"{printable(path, 4096)}: there is no option in it")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return GuestFile(program, tuple(lines))


def command(file: GuestFile, *, name: str, machine: str, qmp: str) -> list[str]:
    """QEMU's argv. `machine`: as uname(2) has it; `qmp`: the path of the socket to be made.

    What the file says comes last and stands: only what it leaves open is added.
    """
    argv = [file.program or f"/usr/bin/qemu-system-{_ARCHITECTURES.get(machine, machine)}"]
    if not file.has("name"):
        argv += ["-name", f"guest={_escaped(name)}"]
    if not file.has(*_DISPLAYS):
        # Without it QEMU would open a window, or a VNC server where it cannot.
        argv += ["-display", "none"]
    argv += ["-qmp", f"unix:{_escaped(qmp)},server=on,wait=off"]
    return argv + [word for line in file.lines for word in line]


_ARCHITECTURES: Final = {
    "i486": "i386",
    "i586": "i386",
    "i686": "i386",
    "armv7l": "arm",
    "ppc64le": "ppc64",
}
"""Of uname(2) → of QEMU, where they are not the same."""


def _escaped(value: str) -> str:
    """For a list of QEMU's, which a comma ends an entry of."""
    return value.replace(",", ",,")
