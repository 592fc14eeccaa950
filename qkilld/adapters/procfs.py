"""Read /proc/PID: the identity of a process and the mounts that it sees. Sources: proc(5),
cgroups(7).

Reading status and cgroup never blocks. Reading stat and exe can block, so these reads have a short
timeout, after which Unanswered is raised (blockable.py). Reading a command line can block, too: the
kernel takes the target's memory lock, and a QEMU process that is stuck in a page fault may keep
this lock for ever. So call `read_command_line` and `read_names` in a separate thread
(target_threads.py, names.py). Reading mountinfo does not block even if the server of a file system
is gone, because the kernel makes the text without accessing a path. The mountinfo of another user's
process can be read only with the ptrace right.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from qkilld.adapters import blockable
from qkilld.adapters.cgroup_unit import systemd_uses_v2, unit_of
from qkilld.debug_log import note_once
from qkilld.model.guest import Identity, Unit
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.text import printable

PROC: Final = Path("/proc")
_MAX_CGROUP: Final = 256 << 10
_MAX_CMDLINE: Final = 256 << 10
"""The maximum number of bytes of a command line that are read. A process can make its command line
arbitrarily long."""
_MAX_WORDS: Final = 10_000
"""Parsing a command line with more words would take seconds. libvirt's longest have about 5,000."""
_CHUNK: Final = 1 << 14
MAX_MOUNTINFO: Final = 4 << 20
"""The maximum number of bytes of a mountinfo, enough for about 25,000 mounts. A longer one is not
read."""
PATIENT_S: Final = 3.0
_PF_EXITING: Final = 0x4
"""A flag in stat: include/linux/sched.h."""
_PF_FORKNOEXEC: Final = 0x40
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_UUID: Final = re.compile(r"(?a:[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12})", re.IGNORECASE)
"""The only form of a UUID that QEMU accepts (util/uuid.c)."""
_UNIT_NAME: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")


class Stat(NamedTuple):
    """A line of /proc/PID/stat, proc_pid_stat(5)."""

    comm: bytes
    """The command as the kernel shows it: any bytes except NUL."""
    state: str
    parent: int
    exiting: bool
    """The first thread is exiting. Other threads of the process may continue."""
    cpu: int
    """Clock ticks of all threads in user and kernel mode."""
    threads: int
    start_time: int
    """Clock ticks since boot."""
    exit_status: int
    """In the form of wait(2); 0 if the process has not exited, or if the kernel does not show it
    because we lack the ptrace right."""
    forked: bool = False
    """The process was forked, and has not called execve(2) since then."""

    @property
    def command(self) -> str:
        return printable(self.comm.decode("utf-8", "surrogateescape"))


class Filesystem(NamedTuple):
    """A line of mountinfo. Its strings keep the kernel's escapes."""

    pid: str
    """The process whose mountinfo has this line: a process id or "self"."""
    id: int
    parent: int
    number: str
    """MAJOR:MINOR of its files (st_dev). The major number is 0 if there is no block device."""
    root: bytes
    """Which directory of the file system is mounted."""
    point: bytes
    kind: str
    source: bytes
    options: bytes
    """The options of the file system, not those of the mount."""


class Credentials(NamedTuple):
    """The user and groups of a process, for permission checks."""

    uid: int
    """The real user id."""
    gids: frozenset[int]

    def may(self, wanted: int, status: os.stat_result) -> bool:
        """Return whether these credentials give a permission on a file. `wanted` is S_IRUSR (read)
        or S_IXUSR (execute). Ignores ACLs."""
        if self.uid == 0:
            return True
        if self.uid == status.st_uid:
            return bool(status.st_mode & wanted)
        if status.st_gid in self.gids:
            return bool(status.st_mode & (wanted >> 3))
        return bool(status.st_mode & (wanted >> 6))


def pids(proc: Path = PROC) -> list[int]:
    """Return the ids of all visible processes."""
    return sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())


