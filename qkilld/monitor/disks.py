"""A guest's disks over QMP: read their state, stop the virtual processors, flush, and resume.

No QMP command reports a failed flush: `stop` returns {}, no statistic counts the failure, and QEMU
exits with 0 (measured, 7.2). But a flush through a read-only NBD export reports the failure. The
processors are stopped first, because running processors could write after the flush, and because
QEMU's export code has failed an assertion while they ran (QEMU issue 945).

The export must be readable only by qkilld. So QEMU's NBD server gets a listening socket whose name
the kernel has chosen, and accepts a fixed number of connections. qkilld makes all of them, and adds
an export only after the server has greeted each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from qkilld.foreign_descriptors import take_over
from qkilld.model.block_state import BackgroundJob, BlockState, FlushResult, GuestDisk, RequestQueue
from qkilld.model.errors import CommandRefused, MonitorError, MonitorTimeout
from qkilld.model.text import printable
from qkilld.monitor import answers, block_answers
from qkilld.monitor.nbd import NbdConnection
from qkilld.monitor.qmp import QmpClient

QUERY_S: Final = 1.0
CONTINUE_S: Final = 30.0
"""Timeout of each command of `resume`: the monitor may have to finish earlier commands first."""
MAX_QUEUES: Final = 256
"""If a guest has this many queues or more, they count as unreadable, because reading each takes
0.3 ms (measured)."""
EXPORT_PREFIX: Final = "qkilld-"
"""Prefix of the ids of our exports."""
_LISTENER: Final = "qkilld-nbd"
_COMMAND_NAME: Final = re.compile(r"[#\w.-]{1,64}", re.ASCII)
"""A node name that the human monitor takes as one word."""
_DEVICE_NAME: Final = re.compile(r"[/\w][][/\w.-]{0,255}", re.ASCII)
"""A device id or path that the human monitor takes as one word, and not as an option."""
_VIRTIO_DISKS: Final = {"virtio-blk": 0, "virtio-scsi": 2}
"""Virtio devices with disks, and the number of their first request queue."""
_FOREIGN: Final = frozenset({"vhost-user-blk", "vhost-user-scsi", "vhost-scsi", "vhost-user-fs"})


async def read_state(qmp: QmpClient, *, files: bool = True) -> BlockState:
    """Read the disks, their requests in flight, and background jobs. Raises MonitorError.

    With `files`, QEMU's main thread asks the file system of each image for the image's size, and
    hangs if a file system does not answer. Without `files`, QEMU asks no file system, but the state
    includes read-only disks, lacks unused images, and does not show whether a disk has failed or is
    never flushed.
    """

    async def ask(command: str, **arguments: Any) -> Any:
        return await qmp.execute(command, arguments or None, timeout_s=QUERY_S)

    at = time.monotonic_ns() // 1000
    unused: tuple[str, ...] = ()
    runstate = answers.read_runstate(await ask("query-status"))
    if files:
        nodes = await ask("query-named-block-nodes", flat=True)
        blocks = await ask("query-block")
        disks = block_answers.read_disks(blocks, nodes)
        unused = block_answers.read_unused_images(blocks, nodes)
    else:
        disks = block_answers.read_disk_statistics(await ask("query-blockstats"))
    jobs = await read_jobs(qmp)
    queues: tuple[RequestQueue, ...] | None = None
    foreign: tuple[str, ...] = ()
    try:
        devices = block_answers.read_virtio_devices(await ask("x-query-virtio"))
        foreign = tuple(printable(name) for name, _ in devices if name in _FOREIGN)
        queues = await _read_queues(qmp, devices)
        disks = tuple([await _with_bus_path(qmp, disk, devices) for disk in disks])
    except CommandRefused:
        # QEMU before 7.2, or with -compat unstable-input=reject, does not report its queues.
        pass
    return BlockState(
        at=at,
        runstate=runstate,
        disks=disks,
        queues=queues,
        foreign=foreign,
        unused=unused,
        jobs=jobs,
    )


async def read_jobs(qmp: QmpClient) -> tuple[BackgroundJob, ...]:
    """Read the background jobs that would be cancelled if QEMU exited. Raises MonitorError."""
    jobs = block_answers.read_jobs(await qmp.execute("query-block-jobs", timeout_s=QUERY_S))
    migration = await qmp.execute("query-migrate", timeout_s=QUERY_S)
    return (*jobs, *block_answers.read_migration(migration))


async def _with_bus_path(
    qmp: QmpClient, disk: GuestDisk, devices: Sequence[tuple[str, str]]
) -> GuestDisk:
    """Return the disk. If the disk's device is not a virtio device, replace the device's path by
    the path of its bus. For a SCSI disk, this is the bus of its virtio controller."""
    if disk.device is None or disk.device in (path for _, path in devices):
        return disk
    arguments = {"path": disk.device, "property": "parent_bus"}
    try:
        bus = await qmp.execute("qom-get", arguments, timeout_s=QUERY_S)
    except CommandRefused:
        return disk
    return replace(disk, device=bus) if isinstance(bus, str) else disk


async def _read_queues(
    qmp: QmpClient, devices: Sequence[tuple[str, str]]
) -> tuple[RequestQueue, ...] | None:
    """Read the request queues of each disk device by number, until QEMU refuses a number because
    there is no such queue. Return None if there are MAX_QUEUES or more.

    x-query-virtio-status would return the number of queues, but is not used: it makes QEMU 11.1
    abort if no driver has started the device (measured).
    """
    queues: list[RequestQueue] = []
    for name, path in devices:
        if name not in _VIRTIO_DISKS:
            continue
        for number in itertools.count(_VIRTIO_DISKS[name]):
            if len(queues) >= MAX_QUEUES:
                return None
            arguments = {"path": path, "queue": number}
            try:
                queue = await qmp.execute(
                    "x-query-virtio-queue-status", arguments, timeout_s=QUERY_S
                )
            except CommandRefused:
                break
            queues.append(block_answers.read_queue(queue, path, number))
    return tuple(queues)


async def stop_processors(qmp: QmpClient, *, timeout_s: float) -> None:
    """Stop the processors. QEMU drains and flushes every disk, which blocks the monitor.

    Raises MonitorError. After a MonitorTimeout, QEMU may still stop the processors.
    """
    await qmp.execute("stop", timeout_s=timeout_s)


@dataclass(slots=True)
class ExportServer:
    """What is known about the NBD server in QEMU."""

    may_be_our_server: bool | None = None
    """Whether qkilld might have started the server over this connection; None if it might have done
    so over an earlier connection."""


async def flush(
    qmp: QmpClient,
    disks: Sequence[tuple[str, str]],
    server: ExportServer | None = None,
    *,
    timeout_s: float,
) -> tuple[FlushResult, ...]:
    """Flush nodes, given as (name, title), and report each result.

    The processors must be stopped. If QEMU does not answer in time, its NBD server may run until
    `resume` is called with the same `server`. If a command is not answered within QUERY_S, the
    results up to then are returned, and the other disks count as not tried.

    Raises MonitorError if no server can be started, and MonitorTimeout if a command times out
    before any disk has a result.
    """
    server = server or ExportServer()
    if server.may_be_our_server is None:
        server.may_be_our_server = False
    if not disks:
        return ()
    until = time.monotonic() + timeout_s
    results: list[FlushResult] = []
    why, refused = "QEMU did not answer in time", False
    with contextlib.ExitStack() as stack:
        try:
            async with asyncio.timeout(timeout_s):
                connections = await _serve(qmp, len(disks), stack, server)
                for number, ((node, title), one) in enumerate(zip(disks, connections, strict=True)):
                    results.append(await _flush_one(qmp, number, node, title, one))
        except TimeoutError:
            pass
        except MonitorTimeout as error:
            if not results:
                raise
            why, refused = printable(str(error)), True
        finally:
            # Close our connections first, because QEMU 7.2 waits in nbd-server-stop for connections
            # that are being negotiated.
            stack.close()
            remaining_s = max(until - time.monotonic(), QUERY_S / 10)
            if server.may_be_our_server:
                with contextlib.suppress(MonitorError):
                    await qmp.execute("nbd-server-stop", timeout_s=remaining_s)
                    server.may_be_our_server = False
    unfinished = disks[len(results) :]
    return (
        *results,
        *(FlushResult(node, title, why, refused=refused) for node, title in unfinished),
    )


async def flush_by_name(qmp: QmpClient, disk: GuestDisk, *, timeout_s: float) -> FlushResult:
    """Flush a disk while the processors run; QEMU does not report errors of the disk.

    The command names the disk's device if possible. If the command named a node, QEMU 8 and later
    would first wait for all requests of all disks (measured, 10.0 and 11.1). Raises MonitorError.
    After a MonitorTimeout, the monitor is blocked until the flush is done.
    """
    names = [f"-d {disk.qdev}"] if _DEVICE_NAME.fullmatch(disk.qdev) else []
    names += [disk.node] if _COMMAND_NAME.fullmatch(disk.node) else []
    why = "its name cannot be given to the monitor"
    until = time.monotonic() + timeout_s
    for name in names:
        try:
            remaining_s = max(until - time.monotonic(), 0.0)
            await qmp.hmp(f"qemu-io {name} flush", timeout_s=remaining_s)
        except CommandRefused as error:
            # QEMU 4.0 and older do not know the option -d, so try the node.
            why = printable(str(error))
        else:
            return FlushResult(disk.node, disk.title)
    return FlushResult(disk.node, disk.title, why, refused=True)


async def resume(qmp: QmpClient, server: ExportServer | None = None) -> None:
    """Undo everything that `stop_processors` and `flush` have done. Raises MonitorError.

    If QEMU's NBD server also has exports of another program, only our exports are removed. If the
    server has only our exports, it is stopped. If the server has no exports, it is stopped only if
    qkilld might have started it.
    """
    ids: tuple[str, ...] = ()
    with contextlib.suppress(CommandRefused):  # QEMU before 5.2 does not know exports.
        ids = block_answers.read_export_ids(
            await qmp.execute("query-block-exports", timeout_s=CONTINUE_S)
        )
    own = [one for one in ids if one.startswith(EXPORT_PREFIX)]
    if len(own) < len(ids):
        for one in own:
            with contextlib.suppress(CommandRefused):
                arguments = {"id": one, "mode": "hard"}
                await qmp.execute("block-export-del", arguments, timeout_s=CONTINUE_S)
    elif own or server is None or server.may_be_our_server is not False:
        with contextlib.suppress(CommandRefused):
            await qmp.execute("nbd-server-stop", timeout_s=CONTINUE_S)
    await qmp.execute("cont", timeout_s=CONTINUE_S)


async def _serve(
    qmp: QmpClient, count: int, stack: contextlib.ExitStack, server: ExportServer
) -> list[NbdConnection]:
    """Start an NBD server in QEMU that accepts `count` connections, and make all these connections.
    Raises MonitorError."""
    # Use take_over(), because any process may connect to this socket and send descriptors.
    listener = stack.enter_context(take_over(socket.socket(socket.AF_UNIX)))
    try:
        listener.bind("")  # The kernel chooses a name.
        listener.listen(count)
        sockets = [
            stack.enter_context(take_over(socket.socket(socket.AF_UNIX))) for _ in range(count)
        ]
        for one in sockets:
            one.connect(listener.getsockname())
    except OSError as error:
        raise MonitorTimeout(f"No connection for a flush could be made: {error.strerror}") from None
    await qmp.execute("getfd", {"fdname": _LISTENER}, timeout_s=QUERY_S, pass_fd=listener.fileno())
    address = {"type": "fd", "data": {"str": _LISTENER}}
    before, server.may_be_our_server = server.may_be_our_server, True
    try:
        await qmp.execute(
            "nbd-server-start", {"addr": address, "max-connections": count}, timeout_s=QUERY_S
        )
    except CommandRefused:
        server.may_be_our_server = before  # Another NBD server already runs in QEMU.
        raise
    connections = [NbdConnection(one) for one in sockets]
    for each in connections:
        await each.greet()
    return connections


async def _flush_one(
    qmp: QmpClient, number: int, node: str, title: str, connection: NbdConnection
) -> FlushResult:
    """Raises MonitorTimeout if the disk was not exported in time."""
    name = f"{EXPORT_PREFIX}{number}"
    export = {"type": "nbd", "id": name, "node-name": node, "name": name}
    try:
        await qmp.execute("block-export-add", export, timeout_s=QUERY_S)
        await connection.open_export(name)
        return FlushResult(node, title, await connection.flush())
    except MonitorTimeout:
        raise
    except MonitorError as error:
        return FlushResult(node, title, printable(str(error)), refused=True)
