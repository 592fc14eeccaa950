"""The specification of a run: plain data that can be generated from a seed, printed and saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qkilld.decision.ladder import DOUBT

PROCESS: Final = -1
"""Used instead of a disk's number for the QEMU process itself."""
HOST: Final = -2
"""Used instead of a disk's number for the daemon, QEMU and all servers together."""


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
    """The value of aio=, for kind file."""
    make: str = "nbdkit"
    transport: str = "unix"
    reconnect: int = 0
    """Seconds that QEMU waits for a lost NBD server to return."""
    connects: bool = False
    """For kind vhost: QEMU listens and the backend connects."""
    logs: bool = False
    """For kind vhost: the backend writes to a log, even while frozen."""
    proxy: bool = False
    """For kind nbd: between QEMU and the server, there is an nbdkit that stores nothing itself."""
    netns: bool = False
    """For kind nbd on a unix socket: the server has its own network namespace."""
    shared: bool = False
    """For qemu-storage-daemon: the server has another client, which is busy."""
    syntax: str = "json"
    """json (-drive file=json:…), blockdev, or options (-drive with keys). Two further values,
    added and mirror, add the disk to the running QEMU, so it is not on the command line. With
    mirror, the disk is the target of a copy of the first disk. The copy begins at the stop, and the
    first disk is then a blockdev."""
    records: int = 60
    """The number of records in each of the two passes."""
    fill: int = 0
    """How many MiB are written after the records, and stay in a page cache."""
    in_flight: int = 0
    """The number of writes that are submitted at the stop, without waiting for them."""
    flush: bool = False
    """Whether a command flushes the disk at the stop. QEMU's main loop waits for the flush."""
    bitmap: bool = False
    """Whether the image has a persistent bitmap, which QEMU stores when it closes the image."""


@dataclass(frozen=True)
class Change:
    """One change of the schedule."""

    at: float
    """Seconds after the request to stop. Changes at 0 or earlier are made before the request."""
    of: int
    """The number of a disk, PROCESS or HOST."""
    what: str
    """For a disk: fast, slow; freeze, thaw; leave, back; dead, alive (the storage below its
    server); fail; hang (close and flush of its file). For the process: stop, frozen, trace, pipe;
    go ends any of these four; kill (SIGKILL, as from the kernel if memory runs out). For the host:
    pause, go."""
    value: float = 0
    """For slow: how slow, 1 (a little) or more. For hang: the seconds that each close and flush of
    the file takes; 0 means forever."""


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
        """The policy's limit for storage that does not move, in seconds. It is longer (see
        qkilld.decision.ladder) if a server may work for other clients than the guest."""
        return self.storage_stall * (DOUBT if self.doubtful else 1)

    @property
    def doubtful(self) -> bool:
        """Whether the guest may be waiting for a server that has other clients.

        It is so in two cases. First, the schedule changes a disk of such a server. Second, nothing
        shows that the guest waits for the changed disk, because the disk has no connection, or
        because its server has read all requests.
        """
        changes = [
            (change.what, self.disks[change.of]) for change in self.changes if change.of >= 0
        ]
        if any(disk.shared and (disk.syntax == "added" or disk.netns) for _, disk in changes):
            return True
        # QEMU closes the connection to a silent iSCSI target after about 13 s.
        shows_nothing = any(
            what == "leave" or disk.logs or disk.kind == "iscsi" for what, disk in changes
        )
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
