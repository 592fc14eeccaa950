"""Figures about stops, in the format of the OpenMetrics specification."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qkilld.adapters.journal_reader import Receipt
from qkilld.ctl.metrics import _replace, exposition
from qkilld.model.errors import Failed
from tests.pure.test_job_status import JOB, NOW, S

RECEIPT = Receipt(
    time=0,
    pid=7,
    guest="web",
    unit="",
    result="exited",
    elapsed=2 * S,
    verdict="gone",
    data_at_risk=False,
    guest_asked="",
    gone_after=None,
    program="qkilld",
)
KILLED = replace(RECEIPT, result="killed", elapsed=61 * S, data_at_risk=True)
HOSTILE = replace(RECEIPT, result='a"b\\c\n\x1b[2J', elapsed=None)
SAMPLE = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\.)*",?)+\})? [0-9.]+')


def test_the_text() -> None:
    lines = list(exposition([RECEIPT, KILLED], [JOB, replace(JOB, verdict="idle")], NOW))
    assert lines[-1] == "# EOF"
    for line in lines:
        assert line.startswith("# ") or SAMPLE.fullmatch(line), line
    assert 'qkilld_jobs{phase="terminate",verdict="idle"} 1' in lines
    assert 'qkilld_stops_total{result="exited"} 1' in lines
    assert 'qkilld_stops_total{result="survived"} 0' in lines
    assert "qkilld_stops_data_at_risk_total 1" in lines
    assert "qkilld_oldest_job_seconds 3.000" in lines
    assert 'qkilld_stop_duration_seconds_bucket{le="5.0"} 1' in lines
    assert 'qkilld_stop_duration_seconds_bucket{le="+Inf"} 2' in lines
    assert "qkilld_stop_duration_seconds_sum 63.000000" in lines
    # Each family is described once, before its samples.
    names = [line.split()[2] for line in lines if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))


def test_without_a_daemon_and_with_hostile_words() -> None:
    lines = list(exposition([HOSTILE], None, NOW))
    assert "qkilld_up 0" in lines
    (odd,) = [line for line in lines if "a\\" in line]
    assert SAMPLE.fullmatch(odd) and odd.isprintable()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "qkilld.prom"
    path.write_text("old")
    _replace(str(path), "new\n")
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(Failed):
        _replace(str(tmp_path / "missing/qkilld.prom"), "new\n")
