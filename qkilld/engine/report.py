"""The facts about a job that callers get over D-Bus or Varlink."""

from __future__ import annotations

from signal import SIGKILL
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob


def may_see(job: ObservedJob, uid: int) -> bool:
    """Return whether a user may see details of the evidence: root, the owner and the requester
    may."""
    return uid in (0, job.guest.identity.uid, job.request.uid)


def receipt_values(job: ObservedJob, *, private: bool) -> dict[str, Any]:
    """Return the receipt of an ended job. Details of evidence (bytes, reasons) are included only
    with `private`. Missing values are left out. Structures are lists; times are in µs."""
    values: dict[str, Any] = {
        "elapsed-usec": job.elapsed,
        "rungs": [[r.phase.value, r.action, r.at - job.started] for r in job.rungs],
        "verdict": job.verdict.value,
        "requested-by": job.request.uid,
        "guest-asked": job.guest_asked.value,
    }
    evidence = job.assessment
    if evidence is not None:
        values["verdicts"] = [
            [t.verdict.value, t.at - job.started, list(t.reasons) if private else []]
            for t in job.history
        ]
        if private and evidence.written is not None:
            values["bytes-written"] = evidence.written
        if private and evidence.pending is not None:
            values["bytes-pending"] = evidence.pending
        if evidence.progress_at is not None:
            values["last-progress-usec"] = evidence.progress_at
    if job.flush.outcome != "not-tried":
        values["flush"] = job.flush.outcome
        values["flush-reason"] = job.flush.reason if private else ""
    if job.risks or (job.rungs and job.rungs[-1].action == SIGKILL.name):
        values["data-at-risk"] = job.data_at_risk
        values["at-risk"] = [[risk.code, risk.text if private else ""] for risk in job.risks]
    if job.request.reason:
        values["reason"] = job.request.reason
    if job.error:
        values["error"] = job.error
    if job.error_name:
        values["error-name"] = job.error_name
    return values
