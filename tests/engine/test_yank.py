"""The rung that yanks dead storage before SIGKILL."""

from __future__ import annotations

import json
from dataclasses import replace
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import pytest

from qkilld.engine.job import Job
from qkilld.engine.snapshot import decode
from qkilld.model.access import Rank, Steerer
from qkilld.model.block_state import BlockState, GuestDisk, RequestQueue, YankInstance
from qkilld.model.constants import Flag, Phase, Result
from qkilld.model.event import MessageId, Priority
from qkilld.model.guest_state import KeptMonitor
from qkilld.model.policy import Config, Switches
from qkilld.model.sample import Io, Node, Peer, Sample, Socket
from tests.engine.conftest import IDLE, FakeProcess, S, World, make_guest
from tests.engine.test_server_watch import ServedWorld, client

FORCE = Flag.FORCE
ROOT = Steerer(0, Rank.ROOT)
DEAD = YankInstance("block-node", "dead", {"type": "block-node", "node-name": "dead"})
SOCKET = Socket(1, "unix", True, 900, 0, role="storage", node="dead")
STUCK = replace(
    IDLE,
    nodes=(Node("dead", "nbd", served=True),),
    sockets=(SOCKET,),
)


STUCK_SERVED = replace(STUCK, sockets=(replace(SOCKET, peer=Peer(90, "nbdkit", (), 0, None, ())),))


def stuck_world(config: Config | None = None) -> tuple[World, FakeProcess]:
    world = World(config)
    world.monitors.opens = True
    world.monitors.instances = (DEAD,)
    world.sampler.shows = lambda now: STUCK
    guest = make_guest()
    return world, FakeProcess(replace(guest, label=replace(guest.label, qmp=True)))


def begun(world: World, process: FakeProcess, flags: Flag = FORCE) -> Job:
    job = world.stop(process, flags)
    world.clock.advance(0)
    assert process.sent == [SIGTERM]
    return job


def test_the_receipt_names_storage_that_was_cut_off() -> None:
    world, process = stuck_world()
    job = begun(world, process)
    world.monitors.on_yank = process.die
    world.clock.advance(59)
    assert world.monitors.yanked == []
    world.clock.advance(3)
    assert world.monitors.yanked == [["dead"]]
    assert (job.result, process.sent) == (Result.EXITED, [SIGTERM])
    assert job.rungs[-1].action == "yank"
    assert "yanked" in [risk.code for risk in job.risks]


def test_storage_that_may_have_been_cut_off_is_at_risk() -> None:
    world, process = stuck_world()
    world.monitors.answers_yank = False
    job = begun(world, process)
    world.clock.advance(68)
    assert process.sent == [SIGTERM, SIGKILL]
    assert "yanked" in [risk.code for risk in job.risks]
    process.die()
    assert [rung.action for rung in job.rungs].count("yank") == 1


def test_storage_is_at_risk_if_the_monitor_closes_before_its_reply() -> None:
    world, process = stuck_world()
    world.monitors.yank_reply = None
    job = begun(world, process)
    world.clock.advance(62)
    assert "yanked" in [risk.code for risk in job.risks]
    assert job.phase is Phase.TERMINATE
    assert process.sent == [SIGTERM], "QEMU gets time to write its other disks"
    process.die()
    assert [rung.action for rung in job.rungs].count("yank") == 1


@pytest.mark.parametrize("reply", ["", None, "it was refused"])
def test_storage_is_at_risk_if_qemu_exits_before_its_reply(reply: str | None) -> None:
    """The reply comes while the job waits for the guest's servers."""
    world, process = ServedWorld(lambda now: STUCK_SERVED), client()
    world.monitors.opens = True
    world.monitors.instances = (DEAD,)
    process.set_label(replace(process.guest.label, qmp=True))
    job = begun(world, process)
    world.monitors.yank_reply = reply
    world.monitors.on_yank = process.die
    world.clock.advance(70)
    assert (job.result, process.sent) == (Result.EXITED, [SIGTERM])
    assert "yanked" in [risk.code for risk in job.risks]


def test_the_rung_the_risk_and_the_phase() -> None:
    world, process = stuck_world()
    job = begun(world, process)
    world.clock.advance(62)
    assert [(rung.phase, rung.action) for rung in job.rungs][-1] == ("terminate", "yank")
    assert (job.phase, job.running) == (Phase.TERMINATE, True)
    assert [risk.code for risk in job.risks] == ["yanked"]
    assert "dead was cut off" in job.risks[0].text
    (entry,) = [e for e in world.journal.events if e.id is MessageId.STORAGE_CUT_OFF]
    assert entry.priority is Priority.WARNING


