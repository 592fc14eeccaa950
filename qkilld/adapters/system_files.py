"""The system files that qkilld needs as a service, and that pip and pipx do not install."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_UNITS: Final = ("etc/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system")
_DBUS: Final = ("etc/dbus-1", "usr/local/share/dbus-1", "usr/share/dbus-1")
_FILES: Final = (
    ("the policy of the bus", "system.d/org.qkilld1.conf", _DBUS),
    ("its unit", "qkilld.service", _UNITS),
    ("its start by the bus", "system-services/org.qkilld1.service", _DBUS),
    (
        "the polkit action",
        "polkit-1/actions/org.qkilld1.policy",
        ("etc", "usr/local/share", "usr/share"),
    ),
)
_DOCUMENTATION: Final = Path(__file__).parents[1] / "documentation"
"""This directory exists only in a wheel. Packages of distributions and `make install` install man
pages instead."""


def find_missing(root: Path) -> list[str]:
    """Return each missing file, with the place where it should be."""
    return [
        f"{what} ({root / directories[-1] / name})"
        for what, name, directories in _FILES
        if not any((root / directory / name).is_file() for directory in directories)
    ]


def advice(root: Path) -> str:
    """Return advice on missing files; "" if there are none."""
    if not (lacking := find_missing(root)):
        return ""
    manual = str(_DOCUMENTATION) if _DOCUMENTATION.is_dir() else "qkilld(8)"
    return (
        f"These system files are missing: {', '.join(lacking)}. pip and pipx do not install them,"
        " and neither does qkilld: install a package of your distribution, or run"
        f" `make install` in the sources. qkillctl and `qkilld --user` work without them."
        f" Documentation: {manual}"
    )
