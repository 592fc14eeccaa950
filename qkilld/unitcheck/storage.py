"""The storage of a guest's disks, and whether the unit is stopped before its storage disappears."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from qkilld.model.dataclass import dataclass
from qkilld.model.unit import UnitFacts
from qkilld.unitcheck.command import quoted
from qkilld.unitcheck.finding import Finding, Line, Severity

REMOTE_TYPES: Final = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "afs",
        "ocfs2",
        "gfs2",
        "lustre",
        "9p",
        "fuse.s3fs",
        "fuse.rclone",
        "ncpfs",
        "beegfs",
    ]
)
"""File systems that need the network."""
LOCAL_HOSTS: Final = frozenset(("localhost", "127.0.0.1", "::1"))
DEVICE_UNITS: Final = {
    "iscsi": ("open-iscsi.service", "iscsid.service", "iscsi.service"),
    "nvme-of": ("nvmf-autoconnect.service",),
    "drbd": ("drbd.service",),
    "rbd": ("rbdmap.service",),
    "nbd": ("nbd-client.service",),
    "multipath": ("multipathd.service",),
}
"""Kinds of block devices that need the network, with the units that provide the devices. All these
units are ordered before remote-fs-pre.target."""
_DEVICE_NAMES: Final = (
    (re.compile(r"/dev/disk/by-path/(?:ip|tcp)-.*-iscsi-"), "iscsi"),
    (re.compile(r"/dev/drbd\d|/dev/drbd/"), "drbd"),
    (re.compile(r"/dev/rbd\d|/dev/rbd/"), "rbd"),
    (re.compile(r"/dev/nbd\d"), "nbd"),
    (re.compile(r"/dev/mapper/mpath"), "multipath"),
)
_NETWORK: Final = frozenset({"network.target", "network-online.target", "remote-fs.target"})
_REMOTE: Final = frozenset({"remote-fs.target", "remote-fs-pre.target"})


@dataclass(frozen=True, slots=True)
class Storage:
    """Storage that must stay available until the guest has exited: a file system, a server, or a
    device reached over the network."""

    mount_point: str = ""
    """The mount point of a file system; "" for a server or a device."""
    unit: str = ""
    """The file system's .mount unit."""
    outside_target: bool = False
    """The mount is not ordered before remote-fs.target, for example because of nofail."""
    protocol: str = ""
    """For a server or device: nbd, iscsi, vhost-user, …"""
    server: str = ""
    """The unit of a server on this host; "" for a server on another host."""
    unseen: str = ""
    """Why the unit of a server on this host is not known."""
    device: str = ""
    """The path of a block device, whose kind is `protocol`."""
    text: str = ""
    """For a template: the mount point or the server, written with specifiers to suit every
    instance; "" if no specifier is needed."""
    may_differ: bool = False
    """For a template: other instances may have another mount point."""

    @property
    def line(self) -> str:
        """The line that orders a unit after this storage."""
        if self.server:
            return f"After={self.text or self.server}"
        if self.device:
            return f"After=remote-fs-pre.target {' '.join(DEVICE_UNITS[self.protocol])}"
        if self.protocol:
            return "After=network.target network-online.target"
        if self.may_differ:
            # With RequiresMountsFor=, other instances would not start without the mount of this
            # instance.
            return f"After=remote-fs.target {self.unit}"
        return f"RequiresMountsFor={self.text or quoted(self.mount_point)}"


def is_ordered(facts: UnitFacts, place: Storage) -> bool:
    """Return whether the unit is known to be stopped before the storage disappears."""
    if place.unseen:
        return False
    after = frozenset(facts.after)
    if place.server:
        return place.server in after
    if place.device:
        return bool(after & (_REMOTE | set(DEVICE_UNITS[place.protocol])))
    if place.protocol:
        return bool(after & _NETWORK)
    return place.unit in after or ("remote-fs.target" in after and not place.outside_target)


def device_kind(path: str) -> str:
    """Return a device's key in DEVICE_UNITS, judging by its path alone; "" for none."""
    return next((kind for pattern, kind in _DEVICE_NAMES if pattern.match(path)), "")


def mount_unit(mount_point: str) -> str:
    """Return the .mount unit: systemd.unit(5), "String Escaping for Inclusion in Unit Names"."""
    path = "/".join(part for part in mount_point.split("/") if part)
    return f"{escaped(path) if path else '-'}.mount"


def escaped(text: str) -> str:
    """Escape like `systemd-escape`."""
    safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_."
    out = []
    for position, byte in enumerate(text.encode(errors="surrogateescape")):
        char = chr(byte)
        if char == "/":
            out.append("-")
        elif char in safe and not (char == "." and position == 0):
            out.append(char)
        else:
            out.append(f"\\x{byte:02x}")
    return "".join(out)


_SERVER_GONE: Final = (
    "if both are stopped at the same time, for example at host shutdown, the server may be gone"
    " while the guest still writes"
)


def check_storage(facts: UnitFacts, storage: Sequence[Storage]) -> Iterator[Finding]:
    for place in storage:
        if is_ordered(facts, place):
            continue
        if place.unseen:
            yield Finding(
                "server-unknown",
                Severity.ADVICE,
                f"it is not known which unit of this host serves its disks ({place.protocol}):"
                f" {place.unseen}",
                _SERVER_GONE,
            )
        elif place.server:
            yield Finding(
                "server-order",
                Severity.LOSES,
                f"its disks are served by {place.server} on this host ({place.protocol}), and the"
                " unit is not ordered after that server",
                _SERVER_GONE,
                (Line("Unit", place.line, by_hand=not place.server.endswith(".service")),),
            )
        elif place.device or place.protocol:
            through = f" through {place.device}" if place.device else ""
            yield Finding(
                "network-order",
                Severity.LOSES,
                f"its disks are reached over the network ({place.protocol}{through}), and the unit"
                " is not ordered after the network",
                "at host shutdown the network may go away while the guest still writes",
                (Line("Unit", place.line),),
            )
        else:
            yield Finding(
                "storage-order",
                Severity.LOSES,
                f"its disks lie on the network file system at {place.mount_point}, and the unit is"
                " not ordered after its mount",
                "at host shutdown, the file system is unmounted while the guest still writes",
                (Line("Unit", place.line),),
            )