def test_windows_start_again_and_sigkill_comes_when_nothing_is_left_to_cut_off() -> None:
    world, process = stuck_world()
    begun(world, process)
    world.clock.advance(62)
    assert process.sent == [SIGTERM]
    world.clock.advance(57)
    assert process.sent == [SIGTERM]
    world.clock.advance(5)
    assert (process.sent, world.monitors.yanked) == ([SIGTERM, SIGKILL], [["dead"]])


def test_a_healthy_disk_has_its_time_after_it() -> None:
    """After the yank, the healthy disk writes for 200 s."""
    world, process = stuck_world()
    begun(world, process)
    world.clock.advance(62)
    lost = replace(STUCK, sockets=())
    world.sampler.shows = lambda now: replace(
        lost,
        nodes=(),
        io=Io(0, 0, 0, 0, 0, now, 0),
    )
    world.clock.advance(200)
    assert process.sent == [SIGTERM]


@pytest.mark.parametrize("off", [Config(switches=Switches(yank=False)), None])
def test_without_it_sigkill_comes_at_the_same_time(off: Config | None) -> None:
    world, process = stuck_world(off)
    if off is None:
        world.monitors.instances = "no out-of-band commands"
    begun(world, process)
    world.clock.advance(62)
    assert (process.sent, world.monitors.yanked) == ([SIGTERM, SIGKILL], [])


def test_never_without_force() -> None:
    world, process = stuck_world()
    job = begun(world, process, Flag(0))
    world.clock.advance(100)
    assert (job.result, process.sent, world.monitors.yanked) == (Result.SURVIVED, [SIGTERM], [])


def test_a_hold_keeps_it_back() -> None:
    world, process = stuck_world()
    job = begun(world, process)
    world.clock.advance(30)
    job.hold(ROOT)
    world.clock.advance(300)
    assert (process.sent, world.monitors.yanked) == ([SIGTERM], [])
    job.release(ROOT)
    world.clock.advance(2)
    assert (process.sent, world.monitors.yanked) == ([SIGTERM], [["dead"]])


def test_a_monitor_that_falls_silent_does_not_keep_sigkill_back() -> None:
    world, process = stuck_world()
    begun(world, process)
    world.monitors.answers = False
    world.clock.advance(64)
    assert process.sent == [SIGTERM]
    world.clock.advance(4)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize(
    ("moves_after_s", "yanked", "sent"),
    [(0.5, [], [SIGTERM]), (2.9, [], [SIGTERM]), (1000, [["dead"]], [SIGTERM, SIGKILL])],
)
def test_storage_that_moved_before_a_late_reply_is_not_cut_off(
    moves_after_s: float, yanked: list[list[str]], sent: list[Signals]
) -> None:
    """A busy QEMU needs 3 s for each reply to query-yank."""
    world, process = stuck_world()
    world.monitors.answers_after_s = 3
    begun(world, process)
    moving = replace(STUCK, sockets=(), nodes=())
    moves_at = world.clock.now() + int((60 + moves_after_s) * S)
    world.sampler.shows = lambda now: (
        STUCK if now < moves_at else replace(moving, io=Io(0, 0, 0, 0, 0, now, 0))
    )
    world.clock.advance(130)
    assert (world.monitors.yanked, process.sent) == (yanked, sent)
    if not yanked:
        # If the storage stands still again, it can still be cut off.
        world.sampler.shows = lambda now: STUCK
        world.clock.advance(70)
        assert (world.monitors.yanked, process.sent) == ([["dead"]], [SIGTERM])


def test_useless_samples_do_not_start_an_attempt_again() -> None:
    """The monitor is silent, and on a busy host, the first sample after each pause is useless."""
    world, process = stuck_world()
    begun(world, process)
    world.monitors.answers = False
    sampled_at = world.clock.now()

    def shows(now: int) -> Sample:
        nonlocal sampled_at
        late, sampled_at = now - sampled_at > 2 * S, now
        return Sample(now, "?") if late else STUCK

    world.sampler.shows = shows
    world.clock.advance(70)
    assert (world.monitors.yanked, process.sent) == ([], [SIGTERM, SIGKILL])


def blind_world(blind_s: float) -> tuple[World, FakeProcess]:
    """A world in which QEMU needs 1.5 s to answer query-yank, and from then on, samples are useless
    for `blind_s`."""
    world, process = stuck_world()
    world.monitors.answers_after_s = 1.5
    begun(world, process)
    answers_at = world.clock.now() + int(61.49 * S)
    world.sampler.shows = lambda now: (
        Sample(now, "?") if answers_at <= now < answers_at + blind_s * S else STUCK
    )
    return world, process


