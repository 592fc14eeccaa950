"""Time spans: a table, and a comparison with systemd itself."""

from __future__ import annotations

import pytest

from qkilld.model.constants import INFINITY
from qkilld.model.timespan import format_usec, parse
from tests.lab import needs
from tests.lab.process import run

GOOD = {
    "10": 10_000_000,
    "0": 0,
    "1.5s": 1_500_000,
    ".5": 500_000,
    "+3": 3_000_000,
    "2h 30min": 9_000_000_000,
    "2h30min": 9_000_000_000,
    " 2 h\t30 min ": 9_000_000_000,
    "1 2": 3_000_000,
    "1s 2": 3_000_000,
    "1 .5": 1_500_000,
    "700ms": 700_000,
    "700msec": 700_000,
    "3us": 3,
    "3usec": 3,
    "3µs": 3,
    "3μs": 3,
    "1.0000001s": 1_000_000,
    "1sec 1second 1seconds": 3_000_000,
    "1m": 60_000_000,
    "1minute 2minutes": 180_000_000,
    "1hr 1hour 1hours": 10_800_000_000,
    "1d 1day 1days": 259_200_000_000,
    "1w 1week 1weeks": 1_814_400_000_000,
    "1M": 2_629_800_000_000,
    "1month 1months": 5_259_600_000_000,
    "1y 1year 1years": 94_672_800_000_000,
    "0.5y": 15_778_800_000_000,
    "18446744073708s": 18_446_744_073_708_000_000,
    "9223372036854775807us": 2**63 - 1,
    "0" * 5000 + "1s": 1_000_000,
    "infinity": INFINITY,
    " infinity ": INFINITY,
}

BAD = [
    *("", " ", "-1", "1d -1s", "soon", "5ns", "2mon", "1..5", "5.s", "5. 1", "1.2.3", ".", "s"),
    *("1e3", "0x10", "1, 2", "infinity 1", "INFINITY", "1S", "99999999999999999999", "584543y"),
    *("18446744073709s", "9223372036854775808us", "584542y", "584541y 1y 1M", "9" * 5000, "5 ."),
    *("18446744073709.551615s", "\N{ARABIC-INDIC DIGIT ONE}s", "1\N{NO-BREAK SPACE}s"),
]


@pytest.mark.parametrize(("text", "usec"), GOOD.items())
def test_good(text: str, usec: int) -> None:
    assert parse(text) == usec


@pytest.mark.parametrize("text", BAD)
def test_bad(text: str) -> None:
    with pytest.raises(ValueError, match="time span"):
        parse(text)


def test_errors_are_one_short_printable_line() -> None:
    with pytest.raises(ValueError) as caught:
        parse("\x1b[2J\n" + "x" * 5000)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", [*GOOD, *BAD])
def test_systemd_reads_the_same_spans(text: str) -> None:
    program = str(needs.program("systemd-analyze", "systemd"))
    done = run([program, "timespan", "--", text], env={"LANG": "C.UTF-8"})
    try:
        usec = parse(text)
    except ValueError:
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    if usec != INFINITY:  # systemd-analyze shows it as a signed number.
        assert f"s: {usec}\n" in done.stdout


@pytest.mark.parametrize(
    ("usec", "text"),
    [
        (0, "0"),
        (1, "1us"),
        (1_500, "1.5ms"),
        (700_000, "700ms"),
        (1_500_000, "1.5s"),
        (10_000_000, "10s"),
        (61_500_000, "1min 1.5s"),
        (90_000_000, "1min 30s"),
        (3_601_001_000, "1h 1.001s"),
        (31_557_600_000_000, "1y"),
        (34_560_000_000_000, "1y 1month 4d 7h 30min"),
        (INFINITY, "infinity"),
    ],
)
def test_format(usec: int, text: str) -> None:
    assert format_usec(usec) == text
    assert parse(text) == usec
