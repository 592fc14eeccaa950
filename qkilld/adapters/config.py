"""Read qkilld.conf as systemd reads its own files.

Sources: systemd-system.conf(5), "Configuration Directories and Precedence"; systemd.syntax(7). The
parser is our own, because error messages need line numbers, which Python's libraries do not keep.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from qkilld.model import timespan
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import ConfigError
from qkilld.model.policy import DEFAULT_EXECUTABLES, SPANS, Config, Policy, Switches
from qkilld.model.text import printable

DIRECTORIES: Final = ("etc/qkilld", "run/qkilld", "usr/local/lib/qkilld", "usr/lib/qkilld")
"""Highest precedence first."""
MAX_BYTES: Final = 1 << 20

_BLANKS: Final = " \t\n\r"
_MASK: Final = Path("/dev/null")
_MAX_LINKS: Final = 40
"""The number of symbolic links that Linux follows for one path."""
_WILDCARD: Final = re.compile(r"[*?]|\[!?\]?[^\]]*\]")

_SPAN_KEYS: Final = {span.key: span.field for span in SPANS}
_SWITCH_KEYS: Final = {"Powerdown": "powerdown", "Yank": "yank"}
_POLICY_KEYS: Final = (*_SPAN_KEYS, *_SWITCH_KEYS)
_BOOLEANS: Final = {
    **dict.fromkeys(("1", "yes", "y", "true", "t", "on"), True),
    **dict.fromkeys(("0", "no", "n", "false", "f", "off"), False),
}
"""Case-insensitive, as in systemd (src/basic/parse-util.c, parse_boolean())."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A line of a file, for error messages."""

    path: Path
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)


@dataclass(slots=True)
class _Settings:
    """The settings that were read so far, and the errors in them."""

    policy: dict[str, int] = field(default_factory=dict)
    guests: dict[str, dict[str, int]] = field(default_factory=dict)
    switches: dict[str, dict[str, bool]] = field(default_factory=lambda: {"": {}})
    """The switches, by guest name; "" for [Policy]."""
    executables: list[str] = field(default_factory=list)
    places: dict[tuple[str, str], _Place] = field(default_factory=dict)
    """Where each setting was last set, by (guest, field); the guest is "" in [Policy]."""
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """The place and the text of each error message."""

    def complain(self, place: _Place, text: str) -> None:
        # File names and contents may be any text. printable() keeps the message on one line.
        self.wrong.append((printable(str(place), 4096), printable(text, 512)))


def load(root: Path = Path("/")) -> Config:
    """Return the configuration below `root`.

    Raises ConfigError with one line for each mistake in any file.
    """
    settings = _Settings()
    for path in _files(root, settings):
        _read(path, root, settings)
    config = _build(settings)
    if settings.wrong:
        text = "\n".join(f"{place}: {what}" for place, what in settings.wrong)
        raise ConfigError(text, place=settings.wrong[0][0])
    return config


