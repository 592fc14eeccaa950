"""Parse a guest's file: one QEMU option on each line. Pure.

    # A comment. Blank lines are ignored, too.
    /usr/bin/qemu-system-aarch64
    -m 2G
    -drive file=disk one.qcow2,if=virtio

Each line has an option and, after blanks, its value, which ends at the end of the line. There are
no quotes, variables or continuation lines. An absolute path in place of an option is the QEMU
program to run.
"""

from __future__ import annotations

import re
from typing import Final

from qkilld.model.dataclass import dataclass
from qkilld.model.errors import ConfigError
from qkilld.model.text import printable

_DISPLAYS: Final = frozenset({"display", "nographic", "vnc", "spice", "curses", "sdl"})
_AGENT_PORT: Final = "org.qemu.guest_agent.0"
_PC_PROGRAMS: Final = ("qemu-system-x86_64", "qemu-system-i386", "qemu-kvm", "kvm")
"""QEMU programs whose default machine is a PC."""
_WITH_VIRTIO_SERIAL: Final = r"(?:pc|q35|virt|pseries|s390-ccw-virtio)(?:-.*)?"
"""Machines with a bus for a virtio-serial device. Other machines, such as microvm, have no such
bus."""
_NOT_OURS: Final = {
    "daemonize": "QEMU must stay in the foreground",
    "pidfile": "systemd knows the process",
    "S": "nobody would start the guest's processor",
    "preconfig": "nobody would configure the guest",
}
"""QEMU options that do not work in a unit, and why."""


@dataclass(frozen=True, slots=True)
class GuestFile:
    program: str
    """The path; "" if the file has none."""
    lines: tuple[tuple[str, ...], ...]
    """The options, each with its value if it has one."""

    def has(self, *options: str) -> bool:
        return any(line[0].lstrip("-") in options for line in self.lines)


def parse(text: str, path: str) -> GuestFile:
    """Parse a guest's file. `path` is for messages. Raises ConfigError with a line for each
    mistake."""
    program, lines, wrong = "", [], []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        option = words[0].lstrip("-")
        complaint = ""
        if "\0" in line:
            complaint = "the line has a NUL byte"
        elif words[0].startswith("/"):
            if program:
                complaint = "the file names a QEMU program twice"
            program = line.strip()
        elif not words[0].startswith("-") or not option:
            complaint = (
                f'"{printable(words[0], 80)}" is not an option: each line begins with an option of '
                "QEMU, with its dash"
            )
        elif option in _NOT_OURS:
            complaint = f"leave -{option} out: {_NOT_OURS[option]}"
        else:
            lines.append((words[0], *(value.rstrip() for value in words[1:])))
        if complaint:
            wrong.append(f"{printable(path, 4096)}:{number}: {complaint}")
    if not lines and not wrong:
        wrong.append(f"{printable(path, 4096)}: the file has no options")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return GuestFile(program, tuple(lines))


def command(file: GuestFile, *, name: str, machine: str, qmp: str, agent: str) -> list[str]:
    """Return QEMU's argv.

    `machine` is the architecture from uname(2). `qmp` and `agent` are the paths of sockets that
    QEMU creates. A QMP monitor is always added. A name is added only if the file has none, and
    `-display none` only if the file has no display option.
    """
    argv = [file.program or f"/usr/bin/qemu-system-{_ARCHITECTURES.get(machine, machine)}"]
    if not file.has("name"):
        argv += ["-name", f"guest={_escaped(name)}"]
    if not file.has(*_DISPLAYS):
        # Without -display, QEMU would open a window or start a VNC server.
        argv += ["-display", "none"]
    argv += ["-qmp", f"unix:{_escaped(qmp)},server=on,wait=off"]
    argv += [word for line in file.lines for word in line]
    # Add the port last, so that no device of the guest moves to another slot.
    return argv + (_agent_port(agent) if _takes_agent_port(file, argv[0]) else [])


def _agent_port(path: str) -> list[str]:
    socket = f"socket,id=qkilld-agent,path={_escaped(path)},server=on,wait=off"
    port = f"virtserialport,bus=qkilld-serial.0,chardev=qkilld-agent,name={_AGENT_PORT}"
    return ["-chardev", socket, "-device", "virtio-serial,id=qkilld-serial", "-device", port]


def _takes_agent_port(file: GuestFile, program: str) -> bool:
    """Return whether to add a port for the agent. Add one if the machine can have one and the file
    has none. Do not add one to a guest that is restored from a saved state (loadvm): it needs the
    devices with which it was saved."""
    if file.has("readconfig", "loadvm", "incoming"):
        return False
    values = [line[1] for line in file.lines if len(line) > 1]
    if any(_AGENT_PORT in value for value in values):
        return False
    kinds = [
        line[1].partition(",")[0].removeprefix("type=")
        for line in file.lines
        if len(line) > 1 and line[0].lstrip("-") in ("machine", "M")
    ]
    kind_names = [kind for kind in kinds if "=" not in kind]
    if not kind_names:
        return program.rpartition("/")[2] in _PC_PROGRAMS
    return re.fullmatch(_WITH_VIRTIO_SERIAL, kind_names[-1]) is not None


_ARCHITECTURES: Final = {
    "i486": "i386",
    "i586": "i386",
    "i686": "i386",
    "armv7l": "arm",
    "ppc64le": "ppc64",
}
"""The architectures to which QEMU gives another name than uname(2)."""


def _escaped(value: str) -> str:
    """Escape a value for QEMU's option lists, in which a comma ends an entry."""
    return value.replace(",", ",,")