@pytest.mark.parametrize("blind_s", [0, 1, 2.5, 4, 8, 30])
def test_a_reply_is_used_however_late_the_next_good_sample_is(blind_s: float) -> None:
    world, process = blind_world(blind_s)
    world.clock.advance(62 + blind_s + 3)
    assert (world.monitors.yanked, process.sent) == ([["dead"]], [SIGTERM])
    world.clock.advance(66)
    assert (world.monitors.yanked, process.sent) == ([["dead"]], [SIGTERM, SIGKILL])


WELL = YankInstance("block-node", "well", {"type": "block-node", "node-name": "well"})
TWO = replace(
    STUCK,
    nodes=(Node("dead", "nbd", served=True), Node("well", "nbd", served=True)),
    sockets=(SOCKET, replace(SOCKET, inode=2, send_queue=0, node="well")),
)


@pytest.mark.parametrize(
    ("hidden", "seconds", "yanked"),
    [
        ("sockets", 3, [["dead"]]),
        ("nodes", 3, [["dead"]]),
        ("rings", 3, [["dead"]]),
        # What is never readable cannot be waited for.
        ("sockets", 600, [["dead", "well"]]),
        ("rings", 600, [["dead"]]),
    ],
)
def test_if_a_source_is_unreadable_when_storage_is_chosen_the_next_sample_counts(
    hidden: str, seconds: int, yanked: list[list[str]]
) -> None:
    world, process = stuck_world()
    world.monitors.instances = (DEAD, WELL)
    begins = world.clock.now() + 60 * S
    changes: dict[str, Any] = {hidden: None}
    world.sampler.shows = lambda now: (
        replace(TWO, **changes) if begins <= now < begins + seconds * S else TWO
    )
    begun(world, process)
    world.clock.advance(70)
    assert (world.monitors.yanked, process.sent) == (yanked, [SIGTERM])


@pytest.mark.parametrize("blind_s", [0, 0.5, 4, 8])
def test_useless_samples_do_not_remove_the_timeout_of_a_command_without_a_reply(
    blind_s: float,
) -> None:
    world, process = blind_world(blind_s)
    world.monitors.answers_yank = False
    world.clock.advance(62 + blind_s + 3)
    assert (world.monitors.yanked, process.sent) == ([["dead"]], [SIGTERM])
    world.clock.advance(5)
    assert process.sent == [SIGTERM, SIGKILL]


def test_only_a_limited_number_of_connections_is_cut_off() -> None:
    """Each reply of a hostile QEMU names other connections, so that there is always another to cut
    off, and so that what is saved grows."""
    world, process = stuck_world()
    job = begun(world, process)
    for round_number in range(4):
        world.monitors.instances = tuple(
            YankInstance("block-node", f"{round_number} {number}", {}) for number in range(40)
        )
        world.clock.advance(70)
    assert [len(names) for names in world.monitors.yanked] == [40, 24]
    assert process.sent == [SIGTERM, SIGKILL]
    assert len(job.snapshot().cut_off) == 64


def test_storage_is_cut_off_a_limited_number_of_times() -> None:
    """Each reply of a hostile QEMU names one more connection."""
    world, process = stuck_world()
    begun(world, process)
    for name in range(12):
        world.monitors.instances = (YankInstance("block-node", f"{name}", {}),)
        world.clock.advance(62)
    assert len(world.monitors.yanked) == 8
    assert process.sent == [SIGTERM, SIGKILL]


def test_the_next_daemon_knows_when_it_was_done() -> None:
    world, process = stuck_world()
    job = begun(world, process)
    world.clock.advance(62)
    past = job.snapshot()
    after, process = stuck_world()
    after.clock.advance(63)
    after.registry.resume(process, past)
    after.clock.advance(56)
    assert process.sent == []
    assert after.registry.get(job.number).facts.yank_at == past.rung_at("yank")


def drive(title: str, device: str) -> GuestDisk:
    return GuestDisk("#block9", title, network=True, device=device, connections=(f"#{title}",))


DRIVES = tuple(map(drive, ("dead", "well"), ("/m/a/virtio-backend", "/m/b/virtio-backend")))
BUSY = (RequestQueue("/m/a/virtio-backend", 0, 3, 5), RequestQueue("/m/b/virtio-backend", 0, 0, 5))