def read_stat(pid: int, proc: Path = PROC) -> Stat:
    """Read stat. Raises OSError: for example, FileNotFoundError or ProcessLookupError if there is
    no process, Unanswered if the process blocks the reading."""
    return blockable.shared.one(f"{proc}/{pid}", _stat)


def read_stat_patiently(pid: int) -> Stat:
    """Like `read_stat`, but retry for PATIENT_S if the process blocks the reading, as it does for a
    moment during execve(2) on a busy host. Blocks, so the daemon must not call this."""
    until = time.monotonic() + PATIENT_S
    while True:
        try:
            return read_stat(pid)
        except blockable.Unanswered:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _stat(directory: str) -> Stat:
    """May block. Raises OSError."""
    return parse_stat(_read(f"{directory}/stat"))


def parse_stat(text: bytes) -> Stat:
    """Parse a line of stat. Raises ProcessLookupError if the text is not a whole line.

    The command is in parentheses and may contain any byte except NUL, even parentheses and line
    breaks. The other fields follow the last ")".
    """
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    try:
        return Stat(
            comm=head.partition(b"(")[2],
            state=fields[0].decode("ascii"),
            parent=int(fields[1]),
            exiting=bool(int(fields[6]) & _PF_EXITING),
            cpu=int(fields[11]) + int(fields[12]),
            threads=int(fields[17]),
            start_time=int(fields[19]),
            exit_status=int(fields[49]) if len(fields) > 49 else 0,
            forked=bool(int(fields[6]) & _PF_FORKNOEXEC),
        )
    except (ValueError, IndexError):
        raise ProcessLookupError("/proc/PID/stat is not a whole line") from None


def read_uid(pid: int, proc: Path = PROC) -> int:
    """Return the real uid. Raises OSError."""
    return _uid(f"{proc}/{pid}")


def _uid(directory: str) -> int:
    """Raises OSError."""
    _, label, rest = _read(f"{directory}/status").partition(b"\nUid:")
    if label:
        with contextlib.suppress(ValueError, IndexError):
            return int(rest.split(None, 1)[0])
    raise ProcessLookupError(f"no Uid line in {directory}/status")


def read_credentials(pid: int, proc: Path = PROC) -> Credentials:
    """Raises OSError."""
    ids: dict[bytes, list[int]] = {}
    for line in _status_lines(pid, proc):
        label, _, text = line.partition(b":")
        if label in (b"Uid", b"Gid", b"Groups"):
            ids[label] = [int(word) for word in text.split()]
    try:
        return Credentials(ids[b"Uid"][0], frozenset(ids[b"Gid"] + ids[b"Groups"]))
    except (KeyError, IndexError):
        raise ProcessLookupError(f"no credentials of {pid}") from None


MAX_PARENTS: Final = 512
"""If a process has more threads than this, its children are not read. Reading takes 3 µs for each
thread."""


def read_children(pid: int, proc: Path = PROC) -> list[int]:
    """Return the children of a process, grouped by parent thread, the oldest of each group first.
    Return [] if they are unreadable, or if the process has more than MAX_PARENTS threads."""
    try:
        tasks = os.listdir(f"{proc}/{pid}/task")  # noqa: PTH208 - half the cost
    except OSError as error:
        note_once("listing children", error)
        return []
    if len(tasks) > MAX_PARENTS:
        note_once("listing children", f"there are more than {MAX_PARENTS} threads")
        return []
    texts = [read_bounded(f"{proc}/{pid}/task/{task}/children", 4096) for task in tasks]
    return [int(word) for text in texts for word in (text or b"").split()]


def is_dying(pid: int, proc: Path = PROC) -> bool:
    """Return whether SIGKILL is pending for the process, or it is exiting already. Raises
    OSError."""
    sigkill = 1 << signal.SIGKILL - 1
    for line in _status_lines(pid, proc):
        if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & sigkill:
            return True
    return read_stat(pid, proc).exiting


