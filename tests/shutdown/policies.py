"""The columns of the matrix: the ways to stop a guest.

This module imitates the fixed timeouts of other programs. Only `virsh` is the real program, for a
guest that libvirt has started.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qkilld.debug_log import ignore
from qkilld.engine.job import Job
from qkilld.model.constants import USEC_PER_SEC, Flag, GuestAsked
from qkilld.model.job import Request
from qkilld.model.policy import Config
from tests.lab.process import wait_gone
from tests.monitor.connecting import run_for
from tests.rungs.stopping import actions, codes, stopper, until
from tests.shutdown.scene import Domain, Row, Scene

LONGEST_S: Final = 150
"""If a policy waits longer than this, it is stopped, and its cell shows `> 150 s`."""
_OURS_S: Final = 400
_AGENT_S: Final = 3.0


@dataclass
class Stop:
    """How one stop ended."""

    ended: str
    """exited, killed or survived."""
    rungs: list[str] = field(default_factory=list)
    at_risk: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    asked: str = ""
    """The result of asking the guest to shut down."""
    sigterm_s: float | None = None
    """The seconds from the call to SIGTERM; None if SIGTERM was not sent, or its time is
    unknown."""


Policy = Callable[[Scene, Row], Stop]


def qkilld(scene: Scene, row: Row) -> Stop:
    """Use FORCE and POWERDOWN with default settings. For a guest of libvirt, use qkillctl, because
    qkillctl can ask it."""
    if scene.target.domain is not None:
        return _qkillctl(scene.target.domain)
    config = Config(executables=(str(Path(f"/proc/{scene.target.pid}/exe").readlink()),))
    request = Request(Flag.FORCE | Flag.POWERDOWN, {}, help=row.help)

    async def work() -> Stop:
        async with stopper(config) as stopping:
            job = await stopping.begin_request(scene.target.pid, request)
            await until(lambda: not job.running, _OURS_S)
            return _stop_of(job)

    return run_for(_OURS_S + 10, work())


def _stop_of(job: Job) -> Stop:
    assert job.result is not None
    verdicts = [turn.verdict.value for turn in job.history]
    return Stop(
        job.result.value,
        actions(job),
        sorted(codes(job)),
        [one for one in dict.fromkeys(verdicts) if one not in ("gone", "zombie")],
        job.guest_asked.value,
        _sigterm_s((rung.action, rung.at - job.started) for rung in job.rungs),
    )


def _sigterm_s(rungs: Iterable[tuple[str, int]]) -> float | None:
    """Return when SIGTERM was sent, in s after the start. `rungs`: the action and the time (µs) of
    each rung."""
    times = [at / USEC_PER_SEC for action, at in rungs if action == signal.SIGTERM.name]
    return times[0] if times else None


def _qkillctl(domain: Domain) -> Stop:
    document: Any = domain.terminate(_OURS_S)
    receipt = document["receipt"]
    rungs = [(rung["action"], rung["at_usec"]) for rung in receipt.get("rungs", [])]
    risks = [risk["code"] for risk in receipt.get("at_risk", [])]
    asked = receipt.get("guest_asked", GuestAsked.NOT_ASKED.value)
    names = [action for action, _ in rungs]
    return Stop(document["result"], names, risks, [], asked, _sigterm_s(rungs))


def virsh(scene: Scene, row: Row) -> Stop:
    """Run virsh shutdown, wait up to 300 s as libvirt-guests does, then run virsh destroy."""
    domain = scene.target.domain
    assert domain is not None
    domain.shutdown()
    if wait_gone(scene.target.pidfd, LONGEST_S):
        return Stop("exited", ["shutdown"])
    return Stop("survived", ["shutdown"])


def sigterm(scene: Scene, row: Row) -> Stop:
    """Send SIGTERM and wait."""
    scene.target.signal(signal.SIGTERM)
    gone = wait_gone(scene.target.pidfd, LONGEST_S)
    return Stop("exited" if gone else "survived", ["SIGTERM"])


def proxmox(scene: Scene, row: Row) -> Stop:
    """Ask the agent. If it does not answer within 3 s, press the power button instead. Wait 60 s,
    send SIGTERM, wait 10 s, and send SIGKILL."""
    asked = "agent"
    if scene.agent is None or not _ask_agent(scene.agent):
        asked = "button"
        _press(scene.qmp)
    if wait_gone(scene.target.pidfd, 60):
        return Stop("exited", [asked])
    scene.target.signal(signal.SIGTERM)
    if wait_gone(scene.target.pidfd, 10):
        return Stop("exited", [asked, "SIGTERM"])
    scene.target.signal(signal.SIGKILL)
    return Stop("killed", [asked, "SIGTERM", "SIGKILL"])


def one_press(scene: Scene, row: Row) -> Stop:
    """Press the power button, wait 90 s, and send SIGKILL, like a unit whose ExecStop= sends
    system_powerdown."""
    _press(scene.qmp)
    if wait_gone(scene.target.pidfd, 90):
        return Stop("exited", ["button"])
    scene.target.signal(signal.SIGKILL)
    return Stop("killed", ["button", "SIGKILL"])


def _press(path: Path) -> None:
    """Press the power button. If the monitor does not answer, give up after 2 s."""
    with (
        ignore("pressing the power button", OSError),
        socket.socket(socket.AF_UNIX) as monitor,
    ):
        monitor.settimeout(2)
        monitor.connect(str(path))
        for command in ("qmp_capabilities", "system_powerdown"):
            monitor.recv(65536)
            monitor.sendall(json.dumps({"execute": command}).encode() + b"\n")
        monitor.recv(65536)


def _ask_agent(path: Path) -> bool:
    """If the agent answers a ping, ask it to shut the guest down. Return whether it was asked."""
    with ignore("asking the agent", OSError), socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(_AGENT_S)
        agent.connect(str(path))
        agent.sendall(b'{"execute": "guest-ping"}\n')
        if b"return" in agent.recv(65536):
            agent.sendall(b'{"execute": "guest-shutdown"}\n')
            return True
    return False


POLICIES: Final[dict[str, tuple[str, Policy]]] = {
    "qkilld": ("qkilld, FORCE and POWERDOWN", qkilld),
    "virsh": ("virsh shutdown, 300 s, virsh destroy", virsh),
    "sigterm": ("SIGTERM alone", sigterm),
    "proxmox": ("Proxmox VE: 60 s, SIGTERM, 10 s, SIGKILL", proxmox),
    "press": ("one press, 90 s, SIGKILL", one_press),
}
