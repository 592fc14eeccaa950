"""Many concurrent runs. Each has its own process, so that a failure affects only one run."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qkilld.adapters.procfs import read_identity
from tests.campaign.cases import unexpected
from tests.campaign.judge import Judgement, judge
from tests.campaign.run import Outcome, Server, run, server
from tests.campaign.spec import HOST, Spec
from tests.campaign.ways import OURS
from tests.lab.keeper import Keeper
from tests.lab.needs import Missing
from tests.lab.scratch import scratch

AT_ONCE: Final = 32
_BEGINNING: Final = 2
"""The maximum number of runs that set up their storage, QEMU and records at the same time. Setting
up takes processor time."""
_ATTEMPTS: Final = 3
_CHECK_S: Final = 5.0
_MOST_S: Final = 900.0
"""A run that takes longer than this (s) is ended. The longest run takes half of it."""
_MORE_S: Final = 120.0
"""The time (s) for a run that was ended to remove its storage."""
TRIES: Final = 3
"""The maximum number of attempts for a run whose samples are late each time."""
_PR_SET_PDEATHSIG: Final = 1


@dataclass
class RunResult:
    """A run with its judgement or, in `failed`, the error of the lab."""

    spec: Spec
    outcome: Outcome | None = None
    judgement: Judgement | None = None
    tries: int = 1
    failed: str = ""

    @property
    def clean(self) -> bool:
        return self.judgement is not None and self.judgement.right


@dataclass
class _Child:
    spec: Spec
    pid: int
    pidfd: int
    answer: Path
    begun: int
    """A pipe. The run closes its end when it has requested the stop."""
    tries: int
    started: float
    """When the run started (time.monotonic())."""
    stops: int = 0


def run_all(
    specs: Sequence[Spec],
    at_once: int = AT_ONCE,
    said: Callable[[str], None] = lambda text: None,
    way: str = OURS,
    most: int = TRIES,
) -> Iterator[RunResult]:
    """Run these specs in order. Yield the result of each run when the run has ended."""
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(Keeper())
        directory = stack.enter_context(scratch("c"))
        traces = directory / "traces"
        traces.mkdir()
        servers = stack.enter_context(contextlib.ExitStack())
        by = _begin(servers, traces)
        todo = [(spec, 1) for spec in specs]
        running: list[_Child] = []
        beginning: set[int] = set()
        stack.callback(_kill_all, running)
        done = 0
        while todo or running:
            while todo and len(running) < at_once and len(beginning) < _BEGINNING:
                if not _lives(by):
                    # The runs in progress fail with the daemon, and report that.
                    with contextlib.suppress(AssertionError):
                        servers.close()
                    by = _begin(servers, traces)
                spec, tries = todo.pop(0)
                child = _start(spec, by, directory, tries, keeper, way)
                running.append(child)
                beginning.add(child.begun)
            said(f"{done} of {len(specs)} runs, {len(running)} now")
            sources = [*(child.pidfd for child in running), *beginning]
            ready = select.select(sources, [], [], _CHECK_S)[0]
            _stop_late(running)
            for pipe in beginning & set(ready):
                beginning.remove(pipe)
                os.close(pipe)
            for child in [child for child in running if child.pidfd in ready]:
                running.remove(child)
                one = _collect(child)
                if one.judgement and one.judgement.too_late and child.tries < most:
                    todo.insert(0, (child.spec, child.tries + 1))
                    continue
                done += 1
                yield one


def _start(spec: Spec, by: Server, directory: Path, tries: int, keeper: Keeper, way: str) -> _Child:
    answer = directory / f"{time.monotonic_ns():x}.json"
    read, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Child(spec, pid, os.pidfd_open(pid), answer, read, tries, time.monotonic())
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(read)
        keeper.leave()
        answer.write_text(json.dumps(_do(spec, by, lambda: os.close(write), way)))
        status = 0
    except BaseException:
        answer.write_text(json.dumps({"failed": traceback.format_exc(limit=-8)}))
    finally:
        os._exit(status)


def _do(spec: Spec, by: Server, begun: Callable[[], None], way: str) -> dict[str, Any]:
    try:
        if any(change.of == HOST for change in spec.changes):
            with server(by.traces) as own:
                return {"outcome": run(spec, own, begun, way).to_json()}
        return {"outcome": run(spec, by, begun, way).to_json()}
    except Missing as error:
        return {"failed": f"not possible here: {error}"}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _collect(child: _Child) -> RunResult:
    os.waitpid(child.pid, 0)
    os.close(child.pidfd)
    try:
        answer = json.loads(child.answer.read_text())
    except (OSError, ValueError):
        return RunResult(child.spec, tries=child.tries, failed="it exited without a result")
    child.answer.unlink()
    if "failed" in answer:
        return RunResult(child.spec, tries=child.tries, failed=answer["failed"])
    outcome = Outcome.from_json(answer["outcome"])
    try:
        judgement = judge(child.spec, outcome)
    except Exception:
        return RunResult(
            child.spec, outcome, tries=child.tries, failed=traceback.format_exc(limit=-8)
        )
    judgement.findings += unexpected(child.spec.name, outcome)
    return RunResult(child.spec, outcome, judgement, child.tries)


def _begin(servers: contextlib.ExitStack, traces: Path) -> Server:
    """Start a daemon. On a busy host, this may take more than one attempt."""
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(AssertionError):
            return servers.enter_context(server(traces))
    return servers.enter_context(server(traces))


def _lives(by: Server) -> bool:
    try:
        return read_identity(by.pid).state not in ("Z", "X")
    except OSError:
        return False


def _stop_late(running: list[_Child]) -> None:
    """End runs that take too long, so that the other runs continue."""
    for child in running:
        late = time.monotonic() - child.started - _MOST_S
        number = (signal.SIGTERM, signal.SIGKILL)[min(child.stops, 1)]
        if late > child.stops * _MORE_S:
            child.stops += 1
            signal.pidfd_send_signal(child.pidfd, number)


def _kill_all(running: list[_Child]) -> None:
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGTERM)
    for child in running:
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)
