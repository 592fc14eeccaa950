"""Parse the monitor's replies about disks. Pure. Replies are hostile: each may be false or
malformed.

They may come from QEMU 7.2 to 11.1. All functions except read_export_ids raise MonitorProtocolError
if a reply is malformed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from qkilld.model.block_state import (
    MAX_CONNECTIONS,
    SETTLED,
    BackgroundJob,
    GuestDisk,
    RequestQueue,
)
from qkilld.model.errors import MonitorProtocolError
from qkilld.model.json_text import decode_json
from qkilld.model.text import printable

MAX_DISKS: Final = 64
"""If a guest has more disks than this, none is flushed."""
MAX_TITLE: Final = 128
MAX_NODE_NAME: Final = 31
"""The longest name of a node that QEMU accepts."""
NETWORK_DRIVERS: Final = frozenset(
    {"nbd", "iscsi", "ssh", "http", "https", "ftp", "ftps", "gluster", "nfs", "rbd", "sheepdog"}
    | {"vxhs", "nvme-io_uring", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"}
)
_FORMATS: Final = frozenset(
    {"qcow2", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc", "parallels", "preallocate"}
)
"""Formats whose metadata QEMU may keep in memory until it flushes or closes the image."""
_FILE_DRIVERS: Final = frozenset({"file", "host_device"})
_URL: Final = re.compile(r"(\w+)(?:\+\w+)?:")
_MAX_DEPTH: Final = 16
_NOT_IN_PROGRESS: Final = frozenset({"none", "completed", "failed", "cancelled"})
"""States of a migration that has ended, or never began."""


def read_disks(answer: object, nodes: object) -> tuple[GuestDisk, ...]:
    """Return the writable disks in query-block. `nodes`: the reply to query-named-block-nodes."""
    connections, unsafe = _connections(nodes), _unsafe_files(nodes)
    disks = []
    for entry in _list(answer, "query-block"):
        match entry:
            case {"inserted": {"node-name": str(node), "ro": False, "file": str(file)}}:
                disks.append(_disk(entry, node, file, connections, unsafe))
            case {"device": str()}:
                pass  # Empty or read-only.
            case _:
                raise _unreadable("query-block")
    if len(disks) > MAX_DISKS:
        raise MonitorProtocolError(f"The guest has more than {MAX_DISKS} disks")
    return tuple(disks)


def read_unused_images(answer: object, nodes: object) -> tuple[str, ...]:
    """Return the writable images that no disk in query-block uses, but whose metadata QEMU may keep
    in memory. `nodes`: the reply to query-named-block-nodes."""
    disks = [one["inserted"] for one in _list(answer, "query-block") if _has_medium(one)]
    used = {name for disk in disks for name in (disk.get("file"), *_files(disk))}
    tops = {disk.get("node-name") for disk in disks}
    unused = []
    for node in _list(nodes, "query-named-block-nodes"):
        match node:
            case {"node-name": str(name), "drv": str(driver), "file": str(file), "ro": False}:
                if driver in _FORMATS and name not in tops and not _is_used(file, used):
                    unused.append(_title(name))
    return tuple(unused)


def _has_medium(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("inserted"), dict)


def _is_used(file: str, used: set[object]) -> bool:
    """Return whether a disk uses this file, directly or through a filter. QEMU's file name for a
    filter contains the name of the file below it."""
    inner = file.removeprefix("json:") if file.startswith("json:") else json.dumps(file)
    return file in used or any(isinstance(name, str) and inner in name for name in used)


def read_disk_statistics(answer: object) -> tuple[GuestDisk, ...]:
    """Return the disks in query-blockstats, including read-only ones.

    Unlike query-block and query-named-block-nodes, this command does not make QEMU ask a file
    system for an image's size (7.2 to 11.1). But its reply does not show the cache mode of a disk.
    """
    disks = []
    for entry in _list(answer, "query-blockstats"):
        match entry:
            case {"node-name": str(node)}:
                disks.append(_disk_of_statistics(entry, node))
            case {"stats": dict()}:
                pass  # Empty.
            case _:
                raise _unreadable("query-blockstats")
    if len(disks) > MAX_DISKS:
        raise MonitorProtocolError(f"The guest has more than {MAX_DISKS} disks")
    return tuple(disks)


def read_virtio_devices(answer: object) -> tuple[tuple[str, str], ...]:
    """Return the name and path of each device in x-query-virtio."""
    devices = []
    for entry in _list(answer, "x-query-virtio"):
        match entry:
            case {"name": str(name), "path": str(path)}:
                devices.append((name, path))
            case _:
                raise _unreadable("x-query-virtio")
    return tuple(devices)


def read_queue(answer: object, device: str, number: int) -> RequestQueue:
    """Parse x-query-virtio-queue-status."""
    match answer:
        case {"inuse": int(in_flight), "used-idx": int(completed)} if in_flight >= 0:
            return RequestQueue(device, number, in_flight, completed)
    raise _unreadable("x-query-virtio-queue-status")


def read_jobs(answer: object) -> tuple[BackgroundJob, ...]:
    """Return the unfinished block jobs in query-block-jobs."""
    jobs = []
    for entry in _list(answer, "query-block-jobs"):
        match entry:
            case {"type": str(kind), "device": str(name), "offset": int(moved), "len": int(total)}:
                status = str(entry.get("status", "running"))
                if status not in SETTLED:
                    title = f"{kind} {name} ({moved} of {total} bytes)"
                    jobs.append(BackgroundJob(_title(title), _title(status), moved))
            case _:
                raise _unreadable("query-block-jobs")
    return tuple(jobs)


def read_export_ids(answer: object) -> tuple[str, ...]:
    """Return the ids in query-block-exports; "" for a malformed id. Never raises, because an
    exception would prevent disks.resume from resuming the guest."""
    entries = answer if isinstance(answer, list) else [None]
    return tuple(str(one.get("id", "")) if isinstance(one, dict) else "" for one in entries)


def read_migration(answer: object) -> tuple[BackgroundJob, ...]:
    """Return the outgoing migration in query-migrate, if one is in progress."""
    if not isinstance(answer, dict):
        raise _unreadable("query-migrate")
    status = answer.get("status", "none")
    if not isinstance(status, str):
        raise _unreadable("query-migrate")
    if status in _NOT_IN_PROGRESS:
        return ()
    moved = 0
    match answer.get("ram"):
        case {"transferred": int(transferred)}:
            moved = transferred
    return (BackgroundJob("migration", _title(status), moved, migration=True),)


def _disk(
    entry: Mapping[str, Any],
    node: str,
    file: str,
    connections: Mapping[str, list[str]],
    unsafe: frozenset[str],
) -> GuestDisk:
    inserted = entry["inserted"]
    files = list(_files(inserted)) or [file]
    name = entry.get("device") or node
    device = entry.get("qdev")
    network = any(_protocols(one) & NETWORK_DRIVERS for one in files)
    below = dict.fromkeys(name for one in files for name in connections.get(one, ()))
    short = [name for name in below if len(name) <= MAX_NODE_NAME]
    return GuestDisk(
        node=node,
        title=_title(str(name)),
        network=network or bool(below) or inserted.get("drv") in NETWORK_DRIVERS,
        failed=entry.get("io-status", "ok") != "ok",
        # Check the lower nodes, too: during a backup, the top node is a filter, and only the node
        # below it has the flag.
        no_flush=_is_unsafe(inserted) or not unsafe.isdisjoint(files),
        device=device if isinstance(device, str) else None,
        qdev=device if isinstance(device, str) else "",
        connections=tuple(short[:MAX_CONNECTIONS]),
    )


def _disk_of_statistics(entry: Mapping[str, Any], node: str) -> GuestDisk:
    name, device = entry.get("device"), entry.get("qdev")
    names = [name, node] if isinstance(name, str) and name else [node]
    lowest = entry
    for _ in range(_MAX_DEPTH):
        if not isinstance(below := lowest.get("parent"), dict):
            break
        lowest = below
        if isinstance(lower := lowest.get("node-name"), str):
            names.append(lower)
    details = lowest.get("driver-specific")
    return GuestDisk(
        node=node,
        title=_title(names[0]),
        network=not (isinstance(details, dict) and details.get("driver") in _FILE_DRIVERS),
        device=device if isinstance(device, str) else None,
        qdev=device if isinstance(device, str) else "",
        names=tuple(map(printable, names)),
    )


def _files(inserted: Mapping[str, Any]) -> Iterator[str]:
    """Yield the file names of a node and of its backing nodes."""
    if isinstance(file := inserted.get("file"), str):
        yield file
    image = inserted.get("image")
    for _ in range(_MAX_DEPTH):
        if not isinstance(image, dict) or not isinstance(name := image.get("filename"), str):
            return
        yield name
        image = image.get("backing-image")


def _connections(nodes: object) -> dict[str, list[str]]:
    """For each file name, return the nodes that use this file over a network connection."""
    names: dict[str, list[str]] = {}
    for node in _list(nodes, "query-named-block-nodes"):
        match node:
            case {"node-name": str(name), "drv": str(driver), "file": str(file)}:
                if driver in NETWORK_DRIVERS:
                    names.setdefault(file, []).append(name)
            case _:
                raise _unreadable("query-named-block-nodes")
    return names


def _unsafe_files(nodes: object) -> frozenset[str]:
    """Return the file names of the nodes that are never flushed."""
    return frozenset(
        node["file"]
        for node in _list(nodes, "query-named-block-nodes")
        if isinstance(node, dict) and _is_unsafe(node) and isinstance(node.get("file"), str)
    )


def _is_unsafe(node: Mapping[str, Any]) -> bool:
    cache = node.get("cache")
    return isinstance(cache, dict) and cache.get("no-flush") is True


def _protocols(file: str) -> set[str]:
    """Return the drivers named in a file name from QEMU, which may be json:... or a URL."""
    if file.startswith("json:"):
        try:
            return set(_drivers(decode_json(file.removeprefix("json:").encode()), 0))
        except ValueError:
            return set()
    match = _URL.match(file)
    return {match[1]} if match else set()


def _drivers(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        for key, inner in value.items():
            if key == "driver" and isinstance(inner, str):
                yield inner
            yield from _drivers(inner, depth + 1)


def _list(answer: object, what: str) -> list[Any]:
    if not isinstance(answer, list):
        raise _unreadable(what)
    return answer


def _title(text: str) -> str:
    return printable(text, MAX_TITLE)


def _unreadable(what: str) -> MonitorProtocolError:
    return MonitorProtocolError(f"The reply to {what} does not have QEMU's format")
