"""Raw counters of a process, read from outside at one moment, without judgement.

None always means unreadable, never "nothing", so it never counts as idle. Counters start at any
value and only grow, so only their difference between two samples has a meaning.
"""

from __future__ import annotations

from typing import Final

from qkilld.model.dataclass import dataclass

FLUSH_CALLS: Final = frozenset(("fsync", "fdatasync", "sync_file_range", "syncfs", "sync", "msync"))
"""The system calls that write cached data to the storage and wait for it. See Thread.call."""


@dataclass(frozen=True, slots=True)
class Io:
    """/proc/PID/io: bytes and calls of all threads (kernel Documentation/filesystems/proc.rst)."""

    rchar: int
    wchar: int
    """Bytes passed to write(2) and similar calls, but not to sendmsg, io_submit and io_uring."""
    syscr: int
    syscw: int
    read_bytes: int
    write_bytes: int
    """Bytes dirtied in the page cache, or written without the page cache. Dirtied bytes may not
    have reached the disk yet."""
    cancelled_write_bytes: int


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread that waits. It is in uninterruptible sleep, or in a system call that waits for
    something other than events, or it is stopped while the first thread of its process is not."""

    tid: int
    name: str
    """Printable."""
    state: str
    """proc(5): R, S, D, T, t, Z, …"""
    syscall: int | None
    """The number of the system call on this architecture; -1 if the thread is in none, None if
    unknown."""
    io_call: bool | None
    """Whether the call reads, writes, syncs or closes a file or disk."""
    wchan: str | None
    """The kernel function in which the thread sleeps; "" if it does not sleep."""
    call: str = ""
    """The name of the system call; "" if unknown or none."""
    descriptor: int | None = None
    """The descriptor that the call works on."""
    target: str = ""
    """The kind of file behind this descriptor: disk, mount, pipe, socket, other; "" if unknown."""
    disks: tuple[str, ...] = ()
    """MAJOR:MINOR of each block device under the file."""
    mount: str = ""
    """MAJOR:MINOR of the file's file system, if that has no block device."""
    switches: int | None = None
    """The thread's voluntary context switches."""
    first: bool = False
    """Whether this is the process's first thread, which takes SIGTERM and runs QEMU's main loop."""


