"""The specification of a run: plain data that is generated from a seed, printed, and kept with a
trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qkilld.decision.ladder import DOUBT

PROCESS: Final = -1
"""Instead of a disk's number: the QEMU process itself."""
HOST: Final = -2
"""The daemon, QEMU and all servers."""


@dataclass(frozen=True)
class Disk:
    kind: str = "file"
    """file, nbd, iscsi or vhost."""
    store: str = "plain"
    """The file system of the image: plain, fuse, loop (ext4 on a disk that can be throttled), or
    disk (ext4 on a disk that can hang)."""
    format: str = "qcow2"
    cache: str = "writeback"
    aio: str = "threads"
    """For kind file."""
    make: str = "nbdkit"
    transport: str = "unix"
    reconnect: int = 0
    """Seconds that QEMU waits for a lost NBD server to return."""
    connects: bool = False
    """For kind vhost: QEMU listens and the backend connects."""
    logs: bool = False
    """For kind vhost: the backend writes to a log, even while frozen."""
    proxy: bool = False
    """For kind nbd: an nbdkit between QEMU and the server, which stores nothing itself."""
    netns: bool = False
    """For kind nbd on a unix socket: the server has its own network namespace."""
    shared: bool = False
    """For qemu-storage-daemon: it has another, busy client."""
    syntax: str = "json"
    """json (-drive file=json:…), blockdev, options (-drive with keys), or, added to the running
    QEMU and so missing on its command line: added, or mirror (the target to which the first disk, a
    blockdev, is copied from the stop on)."""
    records: int = 60
    """In each of the two passes."""
    fill: int = 0
    """MiB written after the records, which stay in a page cache."""
    in_flight: int = 0
    """Writes submitted with the stop and not waited for."""
    bitmap: bool = False
    """A persistent one, which QEMU stores when it closes the image."""


@dataclass(frozen=True)
class Change:
    """One change of the schedule."""

    at: float
    """Seconds after the request to stop; changes at 0 or earlier happen before it."""
    of: int
    """The number of a disk, PROCESS or HOST."""
    what: str
    """For a disk: fast, slow; freeze, thaw; leave, back; dead, alive (for what is below its
    server); fail; hang (the close and flush of its file). For the process: stop, frozen, trace,
    pipe, and go; kill (SIGKILL, as of the kernel for want of memory). For the host: pause, go."""
    value: float = 0
    """For slow: how slow, from 1 (a little) on; for hang: the seconds that such a call takes."""


@dataclass(frozen=True)
class Spec:
    name: str
    disks: tuple[Disk, ...]
    changes: tuple[Change, ...] = ()
    noises: tuple[str, ...] = ()
    grace: float = 2
    stall: float = 8
    storage_stall: float = 20
    seed: int | None = None

    @property
    def longest_stall(self) -> float:
        """The policy's limit for storage that stands still. Ambiguous movement extends it
        (qkilld.decision.ladder): that of a server with other clients, if the command line does not
        tell which requests are ours."""
        return self.storage_stall * (DOUBT if self.doubtful else 1)

    @property
    def doubtful(self) -> bool:
        """Whether the disk that the schedule concerns is such a one, or nothing shows that the
        guest waits for that disk: it has no connection, or its server has read all requests. Then
        a server with other clients may be what the guest waits for."""
        changes = [
            (change.what, self.disks[change.of]) for change in self.changes if change.of >= 0
        ]
        if any(disk.shared and (disk.syntax == "added" or disk.netns) for _, disk in changes):
            return True
        shows_nothing = any(what == "leave" or disk.logs for what, disk in changes)
        return shows_nothing and any(disk.shared for disk in self.disks)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spec:
        return cls(
            **{
                **value,
                "disks": tuple(Disk(**disk) for disk in value["disks"]),
                "changes": tuple(Change(**change) for change in value["changes"]),
                "noises": tuple(value["noises"]),
            }
        )