def _status_lines(pid: int, proc: Path) -> list[bytes]:
    """Read the lines of status. Raises OSError.

    bytes.splitlines() would also split at a carriage return, which the kernel does not escape in
    the command.
    """
    return _read(f"{proc}/{pid}/status").split(b"\n")


def _read(path: str) -> bytes:
    """Read a file of /proc in half the time of Path.read_bytes. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = chunk = os.read(fd, _CHUNK)
        while len(chunk) == _CHUNK:  # status is long: a process may have 65,536 groups.
            chunk = os.read(fd, _CHUNK)
            text += chunk
        return text
    finally:
        os.close(fd)


def read_executable(pid: int, proc: Path = PROC) -> tuple[str, bool]:
    """Return the target of exe, and whether the target is deleted; ("", False) if there is no exe.

    Kernel threads and exiting processes have no exe. If the first thread has exited, exe of another
    thread is read. Raises OSError: for example, PermissionError if the kernel does not show exe,
    Unanswered if the process blocks the reading.
    """
    return blockable.shared.one(f"{proc}/{pid}", _executable)


def read_executables(
    pids: Iterable[int], proc: Path = PROC
) -> Iterator[tuple[int, tuple[str, bool] | Exception]]:
    """For each process, yield what `read_executable` returns or raises."""
    wanted = list(pids)
    directories = [f"{proc}/{pid}" for pid in wanted]
    return zip(wanted, blockable.shared.each(directories, _executable), strict=True)


def _executable(directory: str) -> tuple[str, bool]:
    """May block. Raises OSError. The kernel does not show a path of 4096 bytes or more."""
    path = _readlink(f"{directory}/exe")
    if path is None:
        tasks = _tasks(Path(directory))
        path = next((path for task in tasks if (path := _readlink(f"{task}/exe"))), "")
    bare = path.removesuffix(" (deleted)")
    return bare, bare != path


def read_identity(pid: int, proc: Path = PROC) -> Identity:
    """Raises what `read_stat` and `read_executable` raise."""
    return blockable.shared.one(f"{proc}/{pid}", _identity)


def read_identities(
    pids: Iterable[int], proc: Path = PROC
) -> Iterator[tuple[int, Identity | Exception]]:
    """For each process, yield what `read_identity` returns or raises."""
    wanted = list(pids)
    directories = [f"{proc}/{pid}" for pid in wanted]
    return zip(wanted, blockable.shared.each(directories, _identity), strict=True)


def _identity(directory: str) -> Identity:
    """May block. Raises OSError."""
    stat = _stat(directory)
    uid = _uid(directory)
    executable, deleted = _executable(directory)
    return Identity(
        pid=int(directory.rpartition("/")[2]),
        start_time=stat.start_time,
        uid=uid,
        command=sys.intern(stat.command),  # Most guests have the same command and executable.
        state=stat.state,
        executable=sys.intern(executable),
        executable_deleted=deleted,
        exiting=not executable and _stat(directory).exiting,
    )


def read_namespaced_pids(pid: int, proc: Path = PROC) -> tuple[int, ...]:
    """Return the ids of a process in its PID namespaces, ours first; empty if unknown."""
    try:
        lines = _status_lines(pid, proc)
    except OSError as error:
        note_once(f"reading the ids of process {pid}", error)
        return ()
    matches = [line.split()[1:] for line in lines if line.startswith(b"NSpid:")]
    return tuple(map(int, matches[0])) if matches else ()


def read_command_line(pid: int, proc: Path = PROC) -> list[str]:
    """Return the words of /proc/PID/cmdline. May block.

    Raises OSError; with E2BIG if there are more than 10,000 words or 256 KiB.
    """
    command_line = _read_command_line(pid, proc)
    if not _is_whole(command_line):
        raise OSError(errno.E2BIG, "The command line is too long")
    return _arguments(command_line)


def _read_command_line(pid: int, proc: Path) -> bytes:
    """Raises OSError."""
    with (proc / str(pid) / "cmdline").open("rb") as file:
        return file.read(_MAX_CMDLINE)


def _is_whole(command_line: bytes) -> bool:
    return len(command_line) < _MAX_CMDLINE and command_line.count(b"\0") <= _MAX_WORDS


def _arguments(command_line: bytes) -> list[str]:
    return os.fsdecode(command_line).split("\0", _MAX_WORDS)[:_MAX_WORDS]


def read_names(pid: int, proc: Path = PROC) -> tuple[str | None, str, bool, bool]:
    """Return the guest's name and UUID, whether it may have a QMP monitor, and whether it may have
    storage on a network. A missing name or UUID is "", and an unknown name is None. May block
    forever."""
    try:
        command_line = _read_command_line(pid, proc)
    except OSError as error:
        note_once(f"reading the command line of process {pid}", error)
        return None, "", False, True
    argv = _arguments(command_line)
    # Imported late, because its import of JSON takes 3 ms. qkilld-stop must start fast, and rarely
    # needs a name.
    from qkilld.adapters import qemu_args

    name, uuid_text = qemu_args.name_and_uuid(argv)
    # Only a complete command line proves that the guest has no name. The command line of an exiting
    # process is empty.
    is_whole = bool(command_line) and _is_whole(command_line)
    label = printable(name) if name or is_whole else None
    is_remote = not is_whole or qemu_args.names_network_storage(argv)
    return label, _canonical_uuid(uuid_text), qemu_args.has_qmp(argv), is_remote


def read_unit(pid: int, proc: Path = PROC) -> Unit | None:
    """Return the systemd unit of a process. None means unknown: the process or process 1 is hidden
    (ProtectProc=, hidepid=) or gone, or it is unknown which cgroup hierarchy systemd uses.

    Users choose the names of cgroups below user@UID.service. A name that no unit can have becomes
    "?".
    """
    own, init = (read_bounded(f"{proc}/{one}/cgroup", _MAX_CGROUP) for one in (pid, 1))
    if own is None or init is None:
        return None
    cgroups, roots = (text.decode("utf-8", "surrogateescape") for text in (own, init))
    unit = unit_of(cgroups, roots, lambda: _systemd_uses_v2(proc))
    if unit is None:
        note_once("looking for units", "it is not known which cgroup hierarchy systemd uses")
        return None
    names = (unit.system, unit.user)
    return Unit(*(name if not name or _UNIT_NAME.fullmatch(name) else "?" for name in names))


def read_bounded(path: str, limit: int) -> bytes | None:
    """Read a file of /proc or /sys; None if it is unreadable or longer than `limit` bytes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        note_once(f"reading {path}", error)
        return None
    try:
        chunks = []
        remaining = limit + 1
        while remaining > 0 and (chunk := os.read(fd, min(remaining, 1 << 16))):
            chunks.append(chunk)
            remaining -= len(chunk)
    except OSError as error:
        note_once(f"reading {path}", error)
        return None
    finally:
        os.close(fd)
    if remaining <= 0:
        note_once(f"reading {path}", f"it is longer than {limit} bytes")
    return b"".join(chunks) if remaining > 0 else None


