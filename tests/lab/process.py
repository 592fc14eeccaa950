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
"""A user who is not root, in every /etc/passwd (a bus turns away users it does not know)."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None, use_errno=True)

Stream = int | IO[Any] | None


def become_subreaper() -> None:
    """Orphans among our descendants become our children, where the leak check sees them."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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
    """Starts a program in a session of its own (Ctrl-C does not reach it) that dies with us.

    `uid`: as that user, in the group of the same number and no other; needs root. `before` runs in
    the child just before exec. Raises what Popen raises.
    """

    if uid is not None:
        needs.root("to run a program as another user")
    parent = os.getpid()

    def prepare() -> None:
        # Here and not by Popen's user=: a change of user takes the parent-death signal away.
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # gone before the call above could see it
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
    """subprocess.run with captured text; with `check` a failure tells what the program said."""
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
    """What it says until it ends, from a process whose stdout and stderr are pipes."""
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
    """Waits for the end, at most `timeout` seconds; False if the time ran out."""
    return bool(select.select([pidfd], [], [], timeout)[0])


def children(pid: int) -> list[int]:
    """The direct ones of its main thread, zombies among them; none where it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def end(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL (through SIGSTOP too) and wait; its pipes are closed. Returns the exit code."""
    if process.poll() is None:
        # The process is our child and not yet waited for: its number cannot be another's.
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return process.returncode


def close_and_reap(pidfds: Mapping[int, int]) -> None:
    """Closes the pidfds (pid: descriptor) and reaps those of the processes that became ours."""
    for pid, pidfd in pidfds.items():
        os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


class Orphan:
    """A process that is not our child (a daemonized one): held by pidfd, and killed with us.

    A helper that waits at a pipe kills it when our end of the pipe closes, however that comes.
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
        """SIGKILL, waits until it is gone, and reaps it where it became our child."""
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
