"""What a unit's settings allow qkilld-stop, and what it tells systemd."""

from __future__ import annotations

from typing import Any

import pytest

from qkilld.model.jobview import JobView
from qkilld.model.unit import UnitFacts
from qkilld.model.words import INFINITY, UNKNOWN, USEC_PER_SEC
from qkilld.stop.limits import (
    MARGIN,
    STEP,
    being_stopped,
    extension,
    limits_of,
    would_be_killed,
)
from qkilld.stop.status import status

S = USEC_PER_SEC
OWN = 17


def unit(**settings: Any) -> UnitFacts:
    usual: dict[str, Any] = {
        "active_state": "deactivating",
        "timeout_stop": 90 * S,
        "notify_access": "exec",
        "control_pid": OWN,
        "main_pid": 16,
    }
    return UnitFacts("web.service", **(usual | settings))


def test_nothing_limits_a_helper_that_is_heard() -> None:
    for facts in (unit(), unit(notify_access="all", control_pid=OWN + 1)):
        limits = limits_of(facts, OWN)
        assert (limits.stay, limits.warnings) == (INFINITY, ())


@pytest.mark.parametrize(
    ("settings", "mends"),
    [
        ({"notify_access": "none"}, "Add NotifyAccess=exec to [Service]"),
        ({"notify_access": "main"}, "Add NotifyAccess=exec to [Service]"),
        ({"control_pid": OWN + 1}, "Have it `exec qkilld-stop`"),
    ],
)
def test_one_that_is_not_heard_leaves_in_time(settings: dict[str, Any], mends: str) -> None:
    for seconds in (1, 5, 90, 3600):
        limits = limits_of(unit(timeout_stop=seconds * S, **settings), OWN)
        assert 0.8 * seconds * S <= limits.stay <= seconds * S - 100_000
        (warning,) = limits.warnings
        assert mends in warning
    # There is no limit, and nothing to be warned of.
    endless = limits_of(unit(timeout_stop=INFINITY, **settings), OWN)
    assert (endless.stay, endless.warnings) == (INFINITY, ())


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"kill_mode": "none"}, "KillMode=none"), ({"sends_sigkill": False}, "SendSIGKILL=no")],
)
def test_a_second_guest_on_the_same_disks_is_warned_of(
    settings: dict[str, Any], named: str
) -> None:
    (warning,) = limits_of(unit(**settings), OWN).warnings
    assert named in warning
    assert not would_be_killed(unit(**settings), 16)


def test_force_is_for_what_systemd_would_kill() -> None:
    for mode in ("control-group", "mixed", "process"):
        assert would_be_killed(unit(kill_mode=mode), 16)
    assert not would_be_killed(unit(kill_mode="process"), 18), "another one is left alone"
    assert not would_be_killed(unit(timeout_stop=INFINITY), 16)


def test_only_a_unit_that_is_being_stopped_concerns_it() -> None:
    assert being_stopped(unit())
    assert not being_stopped(unit(control_pid=0))
    assert not being_stopped(unit(active_state="active"))


def test_an_extension_follows_the_deadline_and_is_short() -> None:
    now = 1000 * S
    assert extension([now + 10 * S], now) == 10 * S + MARGIN
    assert extension([now + 10 * S, now + 3 * S], now) == 10 * S + MARGIN
    assert extension([now - S], now) == MARGIN
    assert extension([INFINITY], now) == STEP + MARGIN


def view(pid: int = 4, **changes: Any) -> JobView:
    properties = {
        "PID": pid,
        "Name": "web",
        "Phase": "terminate",
        "Verdict": "flushing",
        "Result": "",
        "Flags": 1,
        "Held": False,
        "NotBeforeUSec": 0,
        "DeadlineUSec": 20 * S,
        "BytesWritten": 12_340_000,
        "BytesPending": UNKNOWN,
    }
    return JobView("/org/qkilld1/job/1", properties | changes)


def test_the_status_says_what_is_waited_for() -> None:
    assert status([view()], 10 * S) == (
        "Stopping web (pid 4), which is making progress, 12.3 MB written, "
        "SIGKILL in 10s unless it moves"
    )
    assert "gives up in 10s" in status([view(Flags=0)], 10 * S)
    assert "unless" not in status([view(Phase="reap")], 10 * S)
    assert status([view(Held=True)], 10 * S).endswith(", held until `qkillctl release`")
    assert "cannot be judged" in status([view(Verdict="of-a-newer-daemon")], 10 * S)
    text = status([view(pid) for pid in range(10, 15)], 10 * S)
    assert text.startswith("Stopping 5 guests: ") and text.endswith("; and 2 more")
    assert status([], 0)


def test_a_hostile_name_stays_one_line() -> None:
    assert "\n" not in status([view(Name="a\nREADY=1")], 0)