class Mounts:
    """The mounts that one process sees at one moment."""

    def __init__(self, pid: int | str, proc: Path = PROC, max_bytes: int = MAX_MOUNTINFO) -> None:
        """Read mountinfo. If mountinfo cannot be read, or is longer than `max_bytes`, this object
        has no mounts."""
        self._pid = str(pid)
        self._lines: dict[bytes, bytes] = {}
        # Not splitlines(): a path may contain any line separator except a line feed.
        for line in (read_bounded(f"{proc}/{pid}/mountinfo", max_bytes) or b"").split(b"\n"):
            if line:
                self._lines[line.partition(b" ")[0]] = line

    def get(self, mount: int) -> Filesystem | None:
        """Return a file system by the id of its mount."""
        line = self._lines.get(b"%d" % mount)
        return None if line is None else parse_mount(line, self._pid)

    def every(self) -> list[Filesystem]:
        """Return all file systems, roughly in the order in which they were mounted."""
        parsed = (parse_mount(line, self._pid) for line in self._lines.values())
        return [filesystem for filesystem in parsed if filesystem is not None]

    def of_path(self, path: bytes) -> Filesystem | None:
        """Return the file system that holds this absolute path, without access to the path."""
        way = self.way_to(path)
        return way[-1] if way else None

    def way_to(self, path: bytes) -> list[Filesystem]:
        """Return the file systems on the way to this absolute path. The last one contains the path.

        Follows mounts as the kernel does when it walks a path, so a mount that is covered by a
        later one is ignored. Does not follow symbolic links, because paths from the kernel have
        none.
        """
        every = self.every()
        ids = {filesystem.id for filesystem in every}
        children: dict[int, list[Filesystem]] = {}
        here = None
        for filesystem in every:
            if filesystem.parent in ids and filesystem.parent != filesystem.id:
                children.setdefault(filesystem.parent, []).append(filesystem)
            elif filesystem.point == b"/":
                here = filesystem
        if not path.startswith(b"/") or here is None:
            return []
        way = [here]
        for _ in every:
            over = [
                child
                for child in children.get(here.id, ())
                if (point := unescape(child.point)) == b"/"
                or path == point
                or path.startswith(point + b"/")
            ]
            if not over:
                break
            here = min(over, key=lambda child: len(child.point))
            way.append(here)
        return way