def _files(root: Path, settings: _Settings) -> Iterator[Path]:
    """Yield the main file, then the drop-ins, sorted by file name. If several directories have a
    main file, take that of the directory with the highest precedence."""
    directories = [root / name for name in DIRECTORIES]
    for directory in directories:
        try:
            (_real(directory, root) / "qkilld.conf").lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            settings.complain(_Place(directory / "qkilld.conf"), _reason(error))
            break
        yield directory / "qkilld.conf"
        break
    drop_ins: dict[str, Path] = {}
    for directory in directories:
        try:
            names = [path.name for path in _real(directory / "qkilld.conf.d", root).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            settings.complain(_Place(directory / "qkilld.conf.d"), _reason(error))
            continue
        for name in names:
            if name.endswith(".conf") and not name.startswith("."):
                # Of files with the same name, take the one from the directory with the highest
                # precedence, even if it only masks the others.
                drop_ins.setdefault(name, directory / "qkilld.conf.d" / name)
    for name in sorted(drop_ins, key=os.fsencode):
        yield drop_ins[name]


def _read(path: Path, root: Path, settings: _Settings) -> None:
    try:
        raw = _content(path, root)
    except OSError as error:
        settings.complain(_Place(path), _reason(error))
        return
    except ValueError as error:
        settings.complain(_Place(path), str(error))
        return
    section = ""
    for place, line, sound in _logical_lines(raw, path, settings):
        if line.startswith("["):
            section = _section(line, place, settings) if sound else "X-"
        elif not sound:
            continue
        elif "=" not in line:
            settings.complain(place, f'"{line[:80]}" is not Key=Value, nor a [Section]')
        else:
            key, _, value = line.partition("=")
            _assign(section, key.rstrip(_BLANKS), value.strip(_BLANKS), place, settings)


def _real(path: Path, root: Path) -> Path:
    """Resolve the links in `path` as if `root` were the root directory. Return _MASK for /dev/null.

    Raises OSError; FileNotFoundError also for a dangling link.
    """
    ahead = list(reversed(path.relative_to(root).parts))
    resolved: list[str] = []
    links = 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            del resolved[-1:]
            continue
        resolved.append(part)
        if [*resolved, *reversed(ahead)] == ["dev", "null"]:
            return _MASK  # The tree below `root` may lack /dev/null.
        try:
            target = root.joinpath(*resolved).readlink()
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL means that it is not a link.
                raise
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        resolved.pop()
        if target.is_absolute():
            resolved.clear()
        ahead.extend(reversed(target.parts[target.is_absolute() :]))
    return root.joinpath(*resolved)


def _content(path: Path, root: Path) -> bytes:
    """Read a file. Raises OSError. Raises ValueError with an error message if the file is not a
    regular one or is too large."""
    real = _real(path, root)
    if real == _MASK:
        return b""
    # Do not wait for a writer if the file is a FIFO.
    descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_BYTES:
        raise ValueError("is larger than 1 MiB")
    return raw


def _logical_lines(
    raw: bytes, path: Path, settings: _Settings
) -> Iterator[tuple[_Place, str, bool]]:
    """Yield (place of the first line, joined line, whether it is text).

    Skips comments and blank lines. Reports every line that is not text. Source: systemd,
    src/shared/conf-parser.c, config_parse().
    """
    start, joined, sound = 0, "", True
    for number, line in enumerate(raw.removeprefix(BOM_UTF8).splitlines(), 1):
        bare = line.decode(errors="replace").lstrip(_BLANKS)
        if fault := _fault(line):
            settings.complain(_Place(path, number), fault)
        # A comment within a continued line is skipped, and the line continues after it.
        if bare.startswith(("#", ";")):
            continue
        start, sound = start or number, sound and not fault
        # An odd number of backslashes at the very end continues the line.
        if (len(bare) - len(bare.rstrip("\\"))) % 2:
            joined += bare[:-1] + " "
            continue
        if text := (joined + bare).strip(_BLANKS):
            yield _Place(path, start), text, sound
        start, joined, sound = 0, "", True
    if text := joined.strip(_BLANKS):
        yield _Place(path, start), text, sound


def _fault(line: bytes) -> str:
    """Return why the line is not text, or ""."""
    if b"\0" in line:
        return "has a NUL byte; write UTF-8 text"
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 from byte {error.start + 1} of the line on; write UTF-8 text"
    return ""


def _section(line: str, place: _Place, settings: _Settings) -> str:
    """Return the section's name; "X-" if the whole section is to be ignored."""
    name = line[1:-1].strip()
    if not line.endswith("]"):
        settings.complain(place, f'"{line[:80]}" lacks its "]"')
    elif name in ("Policy", "Target") or name.startswith("X-"):
        return name
    elif name.startswith("Guest "):
        guest = name.removeprefix("Guest ").strip()
        settings.guests.setdefault(guest, {})
        settings.switches.setdefault(guest, {})
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
    known = ("Executables",) if section == "Target" else _POLICY_KEYS
    if key not in known:
        import difflib  # Imported late, because a start without errors does not need it.

        near = difflib.get_close_matches(key[:80], known, 1)
        hint = f"did you mean {near[0]}=?" if near else f"known are {'= '.join(known)}="
        settings.complain(place, f"unknown key {key}= in [{section}]; {hint}")
        return
    if key == "Executables":
        _assign_executables(value, place, settings)
        return
    guest = section.removeprefix("Guest ") if section.startswith("Guest ") else ""
    if key in _SWITCH_KEYS:
        _assign_switch(settings.switches[guest], key, value, place, settings)
        return
    spans = settings.guests[guest] if guest else settings.policy
    name = _SPAN_KEYS[key]
    if not value:
        spans.pop(name, None)
        return
    try:
        spans[name] = timespan.parse(value)
    except ValueError as error:
        settings.complain(place, f"{key}={error}")
        return
    settings.places[guest, name] = place


def _assign_switch(
    switches: dict[str, bool], key: str, value: str, place: _Place, settings: _Settings
) -> None:
    name = _SWITCH_KEYS[key]
    if not value:
        switches.pop(name, None)
    elif (switch := _BOOLEANS.get(value.lower())) is None:
        settings.complain(place, f'{key}="{value[:80]}" is neither yes nor no')
    else:
        switches[name] = switch


def _assign_executables(value: str, place: _Place, settings: _Settings) -> None:
    if not value:
        settings.executables.clear()
    for glob in value.split():
        last = PurePosixPath(glob).name
        if not glob.startswith("/"):
            settings.complain(place, f"Executables={glob} is not an absolute path")
        elif glob.startswith("//"):
            settings.complain(place, f'Executables={glob} begins with "//", which never matches')
        elif not _WILDCARD.sub("", last):
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
                continue  # Both come from [Policy], for which the mistake was reported.
            settings.complain(
                place,
                f"MaxSec={timespan.format_usec(whole.max)} is less than "
                f"GraceSec={timespan.format_usec(whole.grace)}: no SIGKILL can obey both",
            )
    switches = replace(Switches(), **settings.switches[""])
    return Config(
        policy=policy,
        executables=tuple(settings.executables) or DEFAULT_EXECUTABLES,
        guests=guests,
        switches=switches,
        guest_switches={
            name: replace(switches, **own) for name, own in settings.switches.items() if name
        },
    )


def _reason(error: OSError) -> str:
    return f"cannot be read: {os.strerror(error.errno or 0)}"
