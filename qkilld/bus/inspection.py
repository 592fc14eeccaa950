"""Convert evidence to the reply of Inspect: all keys except those that identify the process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qkilld.bus.library import Variant
from qkilld.decision.verdict import Assessment
from qkilld.decision.waits import blind_to
from qkilld.model.constants import UNKNOWN


def evidence_dict(evidence: Assessment) -> dict[str, Variant]:
    """Return the keys that the XML describes, without those whose values could not be read."""
    sample = evidence.last
    values: dict[str, tuple[str, Any]] = {
        "verdict": ("s", evidence.verdict.value),
        "reasons": ("as", list(evidence.reasons)),
        "unseen": ("as", blind_to(sample)),
        "term-pending": ("b", sample.term_pending),
        "tracer": ("u", sample.tracer),
        "switches": ("t", sample.switches),
        "io-uring-requests": ("u", sample.rings),
        "bytes-pending": ("t", evidence.pending),
    }
    if sample.io is not None:
        values["io"] = ("a{st}", asdict(sample.io))
    if sample.threads is not None:
        rows = [[t.tid, t.name, t.state, t.wchan or ""] for t in sample.threads]
        values["waiting-threads"] = ("a(usss)", rows)
    if sample.devices is not None:
        devices = [[d.name, d.number, d.sectors_written * 512, d.in_flight] for d in sample.devices]
        values["devices"] = ("a(sstu)", devices)
    if sample.sockets is not None:
        sockets = [[s.family, s.client, s.send_queue, s.unacked or 0] for s in sample.sockets]
        values["sockets"] = ("a(sbtu)", sockets)
    if sample.mounts is not None:
        mounts = [
            [m.kind, UNKNOWN if m.operations is None else m.operations] for m in sample.mounts
        ]
        values["mounts"] = ("a(st)", mounts)
    cgroup = sample.cgroup
    if cgroup is not None:
        numbers = {"dirty": cgroup.dirty, "writeback": cgroup.writeback, "written": cgroup.written}
        known = {name: number for name, number in numbers.items() if number is not None}
        values["cgroup"] = ("a{st}", known)
        values["cgroup-own"] = ("b", cgroup.own)
        values["frozen"] = ("b", cgroup.frozen)
    if sample.host is not None:
        values["host"] = ("a{st}", asdict(sample.host))
    return {key: Variant(kind, value) for key, (kind, value) in values.items() if value is not None}