@dataclass(frozen=True, slots=True)
class Device:
    """A block device under an image. Its counters are those of the whole host: other processes
    increase them, too.

    Each layer is a separate Device: the logical volume, partition or loop device that holds the
    image, and all layers below it down to the disks. So several Devices may count the same write.
    """

    number: str
    """MAJOR:MINOR."""
    name: str
    """The name under /sys/block, printable."""
    writes: int
    """Completed writes, flushes and discards (/sys/dev/block/*/stat, kernel
    Documentation/block/stat.rst)."""
    sectors_written: int
    """The written data in units of 512 bytes."""
    reads: int
    in_flight: int
    depth: int = 0
    """The number of layers above the device. The deeper a device is, the more users share it. But
    its counters may change while the counters of the device above it do not, for example if a loop
    device waits for a flush."""
    own: bool = False
    """Whether the process has opened the device itself, not a file on it. If so, other users are
    unlikely."""
    writable: bool = True
    """Whether an image on the device is open for writing, not only for reading."""
    above: tuple[str, ...] = ()
    """MAJOR:MINOR of the devices with depth 0 that lie on this device; () if its own depth is 0, or
    if they are unknown."""
    accounting: bool | None = None
    """Whether the kernel counts the device's requests. Some drivers do not support this, and an
    administrator can disable it. None if unknown, as in older traces."""
    only_reads: bool = False
    """Whether reads are in flight, but no writes. A flush may also be in flight. Always False for
    devices without a layer below them."""
    hides_flush: bool = False
    """Whether the device may be flushing although it shows no request in flight. This is true of
    loop devices before Linux 6.16. A flush of such a device may write the whole backing file."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The control group that the process is in."""

    own: bool
    """Whether the group, according to its name and its processes, contains only this guest."""
    dirty: int | None
    """Bytes of the page cache that are not written yet."""
    writeback: int | None
    """Bytes of the page cache that are being written to a disk."""
    written: int | None
    """Bytes written to disks (io.stat, blkio.throttle.io_service_bytes)."""
    writes: int | None
    frozen: bool | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Values of the whole host from /proc/meminfo, in bytes."""

    dirty: int
    writeback: int


@dataclass(frozen=True, slots=True)
class Peer:
    """A server on this host, such as the process at the other end of a connection, and its
    activity."""

    pid: int
    command: str
    """Printable."""
    threads: tuple[Thread, ...] | None
    """The peer's own waiting threads, as in Sample.threads."""
    switches: int | None
    """The peer's own context switches, as in Sample.switches."""
    io: Io | None
    devices: tuple[Device, ...] | None
    """The block devices under its open files."""
    shared: bool | None = None
    """Whether the peer has clients other than this process; None if unknown."""
    place: tuple[str, ...] = ()
    """MAJOR:MINOR of the storage under the image that the peer serves to this process: block
    devices, or a file system without a block device. () if unknown."""
    behind: tuple[Peer, ...] = ()
    """Servers on this host that the peer uses itself, and processes that it has started and is
    possibly waiting for."""
    unread: int | None = None
    """Bytes that this process has sent to the peer and that the peer has not read yet."""
    parent: int = 0
    """The process that has most likely started the peer for this connection; 0 if there is none. If
    the peer does not listen for such connections, this is its nearest ancestor that does. If the
    parent has forked the peer, and the peer runs the same program, this is the parent."""
    leaves: bool | None = False
    """Whether the peer exits by itself when its client disconnects, according to its command line;
    None if the command line was not read in time."""
    behind_unknown: bool = False
    """Whether `behind` may lack servers: the process at the other end of a connection was not
    found, the connections were unreadable, or the sample has no room for more servers."""
    serves: tuple[str, ...] = ()
    """If this peer is in another peer's `behind`: the FUSE file systems (MAJOR:MINOR) that it
    serves to that peer. () if it serves none, or if several peers use this one."""
    certain: bool = True
    """If this peer is in another peer's `behind`: whether it certainly works for that peer. This is
    uncertain if the kernel does not show which process serves a file system, or if it is only known
    that the other peer has started this one."""
    unseen_requests: bool | None = None
    """Whether the peer may have file requests in flight, on an io_uring or in Linux AIO, for which
    no thread waits."""
    exchanged: int | None = None
    """Bytes that the peer has exchanged with its own servers, over TCP connections that it has
    made: those that were acknowledged, and those that it has read. None if unknown."""
    ended: int = 0
    """How many of these connections have ended since the peer was first sampled."""


@dataclass(frozen=True, slots=True)
class Socket:
    """A connected stream socket of the process (sock_diag(7))."""

    inode: int
    family: str
    """unix or tcp."""
    client: bool
    """Whether the process has made the connection with connect(2), as QEMU does for storage."""
    send_queue: int
    """Bytes in the send queue. Even if it is 0, a request may be waiting for its reply."""
    receive_queue: int
    unacked: int | None = None
    """TCP: segments that were sent and are not acknowledged yet."""
    acked: int | None = None
    """TCP: bytes acknowledged so far (tcp_info)."""
    received: int | None = None
    """TCP: bytes received so far."""
    role: str = "unknown"
    """The purpose of the connection, according to the command line: storage, other, or unknown."""
    node: str = ""
    """The name of the connection's node in Sample.nodes; "" for none."""
    peer: Peer | None = None
    """The server at the other end; None if it is not on this host, was not found, or was not
    searched for."""
    accepted: bool = False
    """Whether the connection was accepted. For a unix socket: whether the process itself still
    listens on the socket's path. For TCP: whether a process listened on the local port. False for a
    socketpair(2)."""
    tcp_id: str = ""
    """For a TCP connection that is known to be for storage: both addresses in the form of
    sock_diag(7), in hexadecimal digits. "" for other connections."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of QEMU's block graph whose storage is behind a connection, according to the command
    line."""

    name: str
    """Printable."""
    protocol: str
    """nbd, iscsi, ssh, vhost-user, …"""
    export: str = ""
    """For NBD: the export that QEMU requests from the server. Printable."""
    reconnect: int | None = None
    """How long (s) QEMU keeps requests after it has lost the server: for NBD, the reconnect-delay;
    for iSCSI, almost infinite. None if unknown."""
    served: bool | None = None
    """Whether a process on this host listens at the server's address; None if unknown."""
    read_only: bool = False
    """Whether QEMU never writes to the node."""
    group: str = ""
    """If the connections of several nodes cannot be told apart, because their servers have the same
    path or port: the name of the first of these nodes. Otherwise ""."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system without a block device that contains an image: a network file system, FUSE, …

    Only NFS has counters (/proc/PID/mountstats). For FUSE, the activity of the servers shows
    progress. For other types, nothing shows progress.
    """

    kind: str
    """nfs, nfs4, fuse.sshfs, 9p, ceph, cifs, zfs, … Printable."""
    operations: int | None
    """Operations that the server has answered with success; None if not counted or unreadable."""
    written: int | None
    """Bytes."""
    number: str = ""
    """MAJOR:MINOR; "" if unknown."""
    waiting: int | None = None
    """FUSE: requests that the server has not answered."""
    servers: tuple[Peer, ...] | None = None
    """FUSE: the processes that serve the file system; None if they were not searched for or not
    found; () if too many processes may serve it, and nothing shows which of them do."""
    certain: bool = False
    """Whether all of `servers` serve the file system; if not, it is unknown which of them do."""


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """The place of an image that is open for writing."""

    names: tuple[str, ...]
    """The names of the nodes that use the image, according to the command line; () if the image was
    added later, or if the command line names a link to it."""
    mount: str
    """MAJOR:MINOR of the image's file system; "" if the image lies on block devices."""


