"""Parsing the monitor's replies about disks: real replies of QEMU, and garbage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qkilld.decision.flush_plan import plan_flush
from qkilld.model.block_state import (
    MAX_CONNECTIONS,
    BlockState,
    GuestDisk,
    NetworkDisk,
    NetworkStorage,
    RequestQueue,
)
from qkilld.model.codec import to_json
from qkilld.model.errors import MonitorProtocolError
from qkilld.monitor.block_answers import (
    MAX_DISKS,
    MAX_NODE_NAME,
    read_disks,
    read_jobs,
    read_migration,
    read_unused_images,
)

NBD = "nbd+unix://?socket=/run/x"


def disk(name: str, file: str, drv: str = "raw", **more: object) -> dict[str, Any]:
    inserted = {"node-name": f"#{name}", "ro": False, "file": file, "drv": drv, **more}
    return {"device": name, "qdev": f"/machine/{name}/virtio-backend", "inserted": inserted}


def named(name: str, file: str, drv: str, **more: object) -> dict[str, Any]:
    return {"node-name": name, "file": file, "drv": drv, **more}


def test_disks_and_the_connections_below_them() -> None:
    nodes = [named("#n", NBD, "nbd"), named("#f", "/img", "file")]
    remote, local = read_disks([disk("r", NBD), disk("l", "/img")], nodes)
    assert (remote.network, remote.connections) == (True, ("#n",))
    assert (local.network, local.connections) == (False, ())


def test_a_hostile_guest_cannot_make_a_saved_job_large() -> None:
    nodes = [named("n" * 1_000_000, NBD, "nbd")]
    nodes += [named(f"#n{number}", NBD, "nbd") for number in range(1_000)]
    (remote,) = read_disks([disk("r", NBD)], nodes)
    assert remote.connections == tuple(f"#n{number}" for number in range(MAX_CONNECTIONS))


def test_hostile_disks_cannot_make_a_saved_job_large() -> None:
    """All disks use the same file, and so the same connections."""
    letters = [chr(0x20000 + number) * MAX_NODE_NAME for number in range(64)]
    nodes = [named(letter, NBD, "nbd") for letter in letters]
    disks = read_disks([disk(f"r{number}", NBD) for number in range(MAX_DISKS)], nodes)
    every = tuple(name for one in disks for name in one.connections)
    storage = NetworkStorage.of(disks, every)
    assert len(json.dumps(to_json(storage))) < 64_000
    assert storage.stuck == tuple(letters)


def test_which_connections_are_saved() -> None:
    nodes = [named(f"#n{number}", f"{NBD}{number}", "nbd") for number in range(40)]
    disks = [disk("l", "/img"), *(disk(f"r{number}", f"{NBD}{number}") for number in range(40))]
    storage = NetworkStorage.of(read_disks(disks, nodes), ("#n3", "#n4"))
    expected = tuple(NetworkDisk(f"r{number}", (f"#n{number}",)) for number in range(40))
    assert storage == NetworkStorage(expected, ("#n3", "#n4"))


def test_a_network_is_known_by_json_and_by_what_an_image_is_backed_by() -> None:
    inner = 'json:{"driver":"qcow2","file":{"driver":"nbd","server.path":"/x"}}'
    assert read_disks([disk("a", inner)], [])[0].network
    image = {"filename": "/top", "backing-image": {"filename": "https://host/base"}}
    assert read_disks([disk("a", "/top", image=image)], [])[0].network


def test_cache_unsafe_shows_below_the_filter_of_a_backup() -> None:
    nodes = [named("#q", "/img", "qcow2", cache={"no-flush": True})]
    assert read_disks([disk("a", "/img", "copy-before-write")], nodes)[0].no_flush
    assert not read_disks([disk("a", "/other")], nodes)[0].no_flush


def test_images_that_no_disk_uses_are_known() -> None:
    throttled = 'json:{"driver": "throttle", "file": {"driver": "qcow2", "file": "/b"}}'
    filtered = 'json:{"driver": "throttle", "file": {"driver": "qcow2", "file": "/c"}}'
    below = 'json:{"driver": "qcow2", "file": "/c"}'
    disks = [{"device": "cd"}, disk("a", "/a"), disk("b", throttled), disk("c", filtered)]
    used = [named("#a", "/z", "qcow2", ro=False), named("#q", "/a", "qcow2", ro=False)]
    used += [named("#b", "/b", "qcow2", ro=False), named("#c", below, "qcow2", ro=False)]
    others = [named("base", "/d", "qcow2", ro=True), named("raw", "/d", "raw", ro=False)]
    assert read_unused_images(disks, [*used, *others, None, {}]) == ()
    left = [named("left", "/", "qcow2", ro=False), named("d", "/d", "vmdk", ro=False)]
    assert read_unused_images(disks, [*used, *left]) == ("left", "d")


def test_empty_and_read_only_drives_are_left_out() -> None:
    assert read_disks([{"device": "cd"}, disk("a", "/img", ro=True)], []) == ()


@pytest.mark.parametrize(
    "answer", [None, {}, [1], [{}], [{"inserted": 3}], "text", [disk("a", "/x")] * (MAX_DISKS + 1)]
)
def test_malformed_replies_are_refused(answer: object) -> None:
    with pytest.raises(MonitorProtocolError):
        read_disks(answer, [])


@pytest.mark.parametrize("name", ["\x1b[2J\n", "‮evil", "a" * 10_000])
def test_titles_are_printable_and_short(name: str) -> None:
    found = read_disks([disk(name, "/img")], [])[0]
    assert found.title.isprintable() and len(found.title) <= 128
    assert found.node == f"#{name}"


def test_jobs_that_are_over_do_not_count() -> None:
    job = {"type": "backup", "device": "d", "offset": 5, "len": 9, "status": "running"}
    assert [one.progress for one in read_jobs([job, {**job, "status": "concluded"}])] == [5]
    assert read_migration({}) == () == read_migration({"status": "completed"})
    (migration,) = read_migration({"status": "active", "ram": {"transferred": 7}})
    assert (migration.migration, migration.progress) == (True, 7)
    for wrong in (3, {"status": 3}, None):
        with pytest.raises(MonitorProtocolError):
            read_migration(wrong)


LOCAL = GuestDisk("#l", "l", network=False, device="/m/scsi/virtio-backend/scsi.0")
REMOTE = GuestDisk("#r", "r", network=True, device="/m/ide.0")


def state(*disks: GuestDisk, queues: tuple[RequestQueue, ...] | None = (), **more: Any) -> Any:
    return BlockState(at=0, runstate="running", disks=disks, queues=queues, **more)


def test_stop_is_not_sent_if_nothing_tells_whether_a_network_disk_answers() -> None:
    plan = plan_flush(state(LOCAL, REMOTE))
    assert (plan.stop, plan.disks) == (False, (LOCAL,))
    assert "r, which lies on a network" in plan.incomplete_because


def test_a_disk_of_a_controller_whose_queue_is_stuck_is_held_up() -> None:
    first = RequestQueue("/m/scsi/virtio-backend", 2, 3, 65_535)
    plan = plan_flush(state(LOCAL, queues=(first,)), state(LOCAL, queues=(first,)))
    assert (plan.stop, plan.stuck) == (False, (LOCAL,))
    moved = RequestQueue("/m/scsi/virtio-backend", 2, 3, 1)
    assert plan_flush(state(LOCAL, queues=(first,)), state(LOCAL, queues=(moved,))).stop


def test_a_vhost_device_keeps_stop_back() -> None:
    plan = plan_flush(state(LOCAL, foreign=("vhost-user-blk",)))
    assert (plan.stop, plan.disks) == (False, (LOCAL,))


def test_disks_that_are_another_hosts_are_left_alone() -> None:
    moved = BlockState(at=0, runstate="postmigrate", disks=(LOCAL,))
    assert plan_flush(moved).disks == () and not plan_flush(moved).stop