def unescape(text: bytes) -> bytes:
    """Replace the kernel's escapes (\\040 is a space)."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), text)


def parse_mount(line: bytes, pid: str) -> Filesystem | None:
    """Parse a line of the mountinfo of `pid`; None if it is not such a line."""
    before, dash, after = line.partition(b" - ")
    fields, last = before.split(b" "), after.split(b" ")
    if not dash or len(fields) < 6 or len(last) < 3:
        return None
    try:
        return Filesystem(
            pid=pid,
            id=int(fields[0]),
            parent=int(fields[1]),
            number=sys.intern(fields[2].decode("ascii")),
            root=fields[3],
            point=fields[4],
            kind=sys.intern(last[0].decode("utf-8", "replace")),
            source=last[1],
            options=last[2],
        )
    except ValueError:
        return None


def read_links(fd_directory: int, most: int) -> list[tuple[str, str]] | None:
    """Return the number and the link of each descriptor of a process. `fd_directory`: a descriptor
    of /proc/PID/fd. Return None if there are more than `most` descriptors. A link that is too long
    is "". Raises OSError."""
    with os.scandir(fd_directory) as entries:
        names = [entry.name for entry in itertools.islice(entries, most + 1)]
    if len(names) > most:
        return None
    links = []
    for name in names:
        try:
            links.append((name, os.readlink(name, dir_fd=fd_directory)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # Closed meanwhile.
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            links.append((name, ""))
    return links


def _readlink(path: str) -> str | None:
    """Read a link; None if it does not exist, or is too long for the kernel to show it. Raises
    OSError."""
    try:
        return os.readlink(path)  # noqa: PTH115 - a third of the time
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise


def _tasks(own: Path) -> list[Path]:
    """Return the threads of a process; [] if it is gone. Raises OSError."""
    try:
        return list((own / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


@functools.lru_cache(maxsize=4)
def _systemd_uses_v2(proc: Path) -> bool | None:
    """Return whether systemd uses v2. Reads mountinfo, because Python has no statfs(2)."""
    mounts = Mounts("self", proc)

    def kind_at(path: str) -> str:
        mount = mounts.of_path(os.fsencode(path))
        return mount.kind if mount is not None else ""

    return systemd_uses_v2(kind_at)


def _canonical_uuid(text: str) -> str:
    return text.lower() if _UUID.fullmatch(text) else ""