def two_drives(restarts_after_s: float) -> tuple[World, FakeProcess]:
    """A world in which the next daemon has continued a job. Before SIGTERM, the first of the two
    disks left a request unanswered. Both connections look the same."""
    world, process = stuck_world()
    instances = tuple(
        YankInstance("block-node", f"#{disk.title}", {"type": "block-node"}) for disk in DRIVES
    )
    nodes = tuple(Node(disk.title, "nbd", served=True) for disk in DRIVES)
    shown = replace(
        IDLE,
        nodes=nodes,
        sockets=tuple(
            replace(SOCKET, inode=number, node=node.name, send_queue=0)
            for number, node in enumerate(nodes)
        ),
    )
    world.sampler.shows = lambda now: shown
    world.monitors.disks = lambda now: BlockState(
        at=0, runstate="running", disks=DRIVES, queues=BUSY
    )
    world.monitors.instances = instances
    job = world.stop(process, FORCE)
    world.clock.advance(restarts_after_s)
    assert process.sent == [SIGTERM]
    past = decode(json.loads(json.dumps(job.snapshot().to_json())))
    after, process = stuck_world()
    after.sampler.shows = lambda now: shown
    after.monitors.instances, after.monitors.yanked = instances, world.monitors.yanked
    after.clock.advance(restarts_after_s)
    after.registry.resume(process, past, KeptMonitor(99, ()))
    return after, process


def test_the_next_daemon_knows_which_disk_did_not_answer() -> None:
    after, process = two_drives(30)
    after.clock.advance(35)
    assert (after.monitors.yanked, process.sent) == ([["#dead"]], [])


def test_the_next_daemon_knows_what_was_cut_off() -> None:
    after, process = two_drives(65)
    after.clock.advance(65)
    assert (after.monitors.yanked, process.sent) == ([["#dead"], ["#well"]], [])


@pytest.mark.parametrize(
    ("opens_after_s", "opens", "cut_off"), [(3, True, True), (3, False, False), (100, True, False)]
)
def test_the_next_daemon_waits_for_its_monitor(
    opens_after_s: float, opens: bool, cut_off: bool
) -> None:
    """The monitor is still being opened when SIGKILL is due."""
    world, process = stuck_world()
    job = begun(world, process)
    world.clock.advance(59.5)
    past = job.snapshot()
    after, process = stuck_world()
    after.clock.advance(60)
    after.monitors.opens, after.monitors.opens_after_s = opens, opens_after_s
    after.registry.resume(process, past, KeptMonitor(99, ()))
    after.clock.advance(2)
    assert process.sent == []
    after.clock.advance(5)
    assert after.monitors.yanked == ([["dead"]] if cut_off else [])
    assert process.sent == ([] if cut_off else [SIGKILL])


def test_a_monitor_that_is_opened_during_the_attempt_is_used() -> None:
    """The flush before SIGTERM did not wait for the monitor."""
    world, process = stuck_world()
    world.monitors.opens_after_s = 64
    world.stop(process, FORCE)
    world.clock.advance(2)
    assert process.sent == [SIGTERM]
    world.clock.advance(63)
    assert (world.monitors.yanked, process.sent) == ([["dead"]], [SIGTERM])


def test_a_released_job_whose_monitor_was_not_opened_yet() -> None:
    """Many jobs of the earlier daemon wait for their first samples."""
    world, process = stuck_world()
    job = begun(world, process)
    job.hold(ROOT)
    world.clock.advance(70)
    past = job.snapshot()
    after, process = stuck_world()
    after.clock.advance(70)
    resumed = after.registry.resume(process, past, KeptMonitor(99, ()), among_many=True)
    resumed.release(ROOT)
    after.clock.advance(2)
    assert (after.monitors.yanked, process.sent) == ([["dead"]], [])
    after.registry.follow_resumed()
    after.clock.advance(2)
    assert (len(after.monitors.adopted), after.monitors.open_monitors) == (1, 1)


def test_the_next_daemon_cuts_off_nothing_that_moved_while_its_monitor_was_opened() -> None:
    world, process = stuck_world()
    job = begun(world, process)
    world.clock.advance(59.5)
    past = job.snapshot()
    after, process = stuck_world()
    after.clock.advance(60)
    after.monitors.opens_after_s = 3
    after.registry.resume(process, past, KeptMonitor(99, ()))
    after.clock.advance(1.5)
    moving = replace(STUCK, sockets=(), nodes=())
    after.sampler.shows = lambda now: replace(moving, io=Io(0, 0, 0, 0, 0, now, 0))
    after.clock.advance(10)
    assert (after.monitors.yanked, process.sent) == ([], [])
    # The dead storage can still be cut off later.
    after.sampler.shows = lambda now: STUCK
    after.clock.advance(62)
    assert (after.monitors.yanked, process.sent) == ([["dead"]], [])
