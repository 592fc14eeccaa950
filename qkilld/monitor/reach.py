"""Connect to a process's monitor, and prove that the monitor belongs to that process.

The path of the monitor comes from QEMU's command line, so QEMU's owner could name the path of
any socket. connect(2) alone can start a service, or occupy another guest's monitor. So before
connect(2), the kernel must confirm that the process's own socket is bound to the file at this path.
If the kernel does not show this, the file must belong to the process's user. After connect(2),
before any byte is sent, SO_PEERCRED must show that the process is the peer.

Sources: unix(7), proc_pid_net(5), sock_diag(7). SO_PEERCRED returns QEMU's pid even after
-daemonize, and even if QEMU's parent called listen(2) on the socket and passed it with fd=
(measured).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from qkilld.adapters import procfs
from qkilld.adapters.qemu_args import QemuOption, parse_command_line, parse_config
from qkilld.adapters.target_files import MAX_CONFIG, MAX_CONFIGS, open_path, read_config
from qkilld.adapters.target_threads import AllThreadsBlocked, shared
from qkilld.adapters.unix_table import UnixRow, parse_unix_row
from qkilld.debug_log import ignore
from qkilld.foreign_descriptors import take_over
from qkilld.model.errors import MonitorBusy, MonitorError, MonitorTimeout, MonitorUnreachable
from qkilld.model.guest import Identity
from qkilld.monitor.endpoints import (
    Endpoint,
    Role,
    TcpListener,
    UnixListener,
    endpoint_of_peer,
    find_endpoints,
    may_use_tcp,
)
from qkilld.monitor.tcp import (
    ACCEPT_S,
    CONNECT_S,
    connect_in_netns,
    ends_in,
    needs_netns,
    peer_address,
    peer_of,
    read_tcp_listeners,
    socket_descriptors,
)

if TYPE_CHECKING:
    from qkilld.engine.ports import Process

REACH_TIMEOUT_S: Final = 1.0
"""Timeout of access to files: a path may lead to a file server that does not answer."""
START_S: Final = 5.0
"""If QEMU has run for less than this time, it might not listen on its monitor yet."""
MAX_TABLE: Final = 64 << 20
"""A /proc/PID/net/unix that is longer than this (about 600,000 sockets) counts as unreadable. Any
user can create many sockets."""

ListenerTable = Callable[[], Mapping[tuple[int, int], int] | None]
"""A function like evidence.sockdiag.listening_unix."""

T = TypeVar("T")


async def read_process(
    identity: Identity, proc: Path = procfs.PROC
) -> tuple[list[QemuOption], list[UnixListener], list[TcpListener]]:
    """Read the options that a QEMU was started with, and the sockets that it listens on, for
    find_endpoints.

    Raises MonitorUnreachable if they are unreadable, and MonitorTimeout if reading takes too long
    or earlier reads still block.
    """
    work = _run(identity, lambda: read_process_blocking(identity, proc))
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            return await work
    except TimeoutError:
        raise MonitorTimeout("The guest's command line and sockets were not read in time") from None
    except OSError as error:
        raise MonitorUnreachable(
            f"The guest's sockets cannot be read: {os.strerror(error.errno or 0)}"
        ) from None


def read_process_blocking(
    identity: Identity, proc: Path = procfs.PROC
) -> tuple[list[QemuOption], list[UnixListener], list[TcpListener]]:
    """Do the work of `read_process` in the calling thread. Raises OSError."""
    options = read_options(identity, proc)
    descriptors = socket_descriptors(identity.pid, proc)
    listeners = _unix_listeners(identity.pid, descriptors, proc)
    unclear = set().union(*descriptors.values())
    unclear.difference_update(*(listener.descriptors for listener in listeners))
    if not may_use_tcp(options, unclear):
        return options, listeners, []
    # Read TCP listeners only if needed, because this takes 6 ms: the kernel scans hundreds of
    # thousands of slots.
    return options, listeners, read_tcp_listeners(identity.pid, descriptors, proc)


def connect_passable(identity: Identity, proc: Path = procfs.PROC) -> socket.socket | None:
    """Connect to a monitor that the daemon cannot reach, so that the caller can pass the connection
    to the daemon. Return None if there is no such monitor, if connecting fails, or if the daemon
    can reach another monitor of the guest. An agent does not count as a monitor.

    Run this in a separate thread: it may block, and changes the thread's network namespace. Raises
    OSError.
    """
    guest_endpoints = find_endpoints(*read_process_blocking(identity, proc))
    reachable = (*guest_endpoints.with_role(Role.QMP), *guest_endpoints.with_role(Role.HMP))
    for endpoint in () if reachable else guest_endpoints.passable:
        with ignore(f"connecting to {endpoint.title}", MonitorError):
            return connect_in_netns(identity.pid, endpoint, proc)
    return None


async def prove(process: Process, connection: socket.socket, proc: Path = procfs.PROC) -> Endpoint:
    """Return the process's monitor at the end of a connection that another program has made.

    Raises MonitorUnreachable if the connection ends elsewhere, and MonitorTimeout if its end is not
    found in time.
    """
    identity = process.guest.identity

    def read() -> Endpoint | None:
        guest_endpoints = find_endpoints(*read_process_blocking(identity, proc))
        return endpoint_of_peer(guest_endpoints, peer_address(connection))

    await check_end(process, connection, proc)
    if (endpoint := await _examine(process, read)) is None:
        raise MonitorUnreachable("The connection does not end in a monitor of the process")
    return endpoint


async def check_end(process: Process, connection: socket.socket, proc: Path = procfs.PROC) -> None:
    """Raise MonitorUnreachable if the connection does not end in the process, and MonitorTimeout if
    its end is not found in time."""
    pid = process.guest.identity.pid
    if not await _examine(process, lambda: ends_in(connection, pid, proc)):
        raise MonitorUnreachable("The connection ends in another process")


async def _examine(process: Process, work: Callable[[], T]) -> T:
    future = _run(process.guest.identity, work)
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            result = await future
    except TimeoutError:
        raise MonitorTimeout("The other end of the connection was not found in time") from None
    except OSError as error:
        raise MonitorUnreachable(
            f"The other end of the connection cannot be found: {os.strerror(error.errno or 0)}"
        ) from None
    if process.exited():  # Its pid may have been reused.
        raise MonitorUnreachable("The guest has exited")
    return result


async def connect(
    process: Process, endpoint: Endpoint, table: ListenerTable, proc: Path = procfs.PROC
) -> socket.socket:
    """Connect to the endpoint, and prove that the endpoint belongs to the process. Sends nothing.

    Raises MonitorBusy, MonitorUnreachable, MonitorTimeout.
    """
    if endpoint.listener.in_use:
        raise MonitorBusy(f"Another program uses {endpoint.title}")
    identity = process.guest.identity
    timeout_s = REACH_TIMEOUT_S
    if needs_netns(endpoint):
        timeout_s += CONNECT_S + ACCEPT_S
        work = _run(identity, lambda: connect_in_netns(identity.pid, endpoint, proc))
    else:
        work = _run(identity, lambda: connect_blocking(identity, endpoint, table, proc))
    try:
        async with asyncio.timeout(timeout_s):
            connection = await asyncio.shield(work)
    except BaseException as error:
        work.add_done_callback(_discard)
        if isinstance(error, TimeoutError):
            raise MonitorTimeout(f"No answer from the file system: {endpoint.title}") from None
        raise
    if process.exited():  # Its pid may have been reused.
        connection.close()
        raise MonitorUnreachable("The guest has exited")
    return connection


def _run(identity: Identity, function: Callable[[], T]) -> asyncio.Future[T]:
    """Raises MonitorTimeout."""
    try:
        return shared.run(identity, function)
    except AllThreadsBlocked:
        raise MonitorTimeout("Too many reads of users' files block: no thread is left") from None


def read_options(identity: Identity, proc: Path = procfs.PROC) -> list[QemuOption]:
    """Read the options of a QEMU's command line and of up to MAX_CONFIGS -readconfig files. May
    block. Raises OSError."""
    options = []
    files, remaining = 0, MAX_CONFIG
    for option in parse_command_line(procfs.read_command_line(identity.pid, proc)):
        options.append(option)
        if option.name == "readconfig" and files < MAX_CONFIGS:
            text = _read_config(identity, option.text, proc)
            files, remaining = files + 1, remaining - len(text)
            options += parse_config(text) if remaining >= 0 else []
    return options


def read_listeners(pid: int, proc: Path = procfs.PROC) -> list[UnixListener]:
    """List the unix sockets that the process listens on. May block. Raises OSError."""
    return _unix_listeners(pid, socket_descriptors(pid, proc), proc)


def _unix_listeners(
    pid: int, descriptors: Mapping[int, set[int]], proc: Path
) -> list[UnixListener]:
    rows: dict[int, list[UnixRow]] = {}
    for row in _read_rows(proc / str(pid) / "net/unix", descriptors):
        rows.setdefault(row.inode, []).append(row)
    # If several rows have the same inode, at most one of them is true; the others are forged.
    # `connect` refuses forged paths. `used` leaves out all rows that share an inode: otherwise, a
    # forged row could make the monitor seem in use, and the guest would not be asked.
    used = {row.name for own in rows.values() if len(own) == 1 for row in own if row.connected}
    listeners = []
    for inode, own in sorted(rows.items()):
        names = [row.name for row in own if row.listening and row.name]
        if names:
            paths = tuple(map(os.fsdecode, names))
            in_use = not used.isdisjoint(names)
            listeners.append(UnixListener(inode, paths, frozenset(descriptors[inode]), in_use))
    return listeners


def connect_blocking(
    identity: Identity, endpoint: Endpoint, table: ListenerTable, proc: Path = procfs.PROC
) -> socket.socket:
    """Do the work of `connect` in the calling thread."""
    refusal: MonitorError = MonitorUnreachable(f"No path leads to {endpoint.title}")
    assert isinstance(endpoint.listener, UnixListener)
    for path in endpoint.listener.paths:
        for root, directory in _starts(identity.pid, path, proc):
            try:
                file = open_path(root, path, directory)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    refusal = _unreachable(endpoint, error)
                continue
            try:
                if _is_bound_to(file, identity, endpoint, table, proc):
                    return _connect_file(file, identity, endpoint)
                refusal = MonitorUnreachable(f"Another file is at the path of {endpoint.title}")
            finally:
                os.close(file)
    raise refusal


def _connect_file(file: int, identity: Identity, endpoint: Endpoint) -> socket.socket:
    """Connect through the descriptor, which refers to the file that was checked."""
    # From now on, the other end may send descriptors.
    connection = take_over(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        connection.connect(f"/proc/self/fd/{file}")
        if peer_of(connection) != identity.pid:
            raise MonitorUnreachable(f"Another process listens at {endpoint.title}")
    except BlockingIOError:
        connection.close()
        raise MonitorBusy(f"Other programs wait already for {endpoint.title}") from None
    except OSError as error:
        connection.close()
        raise _unreachable(endpoint, error) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _is_bound_to(
    file: int, identity: Identity, endpoint: Endpoint, table: ListenerTable, proc: Path
) -> bool:
    """Return whether the process's socket is bound to this file.

    The table lists the sockets of one network namespace. If the table is missing or lacks this
    socket, the file must belong to the process's user, who can connect to it anyway.
    """
    status = os.fstat(file)
    if not stat.S_ISSOCK(status.st_mode):
        return False
    listening = table()
    if listening is not None:
        inode = status.st_ino & 0xFFFFFFFF
        device: int | None = status.st_dev
        if (device, inode) not in listening:
            device = _device_of_mount(file, identity.pid, proc)
        if device is not None and (device, inode) in listening:
            return listening[device, inode] == endpoint.listener.inode
        if endpoint.listener.inode in listening.values():
            return False
    return status.st_uid == identity.uid


def _device_of_mount(file: int, pid: int, proc: Path) -> int | None:
    """Return the device from mountinfo, because fstat(2) returns another one on btrfs and
    overlays."""
    try:
        lines = Path(f"/proc/self/fdinfo/{file}").read_text().splitlines()
        mount = next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
        for mounts in (procfs.Mounts(pid, proc), procfs.Mounts("self")):
            if (filesystem := mounts.get(mount)) is not None:
                major, _, minor = filesystem.number.partition(":")
                return os.makedev(int(major), int(minor))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    return None


def _starts(pid: int, path: str, proc: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield each place where the path may begin: a root directory and, for a relative path, a
    directory below it.

    The root is the root directory of the process, or of the program that passed the socket.
    """
    own = proc / str(pid)
    if path.startswith("/"):
        yield own / "root", None
        yield Path("/"), None
    elif path and not path.startswith("@"):
        yield own / "root", own / "cwd"


