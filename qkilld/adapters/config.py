"""Reading qkilld.conf the way systemd reads its own files.

Sources: systemd-system.conf(5), "Configuration Directories and Precedence"; systemd.syntax(7). Our
own parser, for every complaint names its line and no library of Python's keeps those.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from qkilld.model import timespan
from qkilld.model.errors import ConfigError
from qkilld.model.policy import DEFAULT_EXECUTABLES, Config, Policy

DIRECTORIES: Final = ("etc/qkilld", "run/qkilld", "usr/local/lib/qkilld", "usr/lib/qkilld")
"""Highest precedence first."""
MAX_BYTES: Final = 1 << 20

_POLICY_KEYS: Final = {
    "GraceSec": "grace",
    "StallSec": "stall",
    "StorageStallSec": "storage_stall",
    "MaxSec": "max",
    "ReapSec": "reap",
    "PowerdownSec": "powerdown",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """A line of a file, for complaints."""

    path: Path
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)


@dataclass(slots=True)
class _Settings:
    """What the files say so far, and what is wrong with it."""

    policy: dict[str, int] = field(default_factory=dict)
    guests: dict[str, dict[str, int]] = field(default_factory=dict)
    executables: list[str] = field(default_factory=list)
    places: dict[tuple[str, str], _Place] = field(default_factory=dict)
    """(guest or "", field) → where it was set last."""
    wrong: list[str] = field(default_factory=list)

    def complain(self, place: _Place, text: str) -> None:
        self.wrong.append(f"{place}: {text}")


def load(root: Path = Path("/")) -> Config:
    """The configuration below `root`.

    Raises ConfigError with a line for everything that is wrong in any file.
    """
    settings = _Settings()
    for path in _files(root, settings):
        _read(path, root, settings)
    config = _build(settings)
    if settings.wrong:
        raise ConfigError("\n".join(settings.wrong))
    return config


def _files(root: Path, settings: _Settings) -> Iterator[Path]:
    """The main file of the highest directory that has one, then the drop-ins by file name."""
    directories = [root / name for name in DIRECTORIES]
    for directory in directories:
        if os.path.lexists(directory / "qkilld.conf"):
            yield directory / "qkilld.conf"
            break
    drop_ins: dict[str, Path] = {}
    for directory in directories:
        try:
            found = sorted((directory / "qkilld.conf.d").iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            settings.complain(_Place(directory / "qkilld.conf.d"), _reason(error))
            continue
        for path in found:
            if path.name.endswith(".conf") and not path.name.startswith("."):
                # Of equal names the highest directory's counts, be it only to mask the others.
                drop_ins.setdefault(path.name, path)
    for name in sorted(drop_ins):
        yield drop_ins[name]


def _read(path: Path, root: Path, settings: _Settings) -> None:
    try:
        text = _text(path, root)
    except OSError as error:
        settings.complain(_Place(path), _reason(error))
        return
    except ValueError as error:
        settings.complain(_Place(path), str(error))
        return
    section = ""
    for number, line in _logical_lines(text):
        place = _Place(path, number)
        if line.startswith("["):
            section = _section(line, place, settings)
        elif "=" not in line:
            settings.complain(place, f'"{line[:80]}" is not Key=Value, nor a [Section]')
        else:
            key, _, value = line.partition("=")
            _assign(section, key.rstrip(), value.strip(), place, settings)


def _text(path: Path, root: Path) -> str:
    """Raises OSError, and ValueError with a text for what is no configuration at all."""
    if path.is_symlink() and str(path.readlink()) == "/dev/null":
        return ""
    if path.is_symlink() and root != Path("/") and path.readlink().is_absolute():
        path = root / path.readlink().relative_to("/")
    # Not to wait for a writer where the file is a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_BYTES:
        raise ValueError("is larger than 1 MiB")
    if b"\0" in raw:
        raise ValueError("has a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8") from None


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, line), comments and blanks left out, continuations joined."""
    start, joined = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.strip()
        # A comment within a continued line is left out, and the line goes on after it.
        if bare.startswith(("#", ";")) or (not bare and not start):
            continue
        start = start or number
        if bare.endswith("\\"):
            joined += bare[:-1] + " "
            continue
        yield start, (joined + bare).strip()
        start, joined = 0, ""
    if joined.strip():
        yield start, joined.strip()


def _section(line: str, place: _Place, settings: _Settings) -> str:
    """The section's name; "X-" where all of it is to be ignored."""
    name = line[1:-1].strip()
    if not line.endswith("]"):
        settings.complain(place, f'"{line[:80]}" lacks its "]"')
    elif name in ("Policy", "Target") or name.startswith("X-"):
        return name
    elif name.startswith("Guest "):
        guest = name.removeprefix("Guest ").strip()
        settings.guests.setdefault(guest, {})
        return f"Guest {guest}"
    elif name == "Guest":
        settings.complain(place, "[Guest] lacks the guest's name: [Guest NAME]")
    else:
        settings.complain(
            place, f"unknown section [{name}]; known are [Policy], [Target], [Guest NAME]"
        )
    return "X-"


def _assign(section: str, key: str, value: str, place: _Place, settings: _Settings) -> None:
    if section.startswith("X-") or key.startswith("X-"):
        return
    if not section:
        settings.complain(place, f"{key}= stands before any [Section]")
        return
    known = ("Executables",) if section == "Target" else tuple(_POLICY_KEYS)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}=?" if near else f"known are {'= '.join(known)}="
        settings.complain(place, f"unknown key {key}= in [{section}]; {hint}")
        return
    if key == "Executables":
        _assign_executables(value, place, settings)
        return
    guest = section.removeprefix("Guest ") if section.startswith("Guest ") else ""
    spans = settings.guests[guest] if guest else settings.policy
    name = _POLICY_KEYS[key]
    if not value:
        spans.pop(name, None)
        return
    try:
        spans[name] = timespan.parse(value)
    except ValueError as error:
        settings.complain(place, f"{key}={error}")
        return
    settings.places[guest, name] = place


def _assign_executables(value: str, place: _Place, settings: _Settings) -> None:
    if not value:
        settings.executables.clear()
    for glob in value.split():
        last = PurePosixPath(glob).name
        if not glob.startswith("/"):
            settings.complain(place, f"Executables={glob} is not an absolute path")
        elif not last.strip("*?"):
            settings.complain(
                place, f"Executables={glob} matches any program; name the file, as in qemu-system-*"
            )
        elif ".." in PurePosixPath(glob).parts:
            settings.complain(place, f'Executables={glob} has a "..", which never matches')
        else:
            settings.executables.append(glob)


def _build(settings: _Settings) -> Config:
    policy = replace(Policy(), **settings.policy)
    guests = {name: replace(policy, **spans) for name, spans in settings.guests.items()}
    for guest, whole in {"": policy, **guests}.items():
        if whole.max < whole.grace and (guest == "" or settings.guests[guest]):
            place = settings.places.get((guest, "max")) or settings.places.get((guest, "grace"))
            if place is None:
                continue  # it is the general policy's, which is complained of
            settings.complain(
                place,
                f"MaxSec={timespan.format_usec(whole.max)} is less than "
                f"GraceSec={timespan.format_usec(whole.grace)}: no SIGKILL can keep both",
            )
    return Config(policy, tuple(settings.executables) or DEFAULT_EXECUTABLES, guests)


def _reason(error: OSError) -> str:
    return f"cannot be read: {os.strerror(error.errno or 0)}"
