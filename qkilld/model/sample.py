"""Raw counters of a process, read from outside at one moment, without judgement.

None always means unreadable, never "nothing", so it never counts as idle. Counters start at any
value and only grow, so only the difference of two samples has a meaning.
"""

from __future__ import annotations

from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Io:
    """/proc/PID/io of all threads, bytes and calls (kernel Documentation/filesystems/proc.rst)."""

    rchar: int
    wchar: int
    """Bytes passed to write(2) and similar calls, without sendmsg, io_submit and io_uring."""
    syscr: int
    syscw: int
    read_bytes: int
    write_bytes: int
    """Bytes dirtied in the page cache, or written without it. It does not count the bytes that
    reached the disk."""
    cancelled_write_bytes: int


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread that is in uninterruptible sleep, waits in a call that is not for events, or is
    stopped although the first thread is not."""

    tid: int
    name: str
    """Printable."""
    state: str
    """proc(5): R, S, D, T, t, Z, …"""
    syscall: int | None
    """The number of the system call, by this architecture's table; -1 for none, None if unknown."""
    io_call: bool | None
    """Whether the call reads, writes, syncs or closes a file or disk."""
    wchan: str | None
    """The kernel function that it sleeps in; "" if it does not sleep."""
    call: str = ""
    """The name of the system call, "" if it is not in our list."""
    descriptor: int | None = None
    """The descriptor that the call works on."""
    target: str = ""
    """The kind of that descriptor: disk, mount, pipe, socket, other; "" if unknown."""
    disks: tuple[str, ...] = ()
    """MAJOR:MINOR of each block device under that descriptor."""
    mount: str = ""
    """MAJOR:MINOR of the file system under that descriptor, if it has no block device."""
    switches: int | None = None
    """The thread's voluntary context switches."""
    first: bool = False
    """Whether it is the process's first thread, which takes SIGTERM and runs QEMU's main loop."""


@dataclass(frozen=True, slots=True)
class Device:
    """A block device under an image. Its counters are those of the whole host: other processes move
    them, too.

    Each layer is a Device of its own, from the logical volume, partition or loop device that the
    image is or lies on, down to the disks. So several Devices may count the same write.
    """

    number: str
    """MAJOR:MINOR."""
    name: str
    """The name under /sys/block, printable."""
    writes: int
    """Completed writes, flushes and discards. /sys/dev/block/*/stat, kernel
    Documentation/block/stat.rst."""
    sectors_written: int
    """In units of 512 bytes."""
    reads: int
    in_flight: int
    depth: int = 0
    """The number of layers above it. A deeper device has more other users. But it may be at work
    while an upper device stands still, such as a loop device that waits for one flush."""
    own: bool = False
    """Whether the process has the device itself open, without a file system between, so that other
    users are unlikely."""
    writable: bool = True
    """Whether an image on the device is open for writing, not only for reading."""
    above: tuple[str, ...] = ()
    """MAJOR:MINOR of the devices with depth 0 that lie on this one; () if its own depth is 0, or if
    they are unknown."""
    accounting: bool | None = None
    """Whether the kernel counts its requests: an administrator can switch that off, and some
    drivers do not count. None if unknown, as in older traces."""
    only_reads: bool = False
    """Whether reads are in flight, and no writes. Then a flush may also be in flight, which nothing
    shows. This is only read for a device with layers below it."""
    hides_flush: bool = False
    """Whether it may be flushing although it has no request in flight: a loop device before Linux
    6.16, which may write its whole backing file for a flush."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The control group that the process is in."""

    own: bool
    """Whether the group contains only this guest, judging by its name and its processes."""
    dirty: int | None
    """Bytes of page cache not yet written."""
    writeback: int | None
    """Bytes being written to a disk."""
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
    """The process at the other end of a local connection, and its activity."""

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
    """Whether the peer has other clients than this process."""
    place: tuple[str, ...] = ()
    """MAJOR:MINOR of the storage under the image that the peer serves to this process: block
    devices, or a file system without one. () if unknown."""
    behind: tuple[Peer, ...] = ()
    """Servers on this host that the peer uses itself, and processes that it has started and may
    wait for."""
    unread: int | None = None
    """Bytes that the process has sent to the peer, and that the peer has not read."""
    parent: int = 0
    """The parent of the peer if it runs the same program; 0 if it does not. Such a parent has most
    likely forked the peer for this connection."""
    leaves: bool | None = False
    """Whether the peer exits by itself when its client disconnects, according to its command line;
    None if that was not read in time."""
    behind_unknown: bool = False
    """Whether `behind` may lack servers: the process at the other end of a connection was not
    found, the connections could not be read, or the sample has no room for more servers."""
    serves: tuple[str, ...] = ()
    """MAJOR:MINOR of the FUSE file systems that the peer serves to the process before it, if it is
    part of `behind` and serves only that process; () if not."""
    certain: bool = True
    """Whether it certainly works for the process before it. Otherwise the kernel does not tell
    which process serves the file system, or that process has started it."""
    unseen_requests: bool | None = None
    """Whether the peer may have requests to its files in flight without a thread that waits for
    them: on an io_uring, or asynchronous ones."""