def _read_rows(path: Path, inodes: Collection[int]) -> Iterator[UnixRow]:
    """Yield the rows of stream sockets among `inodes`. Raises OSError."""
    size = 0
    wanted = {b"%d" % inode for inode in inodes}
    with path.open("rb") as file:
        for line in file:
            size += len(line)
            if size > MAX_TABLE:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            # Most rows belong to other processes. This check is faster than parsing the row.
            if wanted.isdisjoint(line.split(maxsplit=7)[6:7]):
                continue
            row = parse_unix_row(line.removesuffix(b"\n"))
            if row is not None and row.stream and row.inode in inodes:
                yield row


def _read_config(identity: Identity, path: str, proc: Path) -> str:
    """Read a -readconfig file that the guest's user can read; "" if that fails."""
    try:
        return read_config(identity.pid, path, proc)
    except (OSError, ValueError):
        return ""


def _unreachable(endpoint: Endpoint, error: OSError) -> MonitorError:
    return MonitorUnreachable(
        f"qkilld cannot connect to {endpoint.title}: {os.strerror(error.errno or 0)}"
    )


def _discard(work: asyncio.Future[socket.socket]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().close()


def is_stopped(process: Process, proc: Path) -> bool:
    """Return whether SIGSTOP or a debugger has stopped the process; False if unknown."""
    pid = process.guest.identity.pid
    with ignore(f"reading the state of process {pid}", OSError):
        return procfs.read_stat(pid, proc).state in ("T", "t")
    return False


def is_young(process: Process) -> bool:
    """Return whether the process was started less than START_S ago."""
    started_s = process.guest.identity.start_time / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s < START_S
