"""Kill a daemon that runs very many jobs, and measure how long it takes until the next daemon has
resumed them."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from typing import Any, Final

from tests.bench import progress
from tests.bench.evidence import FORCE, many_descriptors
from tests.bench.figures import Figure, Row, at_most
from tests.bench.rest import resident
from tests.lab.bus import Client, daemon, lab_config, private_bus
from tests.lab.guest import fake_qemu
from tests.lab.scratch import scratch

LATE_MS: Final = 100
RECOVERY_S: Final = 5
_PER_JOB_MS: Final = 20
"""Additional grace for each job: enough to start one more job on a busy machine."""
_GRACE_S: Final = 30
_IDLE_USEC: Final = 12_000_000
"""A little longer than StallSec=."""
_DESCRIPTORS: Final = 4
"""The number of file descriptors for each job. A job has two, and a third while systemd receives a
copy."""


def measure(wanted: int) -> Figure:
    """Run `wanted` jobs, or fewer if there are not enough descriptors."""
    with many_descriptors():
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        jobs = min(wanted, limit // _DESCRIPTORS)
        figure = _measure(jobs)
    if jobs < wanted:
        figure.notes.append(
            f"{wanted} jobs need {wanted * _DESCRIPTORS} descriptors; {limit} are allowed here."
        )
    return figure


def _measure(jobs: int) -> Figure:
    figure = Figure(f"A daemon with {jobs} running jobs is killed by SIGKILL")
    grace = _GRACE_S + jobs * _PER_JOB_MS // 1000
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("r"))
        directory.chmod(0o700)
        bus = stack.enter_context(private_bus(limits={"max_replies_per_connection": 2 * jobs}))
        env = {"RUNTIME_DIRECTORY": str(directory)}
        config = lab_config("StallSec=10")
        guests = [stack.enter_context(fake_qemu(stubborn=True)) for _ in range(jobs)]
        with daemon(bus, config=config, env=env) as first, bus.client() as client:
            paths = []
            for number, guest in enumerate(guests):
                progress.show(f"{jobs} jobs: starting {number + 1}")
                options = {"grace_usec": ("t", grace * 1_000_000)}
                paths.append(client.terminate(guest.pid, FORCE, **options))
            _wait_written(directory, jobs)
            memory = resident(first.pid)
            first.process.kill()
            first.wait_gone()
        progress.show(f"{jobs} jobs: found again, and waiting for their SIGKILL")
        killed = time.monotonic()
        with daemon(bus, config=config, env=env), bus.client() as client:
            ready = time.monotonic() - killed
            while client.properties()["NJobs"] < jobs:
                assert time.monotonic() - killed < 60, client.properties()
                time.sleep(0.01)
            recovery_s = time.monotonic() - killed
            receipts = _receipts(client, paths, grace)
    late = [_late_ms(receipt, grace) for receipt in receipts if _was_idle(receipt)]
    figure.rows += [
        Row("from exec of the next daemon to READY=1", "s", [ready]),
        Row("  until it has all jobs again", "s", [recovery_s]),
        Row("resident (VmRSS) before", "MB", [memory]),
    ]
    figure.targets += [
        at_most("all jobs again after", recovery_s, RECOVERY_S, "s"),
    ]
    if late:
        figure.rows.append(Row("SIGKILL after its deadline", "ms", late))
        figure.targets.append(at_most("latest SIGKILL", max(late), LATE_MS, "ms"))
    if unseen := len(receipts) - len(late):
        figure.notes.append(
            f"Jobs not counted, because late samples may have delayed their SIGKILL: {unseen}."
        )
    return figure


def _wait_written(directory: Path, jobs: int) -> None:
    deadline = time.monotonic() + 60
    while sum(1 for _ in directory.glob("job-*.json")) < jobs:
        assert time.monotonic() < deadline, "not all jobs are written"
        time.sleep(0.1)


def _receipts(client: Client, paths: list[str], grace: int) -> list[dict[str, Any]]:
    """Wait for all jobs at the same time, because a receipt is kept for only a minute after the end
    of its job."""
    waits = [client.send("Wait", path=path, interface="org.qkilld1.Job") for path in paths]
    return [dict(client.reply(wait, timeout=grace + 120)[1]) for wait in waits]


def _was_idle(receipt: dict[str, Any]) -> bool:
    """Return whether the process was idle for so long that only the grace delayed its SIGKILL."""
    _, verdicts = receipt["verdicts"]
    rungs = receipt["rungs"][1]
    if not verdicts or len(rungs) != 2:
        return False
    verdict, since, _ = verdicts[-1]
    return bool(verdict == "idle" and rungs[1][2] - since >= _IDLE_USEC)


def _late_ms(receipt: dict[str, Any], grace: int) -> float:
    (_, _, term), (_, _, kill) = receipt["rungs"][1]
    return float(kill - term) / 1000 - grace * 1000