@dataclass(frozen=True, slots=True)
class Socket:
    """A connected stream socket of the process, by sock_diag(7)."""

    inode: int
    family: str
    """unix or tcp."""
    client: bool
    """Whether the process made the connection with connect(2), as QEMU does for storage. Otherwise
    it accepted the connection."""
    send_queue: int
    """Bytes. 0 does not mean idle, because a request may wait for its reply."""
    receive_queue: int
    unacked: int | None = None
    """TCP: segments sent and not acknowledged."""
    acked: int | None = None
    """TCP: bytes acknowledged so far, tcp_info."""
    received: int | None = None
    """TCP: bytes received so far."""
    role: str = "unknown"
    """The purpose of the connection, according to the command line: storage, other, or unknown."""
    node: str = ""
    """The name of the node, in Sample.nodes, that the connection belongs to."""
    peer: Peer | None = None
    """None if the peer is not local, or was not searched for."""
    accepted: bool = False
    """Whether the connection was accepted. On a unix socket, the process itself must have accepted
    it and still listen; on TCP, any process may have listened on the local port. False for a pair
    of sockets."""
    tcp_id: str = ""
    """For a TCP connection that is known to be for storage: both addresses in the form of
    sock_diag(7), as hexadecimal digits. "" for others."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of QEMU's block graph whose storage is remote, by the command line."""

    name: str
    """Printable."""
    protocol: str
    """nbd, iscsi, ssh, vhost-user, …"""
    export: str = ""
    """For NBD: the export that QEMU requests from the server. Printable."""
    reconnect: int | None = None
    """How many seconds QEMU keeps requests for a lost server. This is the reconnect-delay of NBD,
    and almost infinite with iSCSI. None if unknown."""
    served: bool | None = None
    """Whether a process on this host listens at the server's address; None if unknown."""
    read_only: bool = False
    """Whether QEMU never writes to it."""
    group: str = ""
    """A name that nodes share if their connections cannot be told apart, because their servers have
    the same path or port. It is the name of the first of them; "" if there is no other."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system under an image without a block device: a network file system, FUSE, …

    Only NFS has counters (/proc/PID/mountstats). For FUSE, its servers show progress. For other
    types, nothing does.
    """

    kind: str
    """nfs, nfs4, fuse.sshfs, 9p, ceph, cifs, zfs, … Printable."""
    operations: int | None
    """Operations that the server answered with success; None if not counted or unreadable."""
    written: int | None
    """Bytes."""
    number: str = ""
    """MAJOR:MINOR; "" if unknown."""
    waiting: int | None = None
    """FUSE: requests that the server has not answered."""
    servers: tuple[Peer, ...] | None = None
    """FUSE: the processes that serve it; None if they were not searched for or not found."""
    certain: bool = False
    """Whether all of `servers` serve it. If not, it is unknown which of them do."""


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """The place of an image that is open for writing. This is only read if Sample.mounts is not
    empty."""

    names: tuple[str, ...]
    """The names of the nodes that use the image, according to the command line; () if the image was
    added later, or if the command line names a link to it."""
    mount: str
    """MAJOR:MINOR of its file system, if that has no block device; "" if the image lies on block
    devices."""


@dataclass(frozen=True, slots=True)
class Sample:
    at: int
    """CLOCK_MONOTONIC, µs."""
    state: str
    """The state of the main thread, proc(5)."""
    missed: bool = False
    """Whether qkilld had no thread to take the sample, because processes of other users block them.
    Then all else is unknown, and nothing can be concluded from the time since the last sample."""
    term_pending: bool | None = None
    """Whether SIGTERM was sent and is not handled yet (ShdPnd in /proc/PID/status)."""
    tracer: int | None = None
    """The process id of a debugger, 0 for none."""
    cpu: int | None = None
    """Clock ticks of all threads."""
    switches: int | None = None
    """Voluntary context switches of all threads: they grow when a thread is woken."""
    io: Io | None = None
    threads: tuple[Thread, ...] | None = None
    """() if no thread waits in a call or in uninterruptible sleep."""
    exiting: bool | None = None
    """Whether the process is exiting: the kernel frees its memory or waits for its I/O, and no
    signal has an effect."""
    rings: int | None = None
    """Requests in flight on its io_urings; 0 if it has none."""
    timers: int = 0
    """How many of `rings` may be timers rather than requests to disks."""
    direct: bool | None = None
    """Whether the process has an AIO context, and a file or device open with O_DIRECT."""
    devices: tuple[Device, ...] | None = None
    mounts: tuple[Mount, ...] | None = None
    sockets: tuple[Socket, ...] | None = None
    cgroup: Cgroup | None = None
    host: Memory | None = None
    running: int | None = None
    """Threads that are running or runnable."""
    dumping: bool | None = None
    """Whether the kernel is writing its core dump."""
    completions: int | None = None
    """The sum of the tails of its AIO rings: it changes when requests complete."""
    nodes: tuple[Node, ...] | None = None
    """() if the command line names no storage behind a connection."""
    pluggable: bool | None = None
    """Whether storage may have been added that the command line does not name."""
    shared_memory: bool | None = None
    """Whether other processes may use the guest's memory, as vhost-user needs, by the command
    line."""
    formatted: int | None = None
    """Images open for writing that are not known to be raw: QEMU may keep data of them in
    memory."""
    images: tuple[ImagePlace, ...] | None = None
    """() if `mounts` is empty."""
    searching: bool = False
    """Whether the search for the servers of connections goes on, so that a later sample may have
    servers that this one lacks."""
    ringless: tuple[str, ...] = ()
    """MAJOR:MINOR of the devices on which no image has its requests on an io_uring, according to
    the command line. Also () if no ring has requests, or if that is unknown."""
