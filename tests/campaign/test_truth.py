"""The truth that is derived from a schedule, and its comparison with a run."""

from __future__ import annotations

import pytest

from tests.campaign.draw import draw
from tests.campaign.judge import FALSE_KILL, FALSE_WAIT, UNSEEN, WRONG_RISK, judge
from tests.campaign.run import Outcome
from tests.campaign.spec import HOST, PROCESS, Change, Disk, Spec
from tests.campaign.truth import State, truth

NBD = Disk("nbd")
FREEZE, THAW = Change(0, 0, "freeze"), Change(10, 0, "thaw")


def states(disk: Disk, *changes: Change) -> list[tuple[float, State]]:
    found = truth(Spec("x", (disk,)), [(change.at, change) for change in changes])
    return [(span.since, span.state) for span in found.spans]


def outcome(
    *applied: Change,
    killed: float | None = None,
    seconds: float = 30,
    lost: int = 0,
    at_risk: bool = False,
) -> Outcome:
    rungs = [("terminate", "SIGTERM", 0)]
    if killed is not None:
        rungs.append(("kill", "SIGKILL", int(killed * 1e6)))
    return Outcome(
        result="exited" if killed is None else "killed",
        seconds=seconds if killed is None else killed,
        at_risk=at_risk,
        records=120,
        lost=lost,
        applied=[(change.at, change) for change in applied],
        receipt={"rungs": rungs},
    )


def kinds(of: Outcome, *disks: Disk) -> list[str]:
    return [finding.kind for finding in judge(Spec("x", disks or (NBD,)), of).findings]


def test_changes_before_the_stop_apply_at_its_start() -> None:
    assert states(NBD, Change(-2, 0, "slow", 1), Change(-1, 0, "freeze")) == [(0, State.STILL)]


def test_storage_that_was_slow_is_slow_once_it_goes_on() -> None:
    schedule = Change(0, 0, "slow", 1), Change(3, 0, "freeze"), Change(9, 0, "thaw")
    assert states(NBD, *schedule) == [(0, State.SLOW), (3, State.STILL), (9, State.SLOW)]


def test_a_server_that_leaves_breaks_disks_without_reconnect() -> None:
    leave = Change(0, 0, "leave")
    assert states(NBD, leave) == [(0, State.BROKEN)]
    assert states(Disk("nbd", reconnect=300), leave) == [(0, State.STILL)]
    # With a proxy, the proxy answers.
    assert states(Disk("nbd", reconnect=300, proxy=True), leave) == [(0, State.BROKEN)]


def test_iscsi_gives_up_its_connection_and_other_disks_may_go_on() -> None:
    spec = Spec("x", (Disk("iscsi"), Disk()))
    spans = truth(spec, [(0, FREEZE), (40, THAW)]).spans
    still = [(span.since, span.until, span.mixed) for span in spans if span.state is State.STILL]
    assert still == [(0, 13, False), (13, 29, True), (29, 40, False)]
    assert [span.reconnects for span in spans] == [False, True, False, False]
    assert truth(spec, [(0, FREEZE)]).stands_since(spans[2]) == 0
    # QEMU may then write to another disk. This write excuses a late SIGKILL only if it is in the
    # trace.
    disks = Disk("iscsi"), Disk()
    assert kinds(outcome(FREEZE, killed=20.5, at_risk=True), *disks) == []
    assert kinds(outcome(FREEZE, killed=25, at_risk=True), *disks) == [FALSE_WAIT]
    assert kinds(outcome(FREEZE, killed=40, at_risk=True), *disks) == [FALSE_WAIT]


def test_times_count_from_the_start_of_the_job() -> None:
    late = outcome(Change(1, 0, "freeze"), killed=20.5)
    assert kinds(late) == [FALSE_KILL, WRONG_RISK]
    late.delay = 0.5
    assert kinds(late) == [WRONG_RISK]


def test_the_process_counts_before_its_storage() -> None:
    schedule = FREEZE, Change(2, PROCESS, "frozen"), Change(5, PROCESS, "go")
    assert states(NBD, *schedule) == [(0, State.STILL), (2, State.STOPPED), (5, State.STILL)]


