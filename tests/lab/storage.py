"""Storage that is slow or hangs: a throttled disk, and an NBD server.

    slow_disk     a loop device whose writes the kernel throttles, with ext4 or without
    nbd_server    nbdkit on a unix or TCP socket, with a rate that can be changed while it runs; it
                  can be frozen and thawed

    python -m tests.lab.storage disk DIRECTORY MIB FILESYSTEM

This command makes a disk, prints DEVICE MAJOR:MINOR, waits for the end of its input and removes the
disk. slow_disk() runs the command, so that the disk is removed even if the process of slow_disk()
is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.groups import temporary_group
from tests.lab.process import TOP, end, run, spawn
from tests.lab.scratch import scratch

_UNLIMITED: Final = 0


@dataclass
class SlowDisk:
    """A block device with a variable write rate, shared by all processes."""

    device: Path
    """/dev/loopN."""
    number: str
    """MAJOR:MINOR."""
    directory: Path | None
    """The mount point; None without a file system."""
    _v1: list[Path] = field(default_factory=list, repr=False)
    """The blkio groups (cgroup v1) whose members are throttled."""
    _v2: Path | None = field(default=None, repr=False)

    def slow(self, bytes_per_second: int) -> None:
        """Limit the rate of writes, including pending ones."""
        self._set(bytes_per_second)

    def fast(self) -> None:
        """Remove the limit."""
        self._set(_UNLIMITED)

    def written(self) -> int:
        """Return the bytes written so far. Source: /sys/dev/block/*/stat, kernel
        Documentation/block/stat.rst."""
        return 512 * int(Path(f"/sys/dev/block/{self.number}/stat").read_text().split()[6])

    def join(self, pid: int) -> None:
        """Throttle the writes of this process.

        In cgroup v1, every process outside of blkio groups is throttled, so this function moves the
        process out of its group. In v2, only processes that join and their later children are
        throttled.
        """
        for group in self._v1 if self._v2 is None else [self._v2]:
            (group / "cgroup.procs").write_text(str(pid))

    def _set(self, rate: int) -> None:
        for group in self._v1:
            (group / "blkio.throttle.write_bps_device").write_text(f"{self.number} {rate}")
        if self._v2 is not None:
            limit = rate or "max"
            (self._v2 / "io.max").write_text(f"{self.number} wbps={limit}")


@contextlib.contextmanager
def slow_disk(
    bytes_per_second: int = _UNLIMITED, *, mebibytes: int = 256, filesystem: str | None = "ext4"
) -> Iterator[SlowDisk]:
    """Within the context, make a loop device. It is fast until slow() is called, unless
    `bytes_per_second` is given.

    The limit applies to writes to the device: O_DIRECT writes, writeback, and therefore fsync. A
    process that waits for the device sleeps uninterruptibly until its write is done. At the end,
    the limit is removed before the disk. Raises needs.Missing without root, or if the kernel cannot
    throttle.
    """
    needs.root("a loop device")
    for name in ("losetup", "mount", "umount"):
        needs.program(name, "mount")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("d"))
        v1, v2 = _throttles(stack)
        # The keeper has its own session and no parent-death signal, because it must outlive this
        # process.
        keeper = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.lab.storage", "disk"),
                *(str(directory), str(mebibytes), filesystem or ""),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=TOP,
            start_new_session=True,
        )
        stack.callback(keeper.communicate)
        assert keeper.stdout is not None
        said = keeper.stdout.readline().decode().split()
        assert len(said) == 2, "failed to make the loop device, see the messages above"
        mounted = directory / "mnt" if filesystem else None
        disk = SlowDisk(Path(said[0]), said[1], mounted, v1, v2)
        stack.callback(disk.fast)
        disk._set(bytes_per_second)
        yield disk


def _throttles(stack: contextlib.ExitStack) -> tuple[list[Path], Path | None]:
    """Return the groups whose writes the kernel can throttle: groups of blkio in v1, or a new group
    in v2."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        if after[0] == "cgroup" and "blkio" in after[-1].split(","):
            root = Path(before[4])
            # In v1, writeback is charged to the root group, and other writes to the writer's group.
            path = next(line.split(":", 2)[2] for line in own if "blkio" in line.split(":")[1])
            groups = {root, root / os.path.relpath(path, before[3])}
            if all((group / "blkio.throttle.write_bps_device").exists() for group in groups):
                return sorted(groups), None
        if after[0] == "cgroup2":
            top = Path(before[4])
            if "io" in (top / "cgroup.controllers").read_text().split():
                return [], _group_v2(stack, top)
    raise needs.Missing(
        "a slow disk needs a kernel with CONFIG_BLK_DEV_THROTTLING, and the blkio (cgroup v1) or io"
        " (v2) controller: run on the machine itself or in a container with the machine's cgroups"
    )


def _group_v2(stack: contextlib.ExitStack, top: Path) -> Path:
    """Make a v2 group with the controllers io and memory; both are needed to throttle writeback.

    The group is directly below the root, because a group with processes, such as our own, cannot
    delegate controllers.
    """
    control = top / "cgroup.subtree_control"
    for controller in {"io", "memory"} - set(control.read_text().split()):
        control.write_text(f"+{controller}")
        stack.callback(control.write_text, f"-{controller}")
    return stack.enter_context(temporary_group(top))


@dataclass
class NbdServer:
    """A running nbdkit that serves one file."""

    uri: str
    """The URI for -drive file= and qemu-img."""
    process: subprocess.Popen[bytes]
    _rate: Path = field(repr=False)

    def rate(self, bits_per_second: str | None) -> None:
        """Limit the rate of later requests, in nbdkit's format ("400K"); None for no limit.

        Pending requests keep their rate.
        """
        new = self._rate.with_suffix(".new")
        if bits_per_second is None:
            self._rate.unlink(missing_ok=True)
        else:
            new.write_text(bits_per_second)
            new.rename(self._rate)

    def freeze(self) -> None:
        """Stop nbdkit with SIGSTOP, and return when it has stopped; its connections stay open."""
        self.process.send_signal(signal.SIGSTOP)
        # Wait only for the stop. Popen must get the exit status.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Continue nbdkit."""
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def nbd_server(
    file: Path,
    *,
    tcp: bool = False,
    rate: str | None = None,
    room: int = 0,
    filters: Sequence[str] = (),
    parameters: Sequence[str] = (),
) -> Iterator[NbdServer]:
    """Within the context, serve `file` on a unix socket or on TCP (loopback, a free port). The
    server is ready at entry.

    room: make the file this large (bytes) first, because a qcow2 grows, but nbdkit grows no files
    filters: more nbdkit filters between the rate and the file ("error", "delay")
    parameters: parameters of these filters ("error-pwrite=EIO", "wdelay=5")

    Raises needs.Missing without nbdkit.
    """
    nbdkit = needs.program("nbdkit", "nbdkit")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("n"))
        if room > file.stat().st_size:
            os.truncate(file, room)
        listener = stack.enter_context(socket.socket(socket.AF_INET if tcp else socket.AF_UNIX))
        if tcp:
            listener.bind(("127.0.0.1", 0))
            uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}"
        else:
            listener.bind(str(directory / "socket"))
            uri = f"nbd+unix:///?socket={directory / 'socket'}"
        listener.listen()
        rate_file = directory / "rate"
        # nbdkit gets the socket by systemd's protocol (sd_listen_fds(3)), which requires nbdkit's
        # pid.
        socket_activation = 'exec 3<&0 0</dev/null; export LISTEN_FDS=1 LISTEN_PID="$$"; exec "$@"'
        argv: list[str | os.PathLike[str]] = ["sh", "-c", socket_activation, "sh", nbdkit]
        argv += ["--foreground", "--threads=16", "--filter=rate"]
        argv += [f"--filter={name}" for name in filters]
        argv += ["file", file, f"rate-file={rate_file}", *parameters]
        process = spawn(argv, stdin=listener.fileno())
        stack.callback(end, process)
        server = NbdServer(uri, process, rate_file)
        server.rate(rate)
        yield server


def _keep_disk(directory: Path, mebibytes: int, filesystem: str) -> None:
    """Make the disk, wait for the end of the input, and remove the disk even if it is in use."""
    image, mounted = directory / "disk", directory / "mnt"
    image.touch()
    os.truncate(image, mebibytes << 20)
    device = run(["losetup", "--find", "--show", image], check=True).stdout.strip()
    try:
        number = Path("/sys/block", Path(device).name, "dev").read_text().strip()
        if filesystem:
            mkfs = needs.program(f"mkfs.{filesystem}", "e2fsprogs")
            run([mkfs, "-q", device], check=True)
            mounted.mkdir()
            run(["mount", device, mounted], check=True)
        # Write this at once, because the reader expects one line.
        sys.stdout.write(f"{device} {number}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        _unthrottle(Path(device))
        _take_down(mounted, device)
        image.unlink(missing_ok=True)


def _unthrottle(device: Path) -> None:
    """Remove limits that an earlier, killed process has left."""
    number = Path("/sys/block", device.name, "dev").read_text().strip()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        directory = Path(line.split()[4])
        if "cgroup" not in line.partition(" - ")[2].split()[0]:
            continue
        # Groups may disappear meanwhile, and then rglob() fails.
        for group, _, _ in os.walk(directory):
            rule = Path(group, "blkio.throttle.write_bps_device")
            with contextlib.suppress(OSError):
                if number in rule.read_text():
                    rule.write_text(f"{number} 0")


def _take_down(mounted: Path, device: str) -> None:
    """Remove the disk. Wait up to 30 s until nobody uses it. If somebody still uses it, the kernel
    removes it at its last close."""
    deadline = time.monotonic() + 30
    while os.path.ismount(mounted):
        lazy = ["--lazy"] if time.monotonic() > deadline else []
        if run(["umount", *lazy, mounted]).returncode:
            # No event reports that a file system is no longer in use.
            time.sleep(0.05)
    # A device in use is removed at its last close.
    run(["losetup", "--detach", device], check=True)


if __name__ == "__main__":
    _keep_disk(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
