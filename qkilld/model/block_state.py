"""The state of a guest's disks, reported by its monitor before QEMU is told to exit.

None means unreadable, never "nothing". Names that are sent back to QEMU are kept as received.
Titles are printable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from qkilld.model.dataclass import dataclass

MAX_CONNECTIONS: Final = 64
"""At most this many connections of a guest are saved with a job, and at most this many are cut off,
because their names come from the guest. A disk is recorded with at most this many connections."""
SETTLED: frozenset[str] = frozenset({"concluded", "null", "aborting", "undefined"})
"""States of a block job in which nothing is lost if the job ends."""


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk of the guest, identified by its topmost node."""

    node: str
    """QEMU's name for the node."""
    title: str
    network: bool
    """Whether the monitor reports that the disk or a node below it uses a network connection."""
    failed: bool = False
    """The disk's I/O status is not "ok": a request of the guest failed, or the file system of the
    image is full."""
    no_flush: bool = False
    """QEMU never flushes the disk (cache=unsafe)."""
    device: str | None = None
    """The path of the disk's device; None if unknown."""
    qdev: str = ""
    """QEMU's name for the disk's device; "" if unknown."""
    connections: tuple[str, ...] = ()
    """The names of those nodes below the disk's node that use a network connection."""
    names: tuple[str, ...] = ()
    """The printable names of the disk and of its nodes, if only statistics were read; otherwise
    ()."""


@dataclass(frozen=True, slots=True)
class RequestQueue:
    """A queue of a virtio device."""

    device: str
    number: int
    in_flight: int
    completed: int
    """The number of completed requests, modulo 2^16."""


@dataclass(frozen=True, slots=True)
class BackgroundJob:
    """A backup, mirror, commit or stream, or the migration to another host."""

    title: str
    status: str
    progress: int
    """A count, normally of bytes, that grows while the job makes progress."""
    migration: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """The disks at one instant."""

    at: int
    """CLOCK_MONOTONIC, µs."""
    runstate: str
    disks: tuple[GuestDisk, ...]
    """The disks open for writing, or all disks if only statistics were read."""
    queues: tuple[RequestQueue, ...] | None = None
    """The queues of all virtio disks."""
    foreign: tuple[str, ...] = ()
    """Disks whose requests do not pass through QEMU (vhost-user)."""
    unused: tuple[str, ...] = ()
    """Images open for writing that no disk uses: their device was unplugged, or only an export uses
    them. These images are not flushed, so QEMU may still have unwritten data for them."""
    jobs: tuple[BackgroundJob, ...] = ()


@dataclass(frozen=True, slots=True)
class FlushResult:
    """The result of flushing one disk."""

    node: str
    title: str
    error: str = ""
    """The printable error; "" if the disk was flushed."""
    refused: bool = False
    """The flush was not tried (for example, because QEMU did not export the node), so `error` says
    nothing about the disk."""


@dataclass(frozen=True, slots=True)
class NetworkDisk:
    """A disk whose connections can be cut off."""

    title: str
    connections: tuple[str, ...]
    """As GuestDisk.connections."""


@dataclass(frozen=True, slots=True)
class NetworkStorage:
    """The network connections of the disks, as known before QEMU got SIGTERM."""

    disks: tuple[NetworkDisk, ...] = ()
    stuck: tuple[str, ...] = ()
    """The names of the connections of disks that did not answer."""

    @classmethod
    def of(cls, disks: Iterable[GuestDisk], stuck: Iterable[str]) -> NetworkStorage:
        """Leave out what exceeds MAX_CONNECTIONS."""
        room, kept = MAX_CONNECTIONS, []
        for disk in disks:
            if names := disk.connections[:room]:
                kept.append(NetworkDisk(disk.title, names))
                room -= len(names)
        return cls(tuple(kept), tuple(dict.fromkeys(stuck))[:MAX_CONNECTIONS])


@dataclass(frozen=True, slots=True)
class YankInstance:
    """A connection that QEMU can cut off with its command `yank`."""

    kind: str
    """block-node, chardev or migration."""
    name: str
    """The printable name, for display."""
    wire: Mapping[str, Any]
    """The instance as QEMU sent it, for the command `yank`."""
