"""Find the processes of this host that listen at an address. This module runs as root, and other
users may be hostile.

The names of sockets prove nothing: a name can contain text that looks like further rows of
/proc/net/unix, and a user can bind any name in a mount namespace of their own. So a unix socket is
found by the file that it is bound to, as reported by sock_diag(7), and the socket's processes are
found by their descriptors.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable
from typing import Final

from qkilld.adapters import procfs
from qkilld.debug_log import note
from qkilld.evidence.fuse import DEVICE, FuseServers
from qkilld.evidence.other_namespaces import OtherNamespaces
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.text import printable
from qkilld.monitor.tcp import MAX_DESCRIPTORS, read_tcp, socket_descriptors

_LOOPBACK: Final = {
    "localhost": frozenset({"127.0.0.1", "::1"}),
    "127.0.0.1": frozenset({"127.0.0.1"}),
    "::1": frozenset({"::1"}),
}
_ANY: Final = frozenset({"0.0.0.0", "::"})


class Owners(NamedTuple):
    """The processes that have descriptors of sockets."""

    pids: dict[int, set[int]]
    """The process ids, by the inode of the socket."""
    is_complete: bool
    """Whether the descriptors of all processes were read."""


def owners_of(inodes: Iterable[int]) -> Owners:
    """Find the processes with descriptors of these sockets. This takes 4 µs for each descriptor on
    the host."""
    sought = frozenset(inodes)
    owners: dict[int, set[int]] = {}
    is_complete = os.geteuid() == 0  # /proc may hide other users' processes.
    for pid in procfs.pids() if sought else ():
        try:
            descriptors = socket_descriptors(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process has exited.
        except OSError as error:
            note(f"listing the sockets of process {pid}", error)
            is_complete = False
            continue
        for inode in sought.intersection(descriptors):
            owners.setdefault(inode, set()).add(pid)
    return Owners(owners, is_complete)


def fuse_servers(connection: int, name: str) -> tuple[FuseServers, bool]:
    """Find the processes that serve a FUSE connection: those that have /dev/fuse open for it. Also
    return whether the descriptors of all processes were read.

    Before Linux 6.16, the kernel does not show for which connection /dev/fuse is open, so any
    process that has it open may be the server. If some of these processes are called `name`, as
    servers usually are, only they are returned. `name` is taken from the file system's type, such
    as sshfs from fuse.sshfs.
    """
    certain, possible = set(), set()
    is_complete = os.geteuid() == 0
    for pid in procfs.pids():
        try:
            directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                links = procfs.read_links(directory, MAX_DESCRIPTORS)
            finally:
                os.close(directory)
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has exited.
        except OSError as error:
            note(f"listing the descriptors of process {pid}", error)
            is_complete = False
            continue
        if links is None:
            note(f"listing the descriptors of process {pid}", OSError("it has too many"))
            is_complete = False
            continue
        for number, link in links:
            if link == DEVICE:
                text = procfs.read_bounded(f"/proc/{pid}/fdinfo/{number}", 4096) or b""
                named = re.search(rb"^fuse_connection:\t(\d+)$", text, re.MULTILINE)
                if named is None:
                    possible.add(pid)
                elif int(named[1]) == connection:
                    certain.add(pid)
    if certain or not possible:
        return FuseServers(tuple(certain), True), is_complete
    command = f"{name[:15]}\n".encode()
    likely = {pid for pid in possible if procfs.read_bounded(f"/proc/{pid}/comm", 64) == command}
    return FuseServers(tuple(likely or possible), False), is_complete


def tcp_listeners(host: str, port: int | None) -> set[int]:
    """Return the inodes of the sockets that a connection to this loopback address may reach. Raises
    OSError."""
    hosts = _LOOPBACK[host] | _ANY
    return {
        each.inode
        for each in read_tcp(os.getpid())
        if each.listening and each.local.port == port and each.local.host in hosts
    }


def unix_listeners(path: str, may_hang: Callable[[str], bool]) -> set[int]:
    """Return the inode of the socket that a connection to this path reaches; empty if nobody
    listens. `may_hang` takes a file system type, and returns whether file systems of this type may
    hang. They are not accessed.

    Raises OSError if the path or the sockets cannot be read, or if the socket may be in another
    network namespace.
    """
    if not path.startswith("/"):
        raise OSError(f"{printable(path)} is relative to a directory that is not known")
    mounts = procfs.Mounts("self")
    for filesystem in mounts.way_to(os.fsencode(os.path.normpath(path))):
        if may_hang(filesystem.kind):
            raise OSError(f"{printable(path)} is on {filesystem.kind}, which may hang")
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return set()
    try:
        status = os.fstat(file)
        devices = {status.st_dev, _device_of(file, mounts)}
    finally:
        os.close(file)
    if not stat.S_ISSOCK(status.st_mode):
        return set()
    listening = listening_unix()
    if listening is None:
        raise OSError("the kernel does not list the listening sockets")
    number = status.st_ino & 0xFFFF_FFFF
    inodes = {listening[key] for device in devices if (key := (device, number)) in listening}
    if not inodes and _may_listen_elsewhere(os.path.basename(path)):  # noqa: PTH119
        raise OSError("it may be in another network namespace")
    return inodes


def _may_listen_elsewhere(name: str) -> bool:
    """Return whether a process in another network namespace may listen on a socket with this file
    name; True if that is unknown. Processes outside this container are not seen."""

    def matches(path: bytes) -> bool:
        return os.path.basename(os.fsdecode(path)) == name  # noqa: PTH119

    return os.geteuid() != 0 or OtherNamespaces().listens(matches) is not False


def _device_of(file: int, mounts: procfs.Mounts) -> int:
    """For an open file, return the device number in mountinfo, because stat() returns another one
    on btrfs and overlays. Raises OSError."""
    with open(f"/proc/self/fdinfo/{file}") as lines:  # noqa: PTH123
        mount = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "-1")
    filesystem = mounts.get(int(mount))
    if filesystem is None:
        raise OSError("the mounts of this process cannot be read")
    major, _, minor = filesystem.number.partition(":")
    return os.makedev(int(major), int(minor))
