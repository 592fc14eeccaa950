"""Generate a random run from a seed. The same seed and number give the same run.

Each schedule changes one disk or the process itself. All other storage is fast, so that the time of
QEMU's last progress is known. A temporary standstill is at least _MARGIN_S shorter than the
policy's limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from tests.campaign.noise import NOISES
from tests.campaign.spec import PROCESS, Change, Disk, Spec
from tests.campaign.truth import RETRY_S

_MARGIN_S: Final = 4
_MOVES_S: Final = 4.0
"""Time between two standstills. It is long enough for the slowest storage to answer, even on a busy
host."""
_FOR_GOOD: Final = 0.35
"""The share of schedules that end in a permanent standstill."""
_OF_PROCESS: Final = 0.12
_CALM: Final = 0.05
"""The share of runs in which nothing happens."""
_OTHERS: Final = {"threads": 0.06, "quota": 0.08, "netns": 0.1}
_NOISE: Final = dict.fromkeys((name for name in NOISES if name != "export"), 0.15) | _OTHERS
"""The share of runs with each noise. `export` is only for cases written by hand."""
_MAKES: Final = ("nbdkit", "nbdkit", "qemu-nbd", "qemu-storage-daemon")

Schedule = list[Change]


def draw(seed: int, number: int) -> Spec:
    random = Random(f"{seed}/{number}")
    storage_stall = random.choice((20, 22, 25))
    disks = [_disk(random) for _ in range(random.choice((1, 1, 1, 2, 2, 3)))]
    acting = random.randrange(len(disks))
    disks[acting] = _disk(random, acting=True)
    chance = random.random()
    changes: Schedule = []
    if chance < _OF_PROCESS:
        changes = _process(random)
    elif chance < 1 - _CALM:
        changes = _schedule(random, disks[acting], acting, storage_stall - _MARGIN_S)
    if any(change.what == "back" for change in changes):
        storage_stall += int(RETRY_S)
    return Spec(
        name=f"seed{seed}-{number}",
        disks=tuple(disks),
        changes=tuple(changes),
        noises=_noises(random, disks),
        grace=random.choice((2, 5, 10)),
        stall=random.choice((8, 10)),
        storage_stall=storage_stall,
        seed=seed,
    )


def _noises(random: Random, disks: Sequence[Disk]) -> tuple[str, ...]:
    names = [name for name, share in _NOISE.items() if random.random() < share]
    if any(disk.kind == "iscsi" or disk.transport == "tcp" for disk in disks):
        names = [name for name in names if name != "netns"]
    return tuple(names)


def _disk(random: Random, *, acting: bool = False) -> Disk:
    kind = random.choice(("file", "file", "nbd", "nbd", "nbd", "iscsi", "vhost"))
    store = random.choice(("plain", "plain", "fuse", "loop", "disk"))
    if kind == "file" and acting:
        store = random.choice(("fuse", "fuse", "loop", "disk", "disk"))
    if kind == "vhost":
        return Disk(kind, connects=random.random() < 0.5, logs=random.random() < 0.2)
    format = random.choice(("qcow2", "qcow2", "qcow2", "raw"))
    cache = random.choice(("writeback", "writeback", "none", "unsafe"))
    aio = random.choice(("threads", "native", "io_uring") if cache == "none" else ("threads",))
    make = random.choice(_MAKES)
    transport = random.choice(("unix", "tcp", "pair") if make == "nbdkit" else ("unix", "tcp"))
    syntax = random.choice(("json", "blockdev", "options", "added"))
    if transport == "pair" and kind == "nbd" and syntax == "added":
        syntax = "json"
    return Disk(
        kind,
        store,
        format,
        cache if kind == "file" else random.choice(("writeback", "unsafe")),
        aio if kind == "file" else "threads",
        make,
        transport,
        reconnect=300 if transport != "pair" and kind == "nbd" and random.random() < 0.5 else 0,
        syntax=syntax,
        records=random.choice((4, 30, 90, 150)),
        fill=random.choice((0, 0, 0, 24)) if store == "loop" else 0,
        in_flight=0 if syntax in ("blockdev", "added") else random.choice((0, 0, 0, 8)),
        proxy=kind == "nbd" and store == "plain" and transport == "unix" and random.random() < 0.2,
        netns=kind == "nbd" and transport == "unix" and random.random() < 0.15,
        shared=kind == "nbd" and make == "qemu-storage-daemon" and random.random() < 0.3,
        bitmap=format == "qcow2" and random.random() < 0.2,
    )


def _schedule(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    kinds: list[Callable[[Random, Disk, int, float], Schedule]] = []
    if disk.kind != "file" or disk.store != "loop":
        kinds += [_gaps, _gaps, _stands]
    if _can_be_slow(disk):
        kinds += [_slow, _slow]
    if disk.kind in ("nbd", "iscsi"):
        kinds += [_leaves]
    if disk.store == "fuse" and disk.kind == "file":
        kinds += [_hangs]
    if disk.store == "fuse" or (disk.kind == "nbd" and disk.make == "nbdkit"):
        kinds += [_fails]
    if disk.kind in ("nbd", "iscsi") and disk.store in ("fuse", "disk"):
        kinds += [_dies_below]
    return random.choice(kinds)(random, disk, of, longest_gap)


def _can_be_slow(disk: Disk) -> bool:
    if disk.kind == "vhost":
        return False
    return disk.store != "plain" or (disk.kind == "nbd" and disk.make == "nbdkit")


def _begin(random: Random) -> float:
    """Return the start of a schedule: before the stop, at the stop, or while QEMU exits."""
    return random.choice((-2.0, 0.0, 0.0, 0.0, round(random.uniform(0.5, 6), 1)))


def _slow(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    at = random.choice((-1.0, 0.0))
    level = random.choice((1, 1, 2, 3) if disk.store != "loop" else (1, 1, 2))
    return [Change(at, of, "slow", level), Change(random.randint(8, 22), of, "fast")]


def _gaps(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    """Return standstills of various lengths, with movement in between."""
    changes: Schedule = []
    at = _begin(random)
    if _can_be_slow(disk) and disk.store != "loop":
        changes.append(Change(min(at, 0), of, "slow", random.choice((1, 2))))
    for _ in range(random.choice((1, 1, 2, 3))):
        changes.append(Change(at, of, "freeze"))
        at = max(at, 0) + round(random.uniform(3, longest_gap), 1)
        changes.append(Change(at, of, "thaw"))
        at += round(random.uniform(_MOVES_S, 9), 1)
    return [*changes, Change(at, of, "fast")]


def _stands(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    """Return a permanent standstill, perhaps after slow storage."""
    if _can_be_slow(disk) and disk.store != "loop" and random.random() < 0.5:
        at = float(random.randint(2, 10))
        return [Change(0, of, "slow", random.choice((1, 2))), Change(at, of, "freeze")]
    return [Change(random.choice((-2.0, 0.0)), of, "freeze")]


def _leaves(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    at = _begin(random)
    changes = [Change(at, of, "leave")]
    if disk.transport != "pair" and random.random() > _FOR_GOOD:
        gap = round(random.uniform(3, longest_gap), 1)
        changes.append(Change(max(at, 0) + gap, of, "back"))
    return changes


def _hangs(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    if random.random() < _FOR_GOOD:
        return [Change(0, of, "hang")]
    return [Change(0, of, "hang", round(random.uniform(3, longest_gap), 1))]


def _fails(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    return [Change(0, of, "fail")]


def _dies_below(random: Random, disk: Disk, of: int, longest_gap: float) -> Schedule:
    """Return a schedule in which the storage below the server hangs, but the server answers."""
    changes = [Change(0, of, "dead")]
    if random.random() > _FOR_GOOD:
        changes.append(Change(random.uniform(3, longest_gap), of, "alive"))
    return changes


def _process(random: Random) -> Schedule:
    what = random.choice(("frozen", "trace", "pipe", "stop"))
    changes = [Change(0, PROCESS, what)]
    if what == "stop" or random.random() > _FOR_GOOD:
        changes.append(Change(round(random.uniform(3, 15), 1), PROCESS, "go"))
    return changes
