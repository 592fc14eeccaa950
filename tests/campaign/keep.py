"""Keep wrong runs: the spec to repeat it, and the trace to examine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from tests.campaign.pool import RunResult
from tests.lab.image import CACHE

KEPT: Final = CACHE / "campaign"


def keep(one: RunResult) -> RunResult:
    """Keep a wrong run and its trace under the name of the run. Otherwise, the trace would be
    removed with the run.

    If the run was right, remove what an earlier wrong run of this name left.
    """
    spec, trace = KEPT / f"{one.spec.name}.json", KEPT / f"{one.spec.name}.trace.jsonl"
    if one.clean:
        spec.unlink(missing_ok=True)
        trace.unlink(missing_ok=True)
        if one.outcome is not None and one.outcome.trace:
            Path(one.outcome.trace).unlink(missing_ok=True)
            one.outcome.trace = ""
    elif one.outcome is not None and one.outcome.trace:
        KEPT.mkdir(parents=True, exist_ok=True)
        if Path(one.outcome.trace) != trace:
            shutil.move(one.outcome.trace, trace)
        spec.write_text(json.dumps(one.spec.to_json(), indent=2) + "\n")
        one.outcome.trace = str(trace)
    return one
