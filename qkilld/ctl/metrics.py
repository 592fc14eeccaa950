"""The command metrics: running and finished stops as OpenMetrics text, for node_exporter's textfile
collector. Source: the OpenMetrics specification, 1.0.

Finished stops are read from all receipts in the journal, so a counter falls only if the journal
drops receipts. Running stops are read from the daemon if it runs; this command does not start it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from qkilld.adapters.journal_reader import Receipt, read_receipts
from qkilld.bus.client import ManagerProxy
from qkilld.ctl.follow import monotonic_usec
from qkilld.ctl.output import Output
from qkilld.ctl.session import open_connection
from qkilld.debug_log import note
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import USEC_PER_SEC, ExitCode, Result
from qkilld.model.errors import BusError, Failed, QkilldError
from qkilld.model.job_status import JobStatus
from qkilld.model.text import printable

BUCKETS: Final = (1, 5, 15, 60, 300, 1800)
"""Upper bounds for the duration of a stop, in seconds."""


async def metrics(bus: BusAddress, output: Output, path: str | None) -> int:
    """Print the text, or write it to a file atomically. Raises Failed."""
    try:
        receipts = read_receipts(None)
    except OSError as error:
        raise Failed(f"the journal cannot be read: {error.strerror}") from None
    jobs = await _running(bus)
    text = "\n".join(exposition(receipts, jobs, monotonic_usec())) + "\n"
    if path is None:
        output.line(text.rstrip("\n"))
    else:
        _replace(path, text)
    return ExitCode.OK


def exposition(
    receipts: Sequence[Receipt], jobs: Sequence[JobStatus] | None, now: int
) -> Iterator[str]:
    """Yield the lines. `jobs` is None if the daemon does not run. `now`: CLOCK_MONOTONIC, µs."""
    yield from _gauge("qkilld_up", "Whether the daemon runs. It exits when it is idle.")
    yield f"qkilld_up {int(jobs is not None)}"
    yield from _gauge("qkilld_jobs", "Guests that are being stopped, by phase and verdict.")
    running = Counter((job.phase, job.verdict) for job in jobs or ())
    for (phase, verdict), count in sorted(running.items()):
        yield f"qkilld_jobs{_labels(phase=phase, verdict=verdict)} {count}"
    yield from _gauge("qkilld_oldest_job_seconds", "How long the longest running stop has run.")
    oldest = max((now - job.started for job in jobs or ()), default=0)
    yield f"qkilld_oldest_job_seconds {max(0, oldest) / USEC_PER_SEC:.3f}"
    yield from _family("qkilld_stops", "counter", "Stops that ended, by their result.")
    results = Counter(receipt.result for receipt in receipts)
    for result in [*Result, *sorted(results.keys() - set(Result))]:
        yield f"qkilld_stops_total{_labels(result=result)} {results[result]}"
    yield from _family("qkilld_stops_data_at_risk", "counter", "Stops after which data is at risk.")
    yield f"qkilld_stops_data_at_risk_total {sum(one.data_at_risk for one in receipts)}"
    yield from _durations([one.elapsed for one in receipts if one.elapsed is not None])
    yield "# EOF"


def _durations(elapsed: Sequence[int]) -> Iterator[str]:
    name = "qkilld_stop_duration_seconds"
    yield from _family(name, "histogram", "How long stops took.", unit="seconds")
    for bound in BUCKETS:
        count = sum(usec <= bound * USEC_PER_SEC for usec in elapsed)
        yield f'{name}_bucket{{le="{bound}.0"}} {count}'
    yield f'{name}_bucket{{le="+Inf"}} {len(elapsed)}'
    yield f"{name}_sum {sum(elapsed) / USEC_PER_SEC:.6f}"
    yield f"{name}_count {len(elapsed)}"


def _gauge(name: str, text: str) -> Iterable[str]:
    return _family(name, "gauge", text)


def _family(name: str, kind: str, text: str, *, unit: str = "") -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    if unit:
        yield f"# UNIT {name} {unit}"
    yield f"# HELP {name} {text}"


def _labels(**labels: str) -> str:
    escaped = {
        name: printable(value).replace("\\", "\\\\").replace('"', '\\"')
        for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


async def _running(bus: BusAddress) -> list[JobStatus] | None:
    """Return the running jobs; None if there is no daemon or no bus. Never raises."""
    try:
        async with open_connection(bus) as connection:
            manager = ManagerProxy(connection)
            if not await manager.owner():
                return None
            paths = [path for _, path, *_ in await manager.list_jobs()]
            jobs = [await _status(manager, path) for path in paths]
    except BusError as error:
        note("asking for running stops", error)
        return None
    return [job for job in jobs if job is not None and not job.result]


async def _status(manager: ManagerProxy, path: str) -> JobStatus | None:
    try:
        return await manager.job(path).status()
    except BusError:
        raise
    except QkilldError as error:
        note(f"reading {path}, which may be forgotten by now", error)
        return None


def _replace(path: str, text: str) -> None:
    """Replace the file atomically. Raises Failed."""
    try:
        temporary = Path(f"{path}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o644)
        temporary.rename(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is not a path"
        raise Failed(f"The metrics cannot be written: {why}") from None
