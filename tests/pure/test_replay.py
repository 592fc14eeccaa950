"""Replays of synthetic samples and of recorded jobs, with the recorded policy and with others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkilld.ctl.main import main
from qkilld.decision.ladder import Action
from qkilld.decision.replay import Overrides, Replay, replay
from qkilld.model.constants import Flag, Phase, Result, Verdict
from qkilld.model.policy import Policy
from qkilld.model.sample import Io, Sample, Thread
from qkilld.model.trace import (
    ChangeRecord,
    EndRecord,
    Header,
    Record,
    RungRecord,
    Trace,
    header_line,
    record_line,
)

TRACES = Path(__file__).parents[1] / "traces"
S = 1_000_000
T0 = 1_000 * S
FORCE, FIXED, NOWAIT = Flag.FORCE, Flag.FIXED, Flag.NOWAIT
SYNC = Thread(7, "worker", "D", 75, True, "folio_wait_bit")
IDLE = Sample(
    at=0,
    state="S",
    term_pending=False,
    tracer=0,
    cpu=0,
    switches=0,
    io=Io(0, 0, 0, 0, 0, 0, 0),
    threads=(),
    rings=0,
    direct=False,
    nodes=(),
    formatted=0,
    pluggable=False,
    devices=(),
    mounts=(),
    sockets=(),
)
WAITING = replace(IDLE, threads=(SYNC,))


def at(seconds: float) -> int:
    return T0 + round(seconds * S)


def looks(sample: Sample, times: Iterable[float], *, rate: int = 0) -> list[Record]:
    """Return this sample at each time (s), with `rate` bytes written per second."""
    return [
        replace(sample, at=at(time), io=Io(0, 0, 0, 0, 0, round(rate * time), 0)) for time in times
    ]


def traced(
    records: Iterable[Record],
    end: float,
    result: Result | None = Result.EXITED,
    *,
    flags: Flag = FORCE,
    kill: float | None = None,
    **spans: int,
) -> Trace:
    """Return the trace of a job that sent SIGTERM at 0 s, and then ended in this way."""
    header = Header(1, T0, 17, 99, "qemu", "web", flags, replace(Policy(), **spans))
    found = [RungRecord(T0, Phase.TERMINATE, "SIGTERM"), *records]
    if kill is not None:
        found.append(RungRecord(at(kill), Phase.KILL, "SIGKILL"))
    if result is not None:
        found.append(EndRecord(at(end), result))
    return Trace(header, tuple(found))


def outcome(replayed: Replay) -> tuple[Result | None, float]:
    return replayed.result, (replayed.at - T0) / S


EVERY_SECOND = [0.1, *range(1, 30)]
FLUSHING = traced(looks(WAITING, EVERY_SECOND, rate=S), 29.5)
STUCK = traced(looks(IDLE, [0.1, *range(1, 10)]), 10.002, Result.KILLED, kill=10.001)
DEAD = traced(looks(WAITING, EVERY_SECOND), 29.5, Result.CANCELLED)


@pytest.mark.parametrize(
    ("trace", "terms", "expected"),
    [
        (FLUSHING, Overrides(), (Result.EXITED, 29.5)),
        (FLUSHING, Overrides(add=FIXED), (Result.KILLED, 10)),
        (FLUSHING, Overrides(add=FIXED, spans={"grace": 20 * S}), (Result.KILLED, 20)),
        (FLUSHING, Overrides(spans={"max": 12_500_000}), (Result.KILLED, 12.5)),
        (FLUSHING, Overrides(remove=FORCE), (Result.EXITED, 29.5)),
        (FLUSHING, Overrides(add=FIXED, remove=FORCE), (Result.SURVIVED, 15)),
        (FLUSHING, Overrides(add=NOWAIT), (Result.KILLED, 0)),
        (FLUSHING, Overrides(add=NOWAIT, remove=FORCE), (Result.SIGNALLED, 0)),
        # This trace has too few samples to show movement
        (FLUSHING, Overrides(spans={"grace": 0, "storage_stall": S // 2}), (Result.KILLED, 0.5)),
        (STUCK, Overrides(), (Result.KILLED, 10)),
        (STUCK, Overrides(spans={"grace": 2 * S, "stall": 0}), (Result.KILLED, 2)),
        (STUCK, Overrides(spans={"grace": 2_500_000, "stall": 0}), (Result.KILLED, 2.5)),
        (STUCK, Overrides(spans={"grace": 20 * S}), (None, 10.001)),
        (STUCK, Overrides(add=FIXED), (Result.KILLED, 10)),
        (STUCK, Overrides(remove=FORCE, spans={"reap": 0}), (Result.SURVIVED, 10)),
        (STUCK, Overrides(remove=FORCE), (None, 10.001)),
        (DEAD, Overrides(), (None, 29.5)),
        (DEAD, Overrides(spans={"storage_stall": 20 * S}), (Result.KILLED, 20)),
        (DEAD, Overrides(spans={"storage_stall": 0}), (Result.KILLED, 10)),
    ],
)
def test_outcomes(trace: Trace, terms: Overrides, expected: tuple[Result | None, float]) -> None:
    assert outcome(replay(trace, terms)) == expected


def test_the_look_that_a_deadline_asked_for_counts() -> None:
    """A sample right after the deadline counts if it shows movement. A much later sample is too
    late."""
    idle = looks(IDLE, [0.1, *range(1, 10)])
    moved = [10.2, *range(11, 16)]
    held = traced(idle + looks(IDLE, moved, rate=4096), 15.5)
    assert outcome(replay(held)) == (Result.EXITED, 15.5)
    late = traced(idle + looks(IDLE, [10.3, *moved[1:]], rate=4096), 15.5)
    assert outcome(replay(late)) == (Result.KILLED, 10)


def test_how_old_the_last_sample_was() -> None:
    step = replay(STUCK, Overrides(spans={"grace": 2_500_000, "stall": 0})).steps[-1]
    assert (step.decision.action, step.since_sample) == (Action.KILL, S // 2)
    step = replay(STUCK, Overrides(spans={"grace": 2 * S, "stall": 0})).steps[-1]
    assert (step.decision.action, step.since_sample) == (Action.KILL, 0)


def test_an_exit_comes_before_the_deadline_of_its_time() -> None:
    assert outcome(replay(traced(looks(IDLE, [1]), 10))) == (Result.EXITED, 10)
    assert outcome(replay(traced(looks(IDLE, [1]), 10.000001))) == (Result.KILLED, 10)


def test_a_trace_without_samples_is_not_idle() -> None:
    nothing = traced([], 100)
    assert outcome(replay(nothing)) == (Result.KILLED, 60)
    assert replay(nothing).steps[-1].assessment is None
    assert replay(nothing).data_at_risk
    assert outcome(replay(nothing, Overrides(add=FIXED))) == (Result.KILLED, 10)


def test_samples_after_a_real_sigkill_are_ignored() -> None:
    trace = traced(
        looks(WAITING, [*range(1, 10)]) + looks(IDLE, [*range(11, 40)]),
        40,
        Result.KILLED,
        kill=10.5,
    )
    replayed = replay(trace, Overrides(spans={"grace": 15 * S, "storage_stall": 15 * S}))
    assert outcome(replayed) == (None, 10.5)
    assert {step.assessment.verdict for step in replayed.steps if step.assessment} == {
        Verdict.STORAGE_WAIT
    }


def test_a_trace_without_an_end_goes_as_far_as_its_records() -> None:
    assert outcome(replay(traced(looks(IDLE, [1, 2, 3]), 0, None))) == (None, 3)
    assert outcome(replay(traced([], 0, None))) == (None, 0)


def test_a_request_does_not_make_sigkill_earlier() -> None:
    """The process waits for storage until 2 s, so SIGKILL is due StorageStallSec= after SIGTERM. A
    request at 5 s changes nothing, as in the recorded job."""
    waits, idle = looks(WAITING, [0.1, 1, 2]), looks(IDLE, range(3, 70))
    trace = traced([*waits, *idle, ChangeRecord(at(5), FORCE, Policy())], 70)
    unchanged = traced([*waits, *idle], 70)
    assert outcome(replay(trace)) == outcome(replay(unchanged)) == (Result.KILLED, 60)


def test_requests_that_join_count_from_their_time_on() -> None:
    quick = replace(Policy(), grace=2 * S, stall=0)
    joined = ChangeRecord(at(12.5), FORCE, quick)
    idle = looks(IDLE, [0.1, *range(1, 20)])
    trace = traced([*idle, joined], 20, flags=Flag(0), grace=50 * S)
    assert outcome(replay(trace)) == (Result.KILLED, 12.5)
    assert replay(trace).flags == FORCE
    assert outcome(replay(trace, Overrides(remove=FORCE))) == (Result.SURVIVED, 15)
    assert outcome(replay(trace, Overrides(spans={"grace": 15 * S}))) == (Result.KILLED, 15)


def test_a_stopped_guest_is_continued_and_its_time_starts_again() -> None:
    stopped = replace(IDLE, state="T")
    trace = traced(looks(stopped, [5]) + looks(IDLE, range(6, 20)), 20)
    replayed = replay(trace)
    assert outcome(replayed) == (Result.KILLED, 15)
    assert [
        (step.decision.action, step.at)
        for step in replayed.steps
        if step.decision.action is not Action.WAIT
    ] == [(Action.CONTINUE, at(5)), (Action.KILL, at(15))]


def test_sigcont_is_sent_three_times_at_most() -> None:
    trace = traced(looks(replace(IDLE, state="T"), range(1, 40)), 40)
    actions = [step.decision.action for step in replay(trace).steps]
    assert actions.count(Action.CONTINUE) == 3


def test_replay_shows_data_that_a_clock_would_have_lost() -> None:
    replayed = replay(FLUSHING, Overrides(add=FIXED))
    assert replayed.data_at_risk
    assert replayed.written_later == 19 * S  # from 10 s to the last sample at 29 s
    assert replay(FLUSHING).written_later is None
    assert not replay(STUCK).data_at_risk


# The command


@pytest.fixture
def stuck_file(tmp_path: Path) -> str:
    path = tmp_path / "stuck.jsonl"
    header = STUCK.header
    lines = (record_line(header, record) for record in STUCK.records)
    path.write_text(header_line(header) + "".join(lines))
    return str(path)


def test_it_tells_the_story(stuck_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", stuck_file, "--grace", "2.5s", "--stall", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("web (pid 17), job 1\n")
    assert "force, grace 2.5s, stall 0" in text
    assert "SIGKILL would have been sent after 2.5s, with nothing outstanding." in text
    assert "The last sample is 500ms older" in text
    assert "ended as killed after 10.002s, with SIGKILL after 10.001s" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--grace", "1min"], "The trace ends after 10.001s, before any further step"),
        (["--no-force", "--reap", "0"], "would have given up after 10s, without SIGKILL"),
    ],
)
def test_other_ends(
    stuck_file: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", stuck_file, *options]) == 0
    assert said in capsys.readouterr().out


def test_nothing_hostile_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\n[bold]\u202ex"
    header = replace(STUCK.header, name=evil)
    sample = replace(WAITING, at=at(1), threads=(replace(SYNC, name=evil, wchan=evil),))
    path = tmp_path / "\x1b[2J.jsonl"
    path.write_text(header_line(header) + record_line(header, sample))
    assert main(["replay", str(path)]) == 0
    path.write_text("{}\n")
    assert main(["replay", str(path)]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\u202e" not in captured.out + captured.err
    assert "[2J\ufffd[bold]" in captured.out


def test_files_that_are_not_traces_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "missing", "No such file"),
        (Path("/dev/null"), "it is empty"),
        (Path("/dev/zero"), "longer than"),
    ):
        assert main(["replay", str(path)]) == 2
        assert said in capsys.readouterr().err
    assert main(["replay", "--json", "\0"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["exit_code"], document["error"]["name"]) == (
        2,
        "org.qkilld1.Error.InvalidArgs",
    )


# Recorded jobs

CASES = [
    pytest.param(path, case, id=" ".join([path.stem, *case["options"]]))
    for path in sorted(TRACES.glob("*.jsonl"))
    for case in json.loads(path.with_suffix(".expected.json").read_text())
]


@pytest.mark.parametrize(("path", "case"), CASES)
def test_recorded(path: Path, case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert case.keys() <= {"options", "replayed", "verdicts"}
    assert main(["replay", "--json", str(path), *case["options"]]) == 0
    found = json.loads(capsys.readouterr().out)
    for key, expected in case["replayed"].items():
        value = found["replayed"][key]
        if isinstance(expected, list):
            low, high = expected
            assert value is not None, key
            assert low <= value <= high, key
        else:
            assert value == expected, key
    if "verdicts" in case:
        steps = [s for s in found["steps"] if s["at_usec"] >= case["verdicts"]["from_usec"]]
        assert steps
        assert {step["verdict"] for step in steps} <= set(case["verdicts"]["are"])


def test_every_recorded_job_is_expected_to_be_something() -> None:
    stems = {path.name.partition(".")[0] for path in TRACES.iterdir()} - {"README", "matrix"}
    assert stems == {path.stem for path in TRACES.glob("*.jsonl")}
    assert stems
    readme = (TRACES / "README").read_text()
    assert [stem for stem in sorted(stems) if f"\n{stem} " not in readme] == []
