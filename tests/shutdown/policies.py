"""The columns: who stops the guest.

The fixed clocks are written down here, as the programs that have them do it. `virsh` is the real
one, for a guest that libvirt has started.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qkilld.debug_log import ignore
from qkilld.engine.job import Job
from qkilld.model.constants import Flag, GuestAsked
from qkilld.model.job import Request
from qkilld.model.policy import Config
from tests.lab.process import wait_gone
from tests.monitor.connecting import run_for
from tests.rungs.stopping import actions, codes, stopper, until
from tests.shutdown.scene import Domain, Row, Scene

LONGEST_S: Final = 150
"""A policy that waits longer is ended and shown as that."""
_OURS_S: Final = 400
_AGENT_S: Final = 3.0


@dataclass
class Stop:
    """How one stop ended."""

    ended: str
    """exited, killed, survived."""
    rungs: list[str] = field(default_factory=list)
    at_risk: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    asked: str = ""
    """What became of asking the guest."""


Policy = Callable[[Scene, Row], Stop]


def qkilld(scene: Scene, row: Row) -> Stop:
    """FORCE and POWERDOWN, with default settings; libvirt's guests by qkillctl, which can ask."""
    if scene.target.domain is not None:
        return _qkillctl(scene.target.domain)
    config = Config(executables=(str(Path(f"/proc/{scene.target.pid}/exe").readlink()),))
    request = Request(Flag.FORCE | Flag.POWERDOWN, {}, help=row.help)

    async def work() -> Stop:
        async with stopper(config) as stopping:
            job = await stopping.begin_request(scene.target.pid, request)
            await until(lambda: not job.running, _OURS_S)
            return _told(job)

    return run_for(_OURS_S + 10, work())


def _told(job: Job) -> Stop:
    assert job.result is not None
    verdicts = [turn.verdict.value for turn in job.history]
    return Stop(
        job.result.value,
        actions(job),
        sorted(codes(job)),
        [one for one in dict.fromkeys(verdicts) if one not in ("gone", "zombie")],
        job.guest_asked.value,
    )


def _qkillctl(domain: Domain) -> Stop:
    document: Any = domain.terminate(_OURS_S)
    receipt = document["receipt"]
    rungs = [rung["signal"] for rung in receipt.get("rungs", [])]
    risks = [risk["code"] for risk in receipt.get("at-risk", [])]
    asked = receipt.get("guest-asked", GuestAsked.NOT_ASKED.value)
    return Stop(document["result"], rungs, risks, [], asked)


def virsh(scene: Scene, row: Row) -> Stop:
    """virsh shutdown and 300 s, as libvirt-guests has it; then virsh destroy."""
    domain = scene.target.domain
    assert domain is not None
    domain.shutdown()
    if wait_gone(scene.target.pidfd, LONGEST_S):
        return Stop("exited", ["shutdown"])
    return Stop("survived", ["shutdown"])


def sigterm(scene: Scene, row: Row) -> Stop:
    """SIGTERM, and patience."""
    scene.target.signal(signal.SIGTERM)
    gone = wait_gone(scene.target.pidfd, LONGEST_S)
    return Stop("exited" if gone else "survived", ["SIGTERM"])


def proxmox(scene: Scene, row: Row) -> Stop:
    """The agent if it answers in 3 s, or the power button, and 60 s; SIGTERM and 10 s; SIGKILL."""
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
    """The power button and 90 s, then SIGKILL: a unit with system_powerdown as its ExecStop=."""
    _press(scene.qmp)
    if wait_gone(scene.target.pidfd, 90):
        return Stop("exited", ["button"])
    scene.target.signal(signal.SIGKILL)
    return Stop("killed", ["button", "SIGKILL"])


def _press(path: Path) -> None:
    """Nothing comes of it if the monitor does not answer, and nobody waits for that."""
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
    """Whether it has answered a ping, and been asked to shut down."""
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
