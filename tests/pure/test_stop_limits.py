"""What a unit's settings allow qkilld-stop to do, and what qkilld-stop tells systemd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.unit_limits import being_stopped, limits_of, would_be_killed
from qkilld.model.constants import INFINITY, USEC_PER_SEC, Flag, Phase
from qkilld.model.job_status import JobStatus
from qkilld.model.unit import UnitFacts
from qkilld.stop.limits import MARGIN, STEP, extension
from qkilld.stop.status_line import status_line

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
        limits = limits_of(facts, OWN, 16, facts)
        assert (limits.stay, limits.ask, limits.warnings) == (INFINITY, INFINITY, ())


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"notify_access": "none"}, "Add NotifyAccess=exec to [Service]"),
        ({"notify_access": "main"}, "Add NotifyAccess=exec to [Service]"),
        ({"control_pid": OWN + 1}, "Write `exec qkilld-stop`"),
    ],
)
def test_one_that_is_not_heard_leaves_in_time(settings: dict[str, Any], fix: str) -> None:
    for seconds in (1, 5, 90, 3600):
        limits = limits_of(unit(timeout_stop=seconds * S, **settings), OWN, 16, None)
        assert 0.8 * seconds * S <= limits.stay <= seconds * S - 100_000
        (warning,) = limits.warnings
        assert fix in warning
        # Half of the time, but at least 5 s, is left for SIGTERM and the flush.
        assert limits.ask == max(0, min(seconds * S // 2, (seconds - 5) * S))
    # Without a timeout, there is no warning.
    endless = limits_of(unit(timeout_stop=INFINITY, **settings), OWN, 16, None)
    assert (endless.stay, endless.warnings) == (INFINITY, ())


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"kill_mode": "none"}, "KillMode=none"), ({"sends_sigkill": False}, "SendSIGKILL=no")],
)
def test_a_second_guest_on_the_same_disks_is_warned_of(
    settings: dict[str, Any], named: str
) -> None:
    (warning,) = limits_of(unit(**settings), OWN, 16, None).warnings
    assert named in warning
    assert not would_be_killed(unit(**settings), 16)


def test_force_is_for_what_systemd_would_kill() -> None:
    for mode in ("control-group", "mixed", "process"):
        assert would_be_killed(unit(kill_mode=mode), 16)
    assert not would_be_killed(unit(kill_mode="process"), 18), "another one is left alone"
    assert not would_be_killed(unit(timeout_stop=INFINITY), 16)


GUARD = replace(unit(), id="qkilld-scope@web.scope.service", main_pid=0)
SCOPE = UnitFacts("web.scope", active_state="active", job=7, timeout_stop=90 * S)


@pytest.mark.parametrize(
    ("scope", "force"),
    [
        (SCOPE, True),
        (replace(SCOPE, active_state="deactivating", job=0), True),
        (replace(SCOPE, timeout_stop=INFINITY), False),
        (replace(SCOPE, sends_sigkill=False), False),
        (replace(SCOPE, kill_mode="none"), False),
        (replace(SCOPE, kill_mode="process"), False),
        # The guard is stopped without its scope.
        (replace(SCOPE, job=0), False),
        (None, False),
    ],
)
def test_the_unit_of_the_guest_decides_about_sigkill(scope: UnitFacts | None, force: bool) -> None:
    assert limits_of(GUARD, OWN, 16, scope).force is force
    assert limits_of(GUARD, OWN, 16, scope).extendable


@pytest.mark.parametrize("elsewhere", [None, replace(SCOPE, job=0)])
def test_the_main_process_is_killed_in_whatever_unit_it_runs(elsewhere: UnitFacts | None) -> None:
    assert limits_of(unit(), OWN, 16, elsewhere).force
    assert not limits_of(unit(), OWN, 18, elsewhere).force
    assert not limits_of(unit(timeout_stop=INFINITY), OWN, 16, elsewhere).force


def test_only_a_unit_that_is_being_stopped_counts() -> None:
    assert being_stopped(unit())
    assert not being_stopped(unit(control_pid=0))
    assert not being_stopped(unit(active_state="active"))


def test_an_extension_follows_the_deadline_and_is_short() -> None:
    now = 1000 * S
    assert extension([now + 10 * S], now) == 10 * S + MARGIN
    assert extension([now + 10 * S, now + 3 * S], now) == 10 * S + MARGIN
    assert extension([now - S], now) == MARGIN
    assert extension([INFINITY], now) == STEP + MARGIN


JOB = JobStatus(
    id=1,
    pid=4,
    name="web",
    flags=Flag.FORCE,
    phase=Phase.TERMINATE,
    verdict="flushing",
    started=0,
    deadline=20 * S,
    bytes_written=12_340_000,
)


def test_the_status_says_what_is_waited_for() -> None:
    assert status_line([JOB], 10 * S) == (
        "Stopping web (pid 4): flushes, 12.3 MB written, SIGKILL in 10s"
    )
    moving = replace(JOB, standstill=12 * S)
    assert status_line([moving], 10 * S).endswith("SIGKILL only after 12s without progress")
    assert status_line([moving], 15 * S).endswith("SIGKILL in 5s unless it moves")
    assert "gives up in 10s" in status_line([replace(JOB, flags=Flag(0))], 10 * S)
    assert status_line([replace(JOB, held=True)], 10 * S).endswith(
        ", held until `qkillctl release`"
    )
    assert "of-a-newer-daemon" in status_line([replace(JOB, verdict="of-a-newer-daemon")], 10 * S)
    asking = replace(JOB, phase="powerdown", verdict="unknown", bytes_written=None)
    assert status_line([replace(asking, guest_asked="asked")], 10 * S) == (
        "Stopping web (pid 4): was asked to shut down, SIGTERM in 10s unless it shuts down"
    )
    assert "about to be asked" in status_line([asking], 10 * S)
    down = status_line([replace(asking, verdict="guest-shutdown")], 10 * S)
    assert "web (pid 4): shuts down, SIGTERM in 10s" in down
    text = status_line([replace(JOB, pid=pid) for pid in range(10, 15)], 10 * S)
    assert text.startswith("Stopping 5 guests: ") and text.endswith("; and 2 more")


def test_a_hostile_name_stays_one_line() -> None:
    assert "\n" not in status_line([replace(JOB, name="a\nREADY=1")], 0)
