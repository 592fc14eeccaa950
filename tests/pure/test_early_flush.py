"""Which disks are flushed before QEMU asks a file system that may not answer, and in which
order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.decision.early_flush import EarlyFlush, may_hang, needs_second_reading, plan_early_flush
from qkilld.decision.verdict import assess
from qkilld.model.block_state import BlockState, GuestDisk, RequestQueue
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.sample import ImagePlace, Io, Mount, Sample, Thread
from qkilld.monitor.block_answers import read_disk_statistics


def disk(name: str, *, network: bool = False, device: str = "") -> GuestDisk:
    return GuestDisk(f"#{name}", name, network, device=device or None, names=(name, f"#{name}"))


FUSE = Mount("fuse.lab", None, None, "0:53")
ON_FUSE, LOCAL, ADDED = disk("remote"), disk("local"), disk("added")
NBD = disk("nbd", network=True)
PLACES = (ImagePlace(("remote",), "0:53"), ImagePlace(("local",), ""))
S = USEC_PER_SEC
HELD = Thread(7, "worker", "D", 18, True, "fuse", call="pwrite64", descriptor=9, target="mount")


def sample(at: int, images: tuple[ImagePlace, ...] | None = PLACES, *threads: Thread) -> Sample:
    return Sample(
        at=at,
        state="S",
        cpu=0,
        switches=0,
        io=Io(0, 0, 0, 0, 0, 0, 0),
        threads=threads,
        rings=0,
        direct=False,
        devices=(),
        mounts=(FUSE,),
        sockets=(),
        nodes=(),
        images=images,
    )


def plan(
    *disks: GuestDisk, images: tuple[ImagePlace, ...] | None = PLACES, runstate: str = "running"
) -> EarlyFlush:
    state = BlockState(at=0, runstate=runstate, disks=disks, queues=())
    return plan_early_flush(state, None, assess(None, sample(0, images)))


def test_mounts_and_unknown_mounts_may_hang() -> None:
    assert may_hang(sample(0))
    assert may_hang(replace(sample(0), mounts=None)), "unknown is never none"
    assert not may_hang(replace(sample(0), mounts=()))


def test_a_disk_on_the_file_system_is_left_to_the_look_that_asks_it() -> None:
    assert plan(ON_FUSE, LOCAL) == EarlyFlush((LOCAL,), (), "")


def test_a_node_below_can_be_the_one_that_is_named() -> None:
    remote = replace(ON_FUSE, names=("#1", "#2", "remote"))
    assert plan(remote, LOCAL).healthy == (LOCAL,)


def test_if_all_images_on_it_are_named_no_other_disk_lies_on_it() -> None:
    assert plan(ON_FUSE, ADDED, LOCAL) == EarlyFlush((ADDED, LOCAL), (), "")


@pytest.mark.parametrize("names", [(), ("gone",)])
def test_if_one_is_not_the_disks_that_nobody_names_come_last(names: tuple[str, ...]) -> None:
    images = (ImagePlace(names, "0:53"), ImagePlace(("local",), ""))
    assert plan(ADDED, LOCAL, images=images) == EarlyFlush((LOCAL,), (ADDED,), "")


def test_if_nothing_is_known_no_disk_is_called_healthy() -> None:
    assert plan(ON_FUSE, LOCAL, images=None) == EarlyFlush((), (ON_FUSE, LOCAL), "")


def test_a_disk_on_a_network_is_left_to_the_next_look() -> None:
    assert plan(NBD, LOCAL) == EarlyFlush((LOCAL,), (), "")


def test_disks_that_are_not_active_here_are_not_flushed() -> None:
    assert plan(LOCAL, runstate="inmigrate") == EarlyFlush((), (), "")


def standing(*threads: Thread) -> EarlyFlush:
    state = BlockState(at=0, runstate="running", disks=(ON_FUSE, NBD, LOCAL), queues=())
    first = assess(None, sample(S, PLACES, *threads))
    second = assess(first, sample(2 * S, PLACES, *threads))
    assert needs_second_reading(state, first) == bool(threads)
    return plan_early_flush(state, state, second)


def test_a_call_to_it_that_does_not_return_keeps_it_from_being_asked() -> None:
    found = standing(replace(HELD, mount="0:53"))
    assert (found.healthy, found.others) == ((LOCAL,), (NBD,))
    assert "a request may be stuck" in found.hang_reason


def test_a_useless_sample_does_not_hide_such_a_call() -> None:
    state = BlockState(at=0, runstate="running", disks=(LOCAL, ON_FUSE), queues=())
    held = replace(HELD, mount="0:53")
    evidence = assess(assess(None, sample(0, PLACES, held)), Sample(S // 2, "?"))
    assert needs_second_reading(state, evidence)
    evidence = assess(assess(evidence, sample(S, PLACES, held)), Sample(2 * S, "?"))
    assert "may be stuck" in plan_early_flush(state, state, evidence).hang_reason


def test_without_such_a_call_it_may_be_asked() -> None:
    assert standing().hang_reason == ""


def queues(*stuck: str) -> tuple[BlockState, BlockState]:
    disks = (
        disk("remote", device="/m/a/virtio-backend"),
        disk("local", device="/m/b/virtio-backend"),
        disk("other", device="/m/b/virtio-backend"),
    )
    before = tuple(RequestQueue(f"/m/{name}/virtio-backend", 0, name in stuck, 5) for name in "ab")
    state = BlockState(at=0, runstate="running", disks=disks, queues=before)
    return state, replace(state, at=S)


def test_requests_of_its_disk_that_are_not_answered_show_the_same() -> None:
    first, second = queues("a")
    found = plan_early_flush(first, second, assess(None, sample(S)))
    assert [one.title for one in found.healthy] == ["local", "other"]
    assert found.hang_reason == "requests of remote have not been answered for 1 s"


def test_a_disk_with_a_stuck_controller_is_tried_last_if_another_one_explains_it() -> None:
    first, second = queues("b")
    found = plan_early_flush(first, second, assess(None, sample(S)))
    assert found.healthy == ()
    assert [one.title for one in found.others] == ["local"]
    first, second = queues()
    assert plan_early_flush(first, second, assess(None, sample(S))).hang_reason == ""


STATISTICS = [
    {
        "device": "local",
        "qdev": "/machine/peripheral-anon/device[0]/virtio-backend",
        "node-name": "#block245",
        "stats": {},
        "parent": {"node-name": "#block101", "driver-specific": {"driver": "file"}, "stats": {}},
    },
    {"device": "remote", "node-name": "#block376", "stats": {}},
    {
        "device": "",
        "qdev": "/machine/peripheral-anon/device[2]",
        "node-name": "rw",
        "stats": {},
        "parent": {"node-name": "low", "driver-specific": {"driver": "host_device"}, "stats": {}},
    },
    {"device": "", "qdev": "/machine/peripheral-anon/device[3]", "stats": {}},
]
"""A shortened reply of QEMU 7.2. Its last entry is a drive without a medium."""


def test_disks_from_statistics() -> None:
    local, remote, node = read_disk_statistics(STATISTICS)
    assert (local.title, local.node, local.network) == ("local", "#block245", False)
    assert local.names == ("local", "#block245", "#block101")
    assert local.device == "/machine/peripheral-anon/device[0]/virtio-backend"
    assert (remote.network, remote.device) == (True, None)
    assert (node.title, node.network, node.names) == ("rw", False, ("rw", "low"))
