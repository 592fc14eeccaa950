"""The agent that asks for a password on this terminal, as systemctl(1) has it: pkttyagent(1)."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

READY_TIMEOUT_S: Final = 5.0
_END_TIMEOUT_S: Final = 2.0


def may_ask() -> bool:
    """Whether somebody sits here who can be asked: standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


@contextlib.contextmanager
def password_agent(wanted: bool) -> Iterator[None]:
    """While entered, polkit can ask on this terminal, unless the session has an agent already.

    Not for root, who is not asked. Without pkttyagent, or where it cannot register, polkit asks
    whatever agent there is, or nobody. Blocks until it has registered, at most READY_TIMEOUT_S.
    """
    program = shutil.which("pkttyagent")
    if not wanted or os.geteuid() == 0 or program is None:
        yield
        return
    ready, notify = os.pipe()
    # polkit finds an agent of last resort (--fallback) only for a process in a login session.
    # Outside of one no other agent can be in the way.
    fallback = ["--fallback"] if "XDG_SESSION_ID" in os.environ else []
    try:
        process = subprocess.Popen(
            [program, "--notify-fd", str(notify), *fallback],
            stdin=subprocess.DEVNULL,  # it asks on /dev/tty
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(notify,),
        )
    except OSError:
        process = None
    finally:
        os.close(notify)
    try:
        if process is not None:
            # It closes its end when it has registered, and when it ends.
            select.select([ready], [], [], READY_TIMEOUT_S)
        os.close(ready)
        yield
    finally:
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    # It may have been stopped for reading from the terminal out of turn.
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
