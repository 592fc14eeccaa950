"""Parse QEMU's command line and -readconfig files as QEMU does.

Pure: nothing here opens a file. All input may be hostile, and callers must verify what it claims.
Sources: qemu-options.hx of QEMU 2.0 to 10.0, util/qemu-option.c, util/keyval.c, chardev/char.c
(qemu_chr_parse_compat), util/qemu-config.c.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from qkilld.model.dataclass import dataclass
from qkilld.model.json_text import MAX_DEPTH, decode_json

# fmt: off
NO_ARGUMENT: Final = frozenset({
    "h", "help", "version", "S", "s", "snapshot", "usb", "nographic", "portrait", "full-screen",
    "win2k-hack", "no-fd-bootchk", "no-acpi", "no-hpet", "singlestep", "one-insn-per-tb",
    "preconfig", "daemonize", "enable-kvm", "no-kvm", "no-kvm-irqchip", "no-kvm-pit",
    "no-kvm-pit-reinjection", "no-reboot", "no-shutdown", "nodefaults", "no-user-config",
    "nodefconfig", "old-param", "semihosting", "mem-prealloc", "only-migratable", "xen-attach",
    "xen-create", "xen-domid-restrict", "enable-sync-profile", "enable-fips", "enable-hax",
    "audio-help", "sdl", "curses", "no-frame", "alt-grab", "ctrl-grab", "no-quit", "show-cursor",
    "tdf", "rtc-td-hack", "localtime", "perfmap", "jitdump", "async-teardown",
})
"""The options that take no argument; all others take one."""

_IMPLIED: Final = {
    "accel": "accel", "audio": "driver", "audiodev": "driver", "blockdev": "driver",
    "chardev": "backend", "device": "driver", "display": "type", "export": "type",
    "fsdev": "fsdriver",
    "fw_cfg": "name", "M": "type", "m": "size", "machine": "type", "mon": "chardev",
    "name": "guest", "net": "type", "netdev": "type", "numa": "type", "object": "qom-type",
    "sandbox": "enable", "smp": "cpus", "tpmdev": "type", "virtfs": "fsdriver", "vnc": "vnc",
}
"""For each option, the key that QEMU assumes if the first part of the argument has no key."""
_JSON: Final = frozenset({"audiodev", "blockdev", "chardev", "device", "display", "export",
                          "netdev", "object"})
"""The options that also take a JSON object."""
_CHARDEV: Final = frozenset({"monitor", "qmp", "qmp-pretty", "serial", "parallel", "debugcon",
                             "gdb"})
"""The options that take a character device in its old form: unix:PATH,server=on."""
_FILE: Final = frozenset({"hda", "hdb", "hdc", "hdd", "fda", "fdb", "cdrom", "mtdblock", "sd",
                          "pflash"})
"""The options that take the name of an image."""
NETWORK_DRIVERS: Final = frozenset({"nbd", "iscsi", "ssh", "http", "https", "ftp", "ftps",
                                    "gluster", "nfs", "rbd", "sheepdog", "vxhs"})
"""The block drivers that reach their storage through a connection."""
# fmt: on
MAX_KEY: Final = 1024
"""The longest key (characters) in key=value form. QEMU's keys have fewer than 100. A longer key
would make the keys of all elements below it at least as long."""
MAX_KEYS: Final = 64 << 10
"""See QemuOption.flat (characters)."""

# A string without a closing quote matches up to the end of the text. Otherwise, the search would
# start again after each quote, and take quadratic time.
_STRINGS: Final = re.compile(r"'((?:[^'\\]++|\\.)*+)'?|\"(?:[^\"\\]++|\\.)*+\"?", re.DOTALL)
_INET: Final = re.compile(r"(tcp|telnet|tn3270|websocket|udp):(\[[^\]]*\]|[^:,]*):([^,@]*)")
_SECTION: Final = re.compile(r'\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]')
NETWORK_IMAGE: Final = re.compile(rf"({'|'.join(sorted(NETWORK_DRIVERS))})(\+\w+)?:")
_ENTRY: Final = re.compile(r'(\S+)\s+=\s*"([^"]*)".*')


@dataclass(frozen=True)
class QemuOption:
    """One option of a command line, or one section of a -readconfig file in the same form."""

    name: str
    """The option's name without dashes. A word that is neither an option nor its argument is an
    image, as in QEMU, and gets the name `hda`."""
    text: str
    """The argument as given; "" if the option takes none."""

    @cached_property
    def properties(self) -> Mapping[str, Any]:
        """The argument's keys and values; empty if it has none (`-kernel FILE`).

        In the form key=value, all values are strings, and keys keep their dots ("file.driver"). A
        key without a value gets "on" or, with the prefix "no", "off". If a key is repeated, its
        last value counts. An argument in JSON becomes a nested object.
        """
        if self.name in _FILE:
            return MappingProxyType({"file": self.text})
        if self.name in _CHARDEV:
            return MappingProxyType(parse_legacy_chardev(self.text))
        if self.name in _JSON and self.text.lstrip().startswith("{"):
            return MappingProxyType(_parse_json_object(self.text))
        return MappingProxyType(parse_key_values(self.text, _IMPLIED.get(self.name)))

    @cached_property
    def flat(self) -> Mapping[str, str]:
        """The properties in key=value form, also those from JSON. A nested key becomes, for
        example, "file.path".

        Booleans become "on" and "off". The key of a list's element is its index. Keys longer than
        MAX_KEY or deeper than MAX_DEPTH are left out. Each key repeats the keys above it, so all
        keys together can be much longer than the text. So their total length is limited, and
        further keys are left out.
        """
        values: dict[str, str] = {}
        room = MAX_KEYS + 4 * len(self.text)
        pending: list[tuple[str, Any]] = [("", dict(self.properties))]
        while pending:
            path, value = pending.pop()
            if len(path) > MAX_KEY or path.count(".") >= MAX_DEPTH:
                continue
            if isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    inner = f"{path}.{key}" if path else str(key)
                    if (room := room - len(inner)) < 0:
                        return MappingProxyType(values)
                    pending.append((inner, item))
            elif isinstance(value, bool):
                values[path] = "on" if value else "off"
            else:
                values[path] = "" if value is None else str(value)
        return MappingProxyType(values)


def parse_command_line(argv: Sequence[str]) -> list[QemuOption]:
    """Return the options of a command line in order. `argv[0]` is the program."""
    options = []
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            if word:
                options.append(QemuOption("hda", word))
            continue
        name = word[1:].removeprefix("-")
        options.append(QemuOption(name, "" if name in NO_ARGUMENT else next(words, "")))
    return options


def parse_config(text: str) -> list[QemuOption]:
    """Return the sections of a -readconfig file as options, in order.

    The quoted name of a section becomes its `id`. Lines that QEMU would refuse are skipped.
    """
    sections: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        line = line.strip()
        if section := _SECTION.fullmatch(line):
            parts = [] if section[2] is None else [f"id={_doubled(section[2])}"]
            sections.append((section[1], parts))
        elif sections and (entry := _ENTRY.fullmatch(line)):
            sections[-1][1].append(f"{entry[1]}={_doubled(entry[2])}")
    return [QemuOption(name, ",".join(parts)) for name, parts in sections]


def parse_key_values(text: str, implied: str | None = None) -> dict[str, str]:
    """Parse a QemuOpts string into keys and values; see QemuOption.properties.

    `implied` is the key to assume if the first part has no key. A doubled comma stands for a comma.
    """
    values = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            values[key] = value
        elif number == 0 and implied is not None:
            values[implied] = key
        elif key.startswith("no"):
            values[key[2:]] = "off"
        elif key:
            values[key] = "on"
    return values


def parse_legacy_chardev(text: str) -> dict[str, str]:
    """Parse the argument of -qmp, -monitor or -serial into the properties of a -chardev.

    "unix:PATH,server=on" is {"backend": "socket", "path": PATH, "server": "on"}. "chardev:ID" is
    {"chardev": ID}. A text without an address or file is the name of the backend.
    """
    text = text.removeprefix("mon:")
    kind, colon, rest = text.partition(":")
    if not colon:
        return parse_key_values(text, "backend")
    if kind == "chardev":
        return {"chardev": rest}
    if kind == "unix":
        return {"backend": "socket", **parse_key_values(rest, "path")}
    if kind in ("file", "pipe", "pty"):
        return {"backend": kind, "path": rest}
    if inet := _INET.match(text):
        backend = "udp" if kind == "udp" else "socket"
        options = text[inet.end() :].partition(",")[2]
        return {
            "backend": backend,
            "host": inet[2].strip("[]"),
            "port": inet[3],
            **parse_key_values(options),
        }
    return {"backend": kind}


def name_and_uuid(argv: Sequence[str]) -> tuple[str, str]:
    """Return the values of -name and -uuid, "" if not given. As in QEMU, the last one counts."""
    name = uuid = ""
    for option in parse_command_line(argv):
        if option.name == "name":
            name = option.properties.get("guest", "")
        elif option.name == "uuid":
            uuid = option.text
    return name, uuid


def monitor_protocol(option: QemuOption) -> str:
    """Return the protocol of the monitor that this option makes, "qmp" or "hmp"; "" if it makes no
    monitor.

    QEMU 11.1 has objects for monitors, and libvirt 12.8 uses them.
    """
    match option.name, option.flat.get("qom-type"):
        case ("qmp" | "qmp-pretty", _) | ("object", "monitor-qmp"):
            return "qmp"
        case ("monitor", _) | ("object", "monitor-hmp"):
            return "hmp"
        case ("mon", _):
            return "qmp" if option.flat.get("mode") == "control" else "hmp"
    return ""


def has_qmp(argv: Sequence[str]) -> bool:
    """Return whether QEMU has a QMP monitor, or may have one from a -readconfig file.

    Return False for a guest of libvirt: libvirt stays connected to the monitor, and QEMU serves one
    client at a time.
    """
    found = False
    for option in parse_command_line(argv):
        if option.name == "chardev" and _is_libvirts_monitor(option.flat):
            return False
        found = found or option.name == "readconfig" or monitor_protocol(option) == "qmp"
    return found


def _is_libvirts_monitor(chardev: Mapping[str, str]) -> bool:
    """Return whether libvirt made this character device for its monitor. libvirt passes a listening
    socket, and chooses this id (src/qemu/qemu_command.c of libvirt)."""
    return chardev.get("id") == "charmonitor" and "fd" in chardev


def names_network_storage(argv: Sequence[str]) -> bool:
    """Return whether the command line names storage on a network, or a -readconfig file may name
    some."""
    for option in parse_command_line(argv):
        if option.name == "readconfig":
            return True
        if option.name in _FILE or option.name in ("drive", "blockdev"):
            for value in option.flat.values():
                if value in NETWORK_DRIVERS or NETWORK_IMAGE.match(value):
                    return True
                if value.startswith("json:"):
                    return True
    return False


def _parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; empty if the text is not one. Like QEMU, accept strings in single
    quotes, too."""
    try:
        value = decode_json(_STRINGS.sub(_requoted, text))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _requoted(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    return '"' + match[1].replace(r"\'", "'").replace('"', r"\"") + '"'


def _doubled(value: str) -> str:
    return value.replace(",", ",,")
