"""What can be seen of a process from outside, at one moment. Raw counters, no opinion.

None is always "could not be read" and never "nothing": unknown is not idle. Counters only count
up from somewhere; what they mean lies in the difference of two samples.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Io:
    """/proc/PID/io of all threads, bytes and calls (kernel Documentation/filesystems/proc.rst)."""

    rchar: int
    wchar: int
    """Bytes through write(2) and its like: neither sendmsg, io_submit nor io_uring."""
    syscr: int
    syscw: int
    read_bytes: int
    write_bytes: int
    """Bytes dirtied or written past the page cache: not those that reached the disk."""
    cancelled_write_bytes: int


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread that stands in an I/O call or in uninterruptible sleep."""

    tid: int
    name: str
    """Printable."""
    state: str
    """proc(5): R, S, D, T, t, Z, …"""
    syscall: int | None
    """The number of the system call that it stands in, of this architecture; -1 for none."""
    io_call: bool | None
    """It stands in a call that reads, writes or syncs a file."""
    wchan: str | None
    """The kernel function that it sleeps in; "" where it sleeps in none."""


@dataclass(frozen=True, slots=True)
class Device:
    """A block device under an image, host-wide: whoever else uses it moves its counters too.

    Every layer is one, from the logical volume, partition or loop device that the image is or lies
    on down to the disks; so the same write may be counted by several.
    """

    number: str
    """MAJOR:MINOR."""
    name: str
    """As under /sys/block, printable."""
    writes: int
    """Completed: writes, flushes, discards. /sys/dev/block/*/stat, kernel
    Documentation/block/stat.rst."""
    sectors_written: int
    """Of 512 bytes."""
    reads: int
    in_flight: int
    depth: int = 0
    """Layers above it. The deeper, the more others use it; but one below may work where one above
    stands still, as a loop device does while it waits for one flush."""
    own: bool = False
    """The process has the device itself open, with no file system between, so hardly anybody else
    does."""
    writable: bool = True
    """An image on it is open for writing; else for reading alone."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The control group that the process is in."""

    own: bool
    """Nothing but this guest is in it (as far as its name and its processes tell)."""
    dirty: int | None
    """Bytes of page cache not yet written."""
    writeback: int | None
    """Bytes on their way to a disk."""
    written: int | None
    """Bytes written to disks (io.stat, blkio.throttle.io_service_bytes)."""
    writes: int | None
    frozen: bool | None


@dataclass(frozen=True, slots=True)
class Memory:
    """/proc/meminfo: the whole host's, bytes."""

    dirty: int
    writeback: int


@dataclass(frozen=True, slots=True)
class Socket:
    """A connected stream socket of the process, by sock_diag(7)."""

    inode: int
    family: str
    """unix or tcp."""
    client: bool
    """The process connected it, as QEMU does to a storage server, and did not accept it."""
    send_queue: int
    """Bytes. May be 0 all the time while a request waits for its answer."""
    receive_queue: int
    unacked: int | None = None
    """TCP: segments sent and not acknowledged."""
    acked: int | None = None
    """TCP: bytes acknowledged so far, tcp_info."""
    received: int | None = None
    """TCP: bytes received so far."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system under an image that has no block device to be watched: a network's, FUSE, …

    One without any counters (only NFS has some, /proc/PID/mountstats) says that there is storage
    of which nothing can be seen.
    """

    kind: str
    """nfs, nfs4, fuse.sshfs, 9p, ceph, cifs, zfs, … Printable."""
    operations: int | None
    """Answered by the server with success. None: not counted, or not to be read."""
    written: int | None
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Sample:
    at: int
    """CLOCK_MONOTONIC, µs."""
    state: str
    """Of the main thread, proc(5)."""
    term_pending: bool | None = None
    """SIGTERM was sent and not yet taken (ShdPnd in /proc/PID/status)."""
    tracer: int | None = None
    """The process id of a debugger, 0 for none."""
    cpu: int | None = None
    """Clock ticks of all threads."""
    switches: int | None = None
    """Voluntary context switches of all threads: somebody was woken."""
    io: Io | None = None
    threads: tuple[Thread, ...] | None = None
    """() where no thread stands in an I/O call or in uninterruptible sleep."""
    exiting: bool | None = None
    """It has begun to exit and is not through with that: the kernel takes its memory apart, or
    waits for its I/O. No signal changes anything of that."""
    rings: int | None = None
    """Requests in flight on its io_urings; 0 where it has none."""
    direct: bool | None = None
    """It has a file or device open with O_DIRECT together with an AIO context."""
    devices: tuple[Device, ...] | None = None
    mounts: tuple[Mount, ...] | None = None
    sockets: tuple[Socket, ...] | None = None
    cgroup: Cgroup | None = None
    host: Memory | None = None
