"""Find out from the last evidence which data the end of a QEMU process puts at risk. Pure."""

from __future__ import annotations

import os
from signal import SIGHUP, SIGINT, SIGTERM, Signals
from typing import Final

from qkilld.decision.node_groups import groups_of, title_of
from qkilld.decision.verdict import Assessment
from qkilld.decision.waits import CONNECTED, WaitKind, tells_nothing
from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.job import Risk
from qkilld.model.sample import Node

CODES_OF_KILL: Final = frozenset({"killed-io", "unknown", "qcow2-open"})
_HANDLED: Final = frozenset({SIGTERM, SIGINT, SIGHUP})
"""The signals that ask QEMU to exit."""
_LOST: Final = 2 * USEC_PER_SEC
"""A node that has had no connection for this long (µs) has lost its server. A shorter time proves
nothing, because an exiting QEMU closes its connections, too."""


def risks_of_kill(evidence: Assessment | None) -> tuple[Risk, ...]:
    """Return the risks of SIGKILL; () if it is proven that there are none.

    SIGKILL has no risk if QEMU has handled SIGTERM, waits for nothing, and has only raw images open
    for writing, because QEMU holds back no data of raw images.
    """
    if evidence is None or tells_nothing(evidence.last):
        return (Risk("unknown", "the process could not be read"),)
    sample, risks = evidence.last, []
    if sample.term_pending is not False:
        risks.append(Risk("unknown", "it had not taken SIGTERM, as far as known"))
    for wait in evidence.waits:
        if wait.kind in (WaitKind.UNSEEN, WaitKind.PROCESSOR):
            risks.append(Risk("unknown", wait.text))
        else:
            risks.append(Risk("killed-io", wait.text))
    if sample.formatted is None:
        risks.append(Risk("unknown", "its open images could not be read"))
    elif sample.formatted:
        images = "image" if sample.formatted == 1 else "images"
        text = f"{sample.formatted} {images} open for writing, whose metadata may be incomplete"
        risks.append(Risk("qcow2-open", text))
    return tuple(risks)


def risks_of_death(
    status: int, evidence: Assessment | None, *, terminated: bool, flushed: bool = False
) -> tuple[Risk, ...]:
    """Return the risks if QEMU was ended by a signal that qkilld did not send, or exited with an
    error. The signal may come from the kernel (out of memory), from another program, or from a
    crash. After most errors, QEMU exits without closing its disks. So the same data may be lost as
    with SIGKILL.

    `status`: how QEMU has ended, in the form of wait(2). A signal that asks QEMU to exit (_HANDLED)
    can end QEMU only before QEMU has installed its handlers. At that time, no guest has run yet, so
    there is no risk. `terminated`: whether qkilld had already sent SIGTERM. If not, the guest may
    have written data until the end. `flushed`: the monitor has reported all disks as flushed.
    """
    number = os.WTERMSIG(status)
    if not status or number in _HANDLED or flushed:
        return ()
    risks = risks_of_kill(evidence)
    if terminated and not risks:
        return ()
    text = f"it exited with code {os.WEXITSTATUS(status)}"
    if number:
        text = f"it did not exit by itself: {_signal_name(number)} ended it"
    return (Risk("unknown", text), *risks)


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"


def risks_of_exit(
    evidence: Assessment | None, *, flushed: bool = False, started: int = 0, ended: int = INFINITY
) -> tuple[Risk, ...]:
    """Return the risks after QEMU has exited without SIGKILL.

    When QEMU exits, it has normally written its data. But QEMU also exits with 0 if its storage has
    reported an error, or if it has stopped waiting for a lost server (`reconnect-delay`). Of these
    causes, only a lost server is visible from outside, and only if it is on this host. A missing
    connection is a risk only if the server is gone, too: QEMU may just have closed the node. Until
    `reconnect-delay` has passed, QEMU does not exit with unwritten data. So an earlier exit proves
    that no data was lost, even if no sample has seen the server return.

    `flushed`: the monitor has reported all disks as flushed. `started`, `ended`: when the process
    started and ended (CLOCK_MONOTONIC, µs).
    """
    if evidence is None or flushed or evidence.seen.sockets is None:
        return ()
    sample, risks = evidence.seen, []
    waits = {wait.key: wait for wait in evidence.waits}
    for group in groups_of(sample).values():
        wait = waits.get(group.wait_key)
        marks = wait.marks if wait is not None else ()
        counts = [mark for mark in marks if mark.name == CONNECTED]
        if wait is None or not counts or counts[0].value >= len(group.nodes):
            continue
        # `lost_at` is when the number of connections last changed.
        lost_at = counts[0].at
        if sample.at - lost_at < _LOST:
            continue
        # If a single node lost its server after `wait.since`, it was connected at `wait.since`.
        is_single = len(group.nodes) == 1
        connected_at = wait.since if is_single and lost_at > wait.since else started
        gone = [node for node in group.nodes if _has_given_up(node, connected_at, ended)]
        if gone:
            text = f"it exited while {title_of(gone)} had no server"
            risks.append(Risk("unknown", text))
    return tuple(risks)


def _has_given_up(node: Node, connected_at: int, ended: int) -> bool:
    """Return whether QEMU may have dropped unwritten data of a node without a connection."""
    # QEMU holds no data of a vhost-user device, so no data is lost with its server.
    if node.served is not False or node.protocol == "vhost-user":
        return False
    return node.reconnect is None or ended >= connected_at + node.reconnect * USEC_PER_SEC