@dataclass(frozen=True, slots=True)
class Sample:
    at: int
    """CLOCK_MONOTONIC, µs."""
    state: str
    """The state of the main thread, proc(5)."""
    missed: bool = False
    """Whether qkilld had no free thread for the sample, because processes of other users block its
    threads. All other values are unknown then, and the time since the last sample proves
    nothing."""
    term_pending: bool | None = None
    """Whether the process has a pending SIGTERM (ShdPnd in /proc/PID/status)."""
    tracer: int | None = None
    """The process id of the debugger; 0 for none."""
    cpu: int | None = None
    """The processor time of all threads, in clock ticks."""
    switches: int | None = None
    """Voluntary context switches of all threads. The number grows when a thread is woken."""
    io: Io | None = None
    threads: tuple[Thread, ...] | None = None
    """The waiting threads; () if none waits."""
    exiting: bool | None = None
    """Whether the process is exiting: the kernel frees its memory or waits for its I/O, so signals
    have no effect."""
    rings: int | None = None
    """Requests in flight on the process's io_urings; 0 if it has no io_uring."""
    timers: int = 0
    """How many of the requests in `rings` may be timers."""
    direct: bool | None = None
    """Whether the process has an AIO context, and a file or device open with O_DIRECT."""
    devices: tuple[Device, ...] | None = None
    mounts: tuple[Mount, ...] | None = None
    sockets: tuple[Socket, ...] | None = None
    cgroup: Cgroup | None = None
    host: Memory | None = None
    running: int | None = None
    """The number of threads that are running or runnable."""
    dumping: bool | None = None
    """Whether the kernel is writing a core dump of the process."""
    completions: int | None = None
    """The sum of the tails of the process's AIO rings, which changes when requests complete."""
    nodes: tuple[Node, ...] | None = None
    """The nodes behind connections; () if the command line names none."""
    pluggable: bool | None = None
    """Whether storage that the command line does not name may have been added."""
    shared_memory: bool | None = None
    """Whether other processes can use the guest's memory, as vhost-user requires, according to the
    command line."""
    formatted: int | None = None
    """The number of images open for writing that are not known to be raw. QEMU may keep data of
    such images in memory."""
    images: tuple[ImagePlace, ...] | None = None
    """The images open for writing; () if `mounts` is empty."""
    searching: bool = False
    """Whether a search for the servers of connections is in progress. If so, a later sample may
    have servers that are missing in this one."""
    ringless: tuple[str, ...] = ()
    """MAJOR:MINOR of the devices that no io_uring is used for, according to the command line; () if
    unknown, or if no ring has requests."""
