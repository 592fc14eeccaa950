"""Like systemctl(1), run pkttyagent(1), which asks for a password on this terminal."""

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

from qkilld.debug_log import ignore, note

READY_TIMEOUT_S: Final = 5.0
_END_TIMEOUT_S: Final = 2.0


def may_ask() -> bool:
    """Return whether standard input is a terminal, on which a password can be typed."""
    return sys.stdin is not None and sys.stdin.isatty()


@contextlib.contextmanager
def password_agent(wanted: bool) -> Iterator[None]:
    """Within the context, let polkit ask on this terminal, unless the session has its own agent.

    Does nothing for root, who is never asked. If pkttyagent is missing or cannot register, polkit
    asks another agent or nobody. Blocks up to READY_TIMEOUT_S until pkttyagent has registered.
    """
    program = shutil.which("pkttyagent")
    if not wanted or os.geteuid() == 0 or program is None:
        yield
        return
    ready, notify = os.pipe()
    # polkit uses a fallback agent (--fallback) only for processes in a login session. Outside a
    # session, register as a normal agent, because there is no other agent that should take
    # precedence.
    fallback = ["--fallback"] if "XDG_SESSION_ID" in os.environ else []
    try:
        process = subprocess.Popen(
            [program, "--notify-fd", str(notify), *fallback],
            stdin=subprocess.DEVNULL,  # pkttyagent asks on /dev/tty.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(notify,),
        )
    except OSError as error:
        note("starting pkttyagent", error)
        process = None
    finally:
        os.close(notify)
    try:
        if process is not None:
            # pkttyagent closes its end of the pipe when it has registered or exits.
            select.select([ready], [], [], READY_TIMEOUT_S)
        os.close(ready)
        yield
    finally:
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    # Wake the agent: if it read from the terminal in the background, the kernel has stopped it.
    with ignore("waking pkttyagent", ProcessLookupError):
        process.send_signal(signal.SIGCONT)
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        note("ending pkttyagent", error)
        process.kill()
        process.wait()