@pytest.mark.parametrize(("killed", "right"), [(10, False), (19.5, False), (20.1, True)])
def test_a_kill_is_right_from_the_time_of_the_policy_on(killed: float, right: bool) -> None:
    found = kinds(outcome(FREEZE, killed=killed, at_risk=True))
    assert (FALSE_KILL in found) is not right


def test_a_kill_of_storage_that_continues_is_false() -> None:
    assert FALSE_KILL in kinds(outcome(FREEZE, THAW, killed=20.1, at_risk=True))


def test_a_wait_past_the_time_of_the_policy_is_false() -> None:
    assert FALSE_WAIT not in kinds(outcome(FREEZE, killed=21, at_risk=True))
    assert FALSE_WAIT in kinds(outcome(FREEZE, killed=22, at_risk=True))


@pytest.mark.parametrize("what", ["leave", "fast"])
def test_a_process_that_nothing_holds_is_to_exit(what: str) -> None:
    over = outcome(Change(0, 0, what), at_risk=what == "leave")
    over.seconds = 38
    assert kinds(over) == []
    over.seconds = 40
    assert kinds(over) == [FALSE_WAIT]


def test_time_in_which_the_host_stood_still_does_not_count() -> None:
    pause = Change(5, HOST, "pause"), Change(30, HOST, "go")
    assert FALSE_KILL in kinds(outcome(FREEZE, *pause, killed=31, at_risk=True))
    assert kinds(outcome(FREEZE, *pause, killed=45.5, at_risk=True)) == []


def test_until_qemu_has_looked_for_a_server_that_is_back_it_waits() -> None:
    schedule = Change(0, 0, "leave"), Change(15, 0, "back")
    waiting = Disk("nbd", reconnect=300)
    assert kinds(outcome(*schedule, killed=20.1, at_risk=True), waiting) == []
    assert FALSE_KILL in kinds(outcome(*schedule, killed=33, at_risk=True), waiting)


def test_records_that_are_lost_are_to_be_announced() -> None:
    assert kinds(outcome(lost=1)) == [WRONG_RISK]
    assert kinds(outcome(FREEZE, killed=20.5, lost=1, at_risk=True)) == []
    assert kinds(outcome(FREEZE, killed=20.5)) == [WRONG_RISK]
    assert kinds(outcome(at_risk=True)) == [WRONG_RISK]


def test_records_refused_by_storage_are_counted_separately() -> None:
    assert kinds(outcome(Change(0, 0, "fail"), lost=1)) == [UNSEEN]


FUSE = Disk(store="fuse")
WAITS = Disk("nbd", reconnect=300)
BACK = Change(15, 0, "back")


@pytest.mark.parametrize("disk", [WAITS, FUSE, Disk("nbd", proxy=True)])
def test_a_server_that_ends_during_the_job_is_a_risk(disk: Disk) -> None:
    """Even if no record is lost: the server may have held data."""
    ends = Change(5, 0, "leave")
    assert kinds(outcome(ends, BACK), disk) == [WRONG_RISK]
    assert kinds(outcome(ends, BACK, lost=1), disk) == [WRONG_RISK]
    assert kinds(outcome(ends, BACK, at_risk=True), disk) == []


def test_a_server_that_ended_before_it_was_found_may_be_a_risk() -> None:
    for ends in (Change(0, 0, "leave"), Change(1, 0, "leave")):
        assert kinds(outcome(ends, BACK, at_risk=True), WAITS) == []
        assert kinds(outcome(ends, BACK), WAITS) == []
        assert kinds(outcome(ends, BACK, lost=1), WAITS) == [WRONG_RISK]
    after = Change(30, 0, "leave")
    assert kinds(outcome(after, seconds=29, at_risk=True), WAITS) == [WRONG_RISK]


def test_over_tcp_a_server_may_end_after_the_disk_was_closed() -> None:
    ends, disk = Change(5, 0, "leave"), Disk("nbd", transport="tcp", reconnect=300)
    for at_risk in (False, True):
        assert kinds(outcome(ends, BACK, at_risk=at_risk), disk) == []


def test_a_run_is_drawn_again_from_its_seed() -> None:
    assert draw(5, 3) == draw(5, 3)
    assert draw(5, 3) != draw(5, 4)
    assert Spec.from_json(draw(5, 3).to_json()) == draw(5, 3)
