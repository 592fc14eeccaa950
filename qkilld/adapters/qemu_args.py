"""What a QEMU's command line says of the guest. Source: qemu-options.hx of QEMU 2.0 to 10.0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# fmt: off
_NO_ARGUMENT: Final = frozenset({
    "h", "help", "version", "S", "s", "snapshot", "usb", "nographic", "portrait", "full-screen",
    "win2k-hack", "no-fd-bootchk", "no-acpi", "no-hpet", "singlestep", "one-insn-per-tb",
    "preconfig", "daemonize", "enable-kvm", "no-kvm", "no-reboot", "no-shutdown", "nodefaults",
    "no-user-config", "nodefconfig", "old-param", "semihosting", "mem-prealloc",
    "only-migratable", "xen-attach", "xen-create", "xen-domid-restrict", "enable-sync-profile",
    "enable-fips", "enable-hax", "audio-help", "sdl", "curses", "no-frame", "alt-grab",
    "ctrl-grab", "no-quit", "show-cursor", "tdf", "localtime"
})
# fmt: on


def name_and_uuid(argv: Sequence[str]) -> tuple[str, str]:
    """The values of -name and -uuid, "" where not given; the last one counts, as in QEMU."""
    name = uuid = ""
    index = 1
    while index < len(argv):
        word = argv[index]
        option = word[1:].removeprefix("-")
        index += 1
        if not word.startswith("-") or option in _NO_ARGUMENT:
            continue
        value = argv[index] if index < len(argv) else ""
        index += 1
        if option == "name":
            name = _suboption(value, "guest")
        elif option == "uuid":
            uuid = value
    return name, uuid


def _suboption(value: str, key: str) -> str:
    """The value of `key` in a QemuOpts string, where the first part may leave the key out.

    Parts are divided by commas; a doubled comma is a comma.
    """
    found = ""
    for number, part in enumerate(value.replace(",,", "\0").split(",")):
        left, equals, right = part.replace("\0", ",").partition("=")
        if equals and left == key:
            found = right
        elif not equals and number == 0:
            found = left
    return found
