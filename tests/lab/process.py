"""Child processes that never outlive the process that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from tests.lab import needs

TOP: Final = Path(__file__).resolve().parents[2]
"""The checkout."""

OTHER_UID: Final = 65534
"""The uid of the user nobody, who is in every /etc/passwd. A bus rejects unknown users."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None, use_errno=True)

_DEFAULT: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

Stream = int | IO[Any] | None


def become_subreaper() -> None:
    """Make orphaned descendants our children, so that the check for leaks finds them."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent ends.

    Without this, a worker of pytest-xdist would continue to run for up to 15 s.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    executable: Path | None = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    uid: int | None = None,
    pass_fds: Sequence[int] = (),
    before: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program that dies with us. It has its own session, so that Ctrl-C does not reach it.

    In the program, signals in _DEFAULT have their default action, even if this process ignores
    them. (A shell ignores SIGINT in programs started with `&`, and nohup(1) ignores SIGHUP.)

    `uid`: run as this user, with only the group of the same number; needs root. `before` is called
    in the child just before exec. Raises what Popen raises.
    """

    if uid is not None:
        needs.root("to run a program as another user")
    parent = os.getpid()

    def prepare() -> None:
        for number in _DEFAULT:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Change the user before the call below. A change of user clears the parent-death signal, so
        # Popen's user= cannot be used.
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # The parent died before the call above.
            os._exit(1)
        if before is not None:
            before()

    return subprocess.Popen(
        [os.fspath(arg) for arg in argv],
        executable=executable,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=cwd,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=prepare,
    )


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    input: str | None = None,
    timeout: float = 60,
    check: bool = False,
    env: Mapping[str, str] | None = None,
    uid: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run with captured text. With `check`, the exception contains the output."""
    process = spawn(
        argv,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        uid=uid,
    )
    try:
        return communicate(process, input=input, timeout=timeout, check=check)
    finally:
        end(process)


def communicate(
    process: subprocess.Popen[bytes], *, input: str | None, timeout: float, check: bool
) -> subprocess.CompletedProcess[str]:
    """Wait for a process whose stdout and stderr are pipes, and return its output."""
    out, err = process.communicate(None if input is None else input.encode(), timeout)
    done = subprocess.CompletedProcess(
        process.args, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )
    if check and done.returncode:
        words = [str(word) for word in done.args]
        raise AssertionError(
            f"{words[0]} exited with {done.returncode}: {' '.join(words)}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def wait_gone(pidfd: int, timeout: float) -> bool:
    """Wait for the end of a process; return False after `timeout` seconds."""
    return is_readable(pidfd, timeout)


def is_readable(fd: int, timeout: float) -> bool:
    """Wait up to `timeout` seconds until a descriptor is readable; return whether it is. Unlike
    select(2), this also accepts descriptors of 1024 and more."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def children(pid: int) -> list[int]:
    """Return the children of a process's main thread, including zombies; none if it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def end(process: subprocess.Popen[bytes]) -> int:
    """Send SIGKILL, wait, and close its pipes. Return the exit code."""
    if process.poll() is None:
        # The process is our unreaped child, so its pid cannot have been reused.
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return process.returncode


def close_and_reap(pidfds: Mapping[int, int]) -> None:
    """Close these pidfds (pid → pidfd), and reap the processes that have become our children."""
    for pid, pidfd in pidfds.items():
        os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


class Orphan:
    """A daemonized process. It is not our child, but it is killed when we end.

    A helper waits on a pipe. When our end of the pipe is closed, for whatever reason, the helper
    kills the process.
    """

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is no such process."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        read, self._write = os.pipe()
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-IS", "-c", _GUARD, str(self.pidfd)],
                stdin=read,
                pass_fds=(self.pidfd,),
                start_new_session=True,
            )
        finally:
            os.close(read)

    def kill(self) -> None:
        """Send SIGKILL, wait for the end, and reap the process if it has become our child."""
        os.close(self._write)
        self._guard.wait()
        wait_gone(self.pidfd, 30)
        close_and_reap({self.pid: self.pidfd})


_GUARD: Final = """
import os, signal, sys
while os.read(0, 1):
    pass
try:
    signal.pidfd_send_signal(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""
