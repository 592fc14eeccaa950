"""What the disks of a guest lie on, and whether the unit is stopped before that goes away."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from qkilld.judgement.finding import Finding, Line, Severity
from qkilld.judgement.stopcommand import quoted
from qkilld.model.unit import UnitFacts

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
"""File systems that are gone with the network."""
_NETWORK: Final = re.compile(
    r"\b(nbd|iscsi|iser|ssh|sftp|rbd|gluster(?:\+tcp|\+rdma)?|nfs|https?|ftps?|sheepdog)"
    r"(?:\+tcp|\+ssh)?:(?://)?([^\s/,:?\"']*)|\"?driver\"?[=:]\s*\"?(nbd|iscsi|ssh|rbd|gluster|nfs)\b"
)
_LOCAL: Final = frozenset(("localhost", "127.0.0.1", "[", "unix"))
_PATH: Final = re.compile(
    r"(?:\b(?:file|filename|path)[\"']?[=:]\s*[\"']?(?:file:)?|-(?:hd[a-d]|cdrom|sd|mtdblock|pflash)\s)"
    r"(/[^\s,\"']+)"
)


@dataclass(frozen=True, slots=True)
class Storage:
    """One place of a guest's disks that needs the network: a file system, or a server."""

    mount_point: str = ""
    """"" for a server."""
    unit: str = ""
    """The mount's, as systemd calls it."""
    protocol: str = ""
    """Of a server: nbd, iscsi, …"""


def servers(words: Sequence[str]) -> list[Storage]:
    """The storage servers on a QEMU's command line that are not on this very host."""
    text = " ".join(words)
    found = {}
    for match in _NETWORK.finditer(text):
        protocol = match[1] or match[3]
        # With `driver=` the address stands in an option of its own.
        if match[1] and match[2] in _LOCAL:
            continue
        if match[3] and ("type=unix" in text or '"unix"' in text or ".path=" in text):
            continue
        found[protocol] = Storage(protocol=protocol)
    return list(found.values())


def image_paths(words: Sequence[str]) -> list[str]:
    """The absolute paths of disk images on a QEMU's command line, or in a shell's line with one."""
    return [path.replace(",,", ",") for path in _PATH.findall(" ".join(words))]


def mount_unit(mount_point: str) -> str:
    """Its .mount unit: systemd.unit(5), "String Escaping for Inclusion in Unit Names"."""
    path = "/".join(part for part in mount_point.split("/") if part)
    return f"{escaped(path) if path else '-'}.mount"


def escaped(text: str) -> str:
    """As `systemd-escape` has it."""
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


def check_storage(facts: UnitFacts, storage: Sequence[Storage]) -> Iterator[Finding]:
    after = frozenset(facts.after)
    for place in storage:
        if place.protocol:
            if not after & {"network.target", "network-online.target", "remote-fs.target"}:
                yield Finding(
                    "network-order",
                    Severity.LOSES,
                    f"its disks are reached over the network ({place.protocol}), and it is not"
                    " ordered after it",
                    "at host shutdown the network may go away while the guest still writes",
                    (Line("Unit", "After=network.target network-online.target"),),
                )
        elif not after & {place.unit, "remote-fs.target"}:
            yield Finding(
                "storage-order",
                Severity.LOSES,
                f"its disks lie on the network file system at {place.mount_point}, and it is not"
                " ordered after it",
                "at host shutdown that is unmounted while the guest still writes",
                (Line("Unit", f"RequiresMountsFor={quoted(place.mount_point)}"),),
            )
