"""Storage that is slow, or that stands still: a disk of the kernel's own, and an NBD server.

    slow_disk     a loop device whose writes the kernel throttles, with ext4 on it or bare
    nbd_server    nbdkit with a rate that can be changed while it runs, on a unix or TCP socket;
                  freeze() and thaw()

    python -m tests.lab.storage disk DIRECTORY MIB FILESYSTEM

makes a disk, says DEVICE MAJOR:MINOR, waits for the end of its input and takes the disk down again.
slow_disk() runs it so that this happens even where the process that asked for the disk is killed.
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
    """A block device that writes as fast as it is told to. All processes use it, slow or not."""

    device: Path
    """/dev/loopN."""
    number: str
    """MAJOR:MINOR."""
    directory: Path | None
    """Where its file system is mounted; None where it has none."""
    _v1: list[Path] = field(default_factory=list, repr=False)
    """blkio groups whose members are throttled."""
    _v2: Path | None = field(default=None, repr=False)

    def slow(self, bytes_per_second: int) -> None:
        """From now on; what waits already goes on at the new rate too."""
        self._set(bytes_per_second)

    def fast(self) -> None:
        """As fast as the machine can."""
        self._set(_UNLIMITED)

    def written(self) -> int:
        """Bytes so far. /sys/dev/block/*/stat, kernel Documentation/block/stat.rst."""
        return 512 * int(Path(f"/sys/dev/block/{self.number}/stat").read_text().split()[6])

    def join(self, pid: int) -> None:
        """Makes the writes of this process slow.

        In cgroup v1 those of every process are that is in no blkio group of its own, and this takes
        it out of one; in v2 only those of the processes that join, and of what they start from then
        on.
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
    """A loop device, fast until slow() unless `bytes_per_second` is given.

    It throttles what reaches the device: O_DIRECT writes, writeback and so fsync. A process that
    waits for it is in uninterruptible sleep and dies no sooner than its write is done: the disk is
    made fast before anything is taken down, so end the guest after that or be patient. Raises
    needs.Missing where this is not root or the kernel does not throttle.
    """
    needs.root("a loop device")
    for name in ("losetup", "mount", "umount"):
        needs.program(name, "mount")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("d"))
        v1, v2 = _throttles(stack)
        # In a session of its own and without a parent-death signal: it has to outlive this process.
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
        assert len(said) == 2, "the loop device could not be made, see above"
        mounted = directory / "mnt" if filesystem else None
        disk = SlowDisk(Path(said[0]), said[1], mounted, v1, v2)
        stack.callback(disk.fast)
        disk._set(bytes_per_second)
        yield disk


def _throttles(stack: contextlib.ExitStack) -> tuple[list[Path], Path | None]:
    """The groups in which the kernel can throttle: of blkio in v1, else a new one of v2."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        if after[0] == "cgroup" and "blkio" in after[-1].split(","):
            root = Path(before[4])
            # Writeback is the root group's in v1, the rest that of whoever writes.
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
        " (v2) controller at hand: run on the machine itself or in a container with its cgroups"
    )


def _group_v2(stack: contextlib.ExitStack, top: Path) -> Path:
    """A group of v2 that accounts writeback to who dirtied the page, which takes both controllers.

    Right below the root: a group with processes in it, as this one's own is, passes none on.
    """
    control = top / "cgroup.subtree_control"
    for controller in {"io", "memory"} - set(control.read_text().split()):
        control.write_text(f"+{controller}")
        stack.callback(control.write_text, f"-{controller}")
    return stack.enter_context(temporary_group(top))


@dataclass
class NbdServer:
    """An nbdkit that serves one file."""

    uri: str
    """For -drive file= and qemu-img."""
    process: subprocess.Popen[bytes]
    _rate: Path = field(repr=False)

    def rate(self, bits_per_second: str | None) -> None:
        """As nbdkit takes it ("400K"); None for no limit.

        Holds for each request that comes from now on; one that waits already waits as it began.
        """
        new = self._rate.with_suffix(".new")
        if bits_per_second is None:
            self._rate.unlink(missing_ok=True)
        else:
            new.write_text(bits_per_second)
            new.rename(self._rate)

    def freeze(self) -> None:
        """It answers nothing from now on; its connections stay. Returns when it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        # The wait takes the news of the stop alone and leaves the end to Popen.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """It goes on where it was."""
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
    """Serves `file` on a unix socket, or on TCP (loopback, a free port); it can be used at once.

    room         bytes the file is extended to first: nbdkit does not grow it, which a qcow2 needs
    filters      more of nbdkit's, between the rate and the file ("error", "delay")
    parameters   for these ("error-pwrite=EIO", "wdelay=5")

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
        # It finds the socket by systemd's protocol (sd_listen_fds(3)), which needs its own pid.
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
    """Makes the disk, waits, and takes it down whatever it is in the middle of."""
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
        # In one write: whoever asked reads one line.
        sys.stdout.write(f"{device} {number}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        _unthrottle(Path(device))
        _take_down(mounted, device)
        image.unlink(missing_ok=True)


def _unthrottle(device: Path) -> None:
    """For where the one who asked was killed: otherwise there is nothing to do any more."""
    number = Path("/sys/block", device.name, "dev").read_text().strip()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        directory = Path(line.split()[4])
        if "cgroup" not in line.partition(" - ")[2].split()[0]:
            continue
        for rule in directory.rglob("blkio.throttle.write_bps_device"):
            with contextlib.suppress(OSError):
                if number in rule.read_text():
                    rule.write_text(f"{number} 0")


def _take_down(mounted: Path, device: str) -> None:
    """For 30 s it waits for those who use it; then the kernel does so in our place."""
    deadline = time.monotonic() + 30
    while os.path.ismount(mounted):
        lazy = ["--lazy"] if time.monotonic() > deadline else []
        if run(["umount", *lazy, mounted]).returncode:
            # No event tells that a file system is no longer in use.
            time.sleep(0.05)
    # A device in use goes when it is closed for the last time.
    run(["losetup", "--detach", device], check=True)


if __name__ == "__main__":
    _keep_disk(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
