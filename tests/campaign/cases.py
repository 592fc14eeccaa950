"""Runs written by hand. Each was once judged wrongly, or resembles such a run.

An earlier qkilld killed some of these processes although they would have finished, and waited
forever for others that hung. Since then, every wait has its own signs of progress.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from tests.campaign.judge import UNEXPECTED, Finding
from tests.campaign.run import Outcome
from tests.campaign.spec import HOST, PROCESS, Change, Disk, Spec

_LOCAL: Final = Disk()
_NBD: Final = Disk("nbd")
_FOREVER: Final = 300
_PAST_RETRY: Final = 40
"""QEMU tries to reconnect after 1, 3, 7, 15 and 31 s."""
_RECONNECTS: Final = Disk("nbd", reconnect=_FOREVER)
_FUSE: Final = Disk(store="fuse")


@dataclass(frozen=True)
class Case:
    spec: Spec
    title: str
    results: frozenset[str]
    """The correct results. Everything else that is checked follows from the schedule."""
    lost: int = 0
    """The largest number of records that may be lost."""


def unexpected(name: str, outcome: Outcome) -> list[Finding]:
    """Compare the result of a run with the case of this name. Return an empty list if there is no
    such case."""
    case = CASES.get(name)
    if case is None:
        return []
    found = []
    if outcome.result not in case.results:
        found.append(Finding(UNEXPECTED, f"{outcome.result}, not {' or '.join(case.results)}"))
    if outcome.lost > case.lost:
        found.append(Finding(UNEXPECTED, f"{outcome.lost} records lost"))
    return found


def _case(
    name: str,
    title: str,
    disks: Disk | tuple[Disk, ...],
    *changes: Change,
    noises: tuple[str, ...] = (),
    dead: bool = False,
    results: frozenset[str] | None = None,
    storage_stall: float = 20,
    lost: int = 0,
) -> Case:
    disks = (disks,) if isinstance(disks, Disk) else disks
    right = frozenset({"killed", "survived"}) if dead else frozenset({"exited"})
    spec = Spec(name, disks, changes, noises, storage_stall=storage_stall)
    right = right if results is None else results
    return Case(spec, title, right, 10**6 if "killed" in right else lost)


def _off(what: str, until: float, back: str, of: int = 0) -> tuple[Change, Change]:
    return Change(0, of, what), Change(until, of, back)


_KILLED_WRONGLY: Final = (
    _case(
        "nbd-restarted",
        "qcow2 on NBD with reconnect-delay, its server back after 15 s",
        _RECONNECTS,
        *_off("leave", 15, "back"),
        storage_stall=_PAST_RETRY,
    ),
    _case(
        "nbd-restarted-tcp",
        "the same on TCP, qemu-nbd",
        Disk("nbd", make="qemu-nbd", transport="tcp", reconnect=_FOREVER, syntax="blockdev"),
        *_off("leave", 15, "back"),
        storage_stall=_PAST_RETRY,
    ),
    _case(
        "nbd-restarted-beside",
        "local qcow2 beside NBD with reconnect-delay, its server back after 15 s",
        (_LOCAL, _RECONNECTS),
        *_off("leave", 15, "back", 1),
        storage_stall=_PAST_RETRY,
    ),
    _case(
        "nbd-given-up",
        "qcow2 on NBD with a reconnect-delay of 12 s, its server gone for good: QEMU gives it up",
        Disk("nbd", reconnect=12),
        Change(0, 0, "leave"),
        lost=10**6,
    ),
    _case(
        "nbd-gone-beside",
        "local qcow2 beside NBD with reconnect-delay, its server gone for good",
        (_LOCAL, _RECONNECTS),
        Change(0, 1, "leave"),
        dead=True,
    ),
    _case(
        "pipe",
        "stderr is a full pipe, its reader goes on after 15 s",
        _LOCAL,
        Change(0, PROCESS, "pipe"),
        Change(15, PROCESS, "go"),
    ),
    _case(
        "pipe-dead",
        "stderr is a full pipe that nobody reads",
        _LOCAL,
        Change(0, PROCESS, "pipe"),
        dead=True,
    ),
    _case(
        "nbd-pair",
        "NBD on a pair of sockets, still for 15 s",
        Disk("nbd", transport="pair"),
        *_off("freeze", 15, "thaw"),
    ),
    _case(
        "vhost-connects",
        "a vhost-user backend that connects to QEMU, still for 15 s, beside local qcow2",
        (_LOCAL, Disk("vhost", connects=True)),
        *_off("freeze", 15, "thaw", 1),
    ),
    _case(
        "vhost-listens",
        "a vhost-user backend that QEMU connects to, still for 15 s, beside local qcow2",
        (_LOCAL, Disk("vhost")),
        *_off("freeze", 15, "thaw", 1),
    ),
    _case(
        "fuse-close",
        "close(2) of an image on FUSE takes 12 s; a bitmap of a second, local qcow2",
        (Disk(store="fuse", format="raw", records=4), Disk(bitmap=True)),
        Change(0, 0, "hang", 12),
    ),
    _case(
        "nbd-flush",
        "an NBD server that answers FLUSH when its own fdatasync is through: 60 MB at 2 MB/s",
        Disk("nbd", store="loop", format="raw", records=4, fill=60),
        Change(0, 0, "slow", 1),
    ),
    _case(
        "nbd-flush-qsd",
        "the same with qemu-storage-daemon",
        Disk(
            "nbd",
            store="loop",
            format="raw",
            records=4,
            fill=60,
            make="qemu-storage-daemon",
        ),
        Change(0, 0, "slow", 1),
    ),
    _case(
        "disk-back",
        "a disk of the kernel's own hangs for 15 s",
        Disk(store="disk"),
        *_off("freeze", 15, "thaw"),
    ),
    _case(
        "uring-slow-beside",
        "cache=none and io_uring on a slow FUSE for 30 s, beside NBD",
        (Disk(store="fuse", cache="none", aio="io_uring", records=150), _NBD),
        Change(0, 0, "slow", 1),
        Change(30, 0, "fast"),
    ),
    _case(
        "nbd-added",
        "NBD that was added to the running QEMU, still for 15 s",
        replace(_NBD, syntax="added"),
        *_off("freeze", 15, "thaw"),
    ),
    _case(
        "nbd-added-restarted",
        "NBD that was added with reconnect-delay, its server back after 15 s",
        replace(_RECONNECTS, syntax="added"),
        *_off("leave", 15, "back"),
        storage_stall=_PAST_RETRY,
    ),
    _case(
        "nbd-netns",
        "QEMU in a network namespace of its own, NBD on a unix socket, still for 15 s",
        _NBD,
        *_off("freeze", 15, "thaw"),
        noises=("netns",),
    ),
    _case(
        "mirror-frozen",
        "a mirror to NBD that is frozen for 15 s",
        (Disk(syntax="blockdev"), Disk("nbd", syntax="mirror")),
        *_off("freeze", 15, "thaw", 1),
    ),
    _case(
        "nbd-flush-netns",
        "60 MB at 2 MB/s behind an NBD server in a network namespace of its own",
        Disk("nbd", store="loop", format="raw", records=4, fill=60, netns=True),
        Change(0, 0, "slow", 1),
    ),
    _case(
        "nbd-slow-netns",
        "a slow NBD server in a network namespace of its own",
        Disk("nbd", records=150, netns=True),
        Change(0, 0, "slow", 3),
        Change(30, 0, "fast"),
    ),
    _case(
        "nbd-slow-proxy",
        "a slow NBD server behind another one, which has nothing of its own",
        Disk("nbd", records=150, proxy=True),
        Change(0, 0, "slow", 3),
        Change(30, 0, "fast"),
    ),
    _case(
        "nbd-flush-proxy",
        "60 MB at 2 MB/s behind two NBD servers",
        Disk("nbd", store="loop", format="raw", records=4, fill=60, proxy=True),
        Change(0, 0, "slow", 1),
    ),
    _case(
        "nbd-slow-qemu-netns",
        "QEMU in a network namespace of its own, and a slow NBD server on a unix socket",
        Disk("nbd", records=150),
        Change(0, 0, "slow", 3),
        Change(30, 0, "fast"),
        noises=("netns",),
    ),
    _case(
        "nbd-slow-shared",
        "a slow store of an NBD server that serves somebody else, too",
        Disk("nbd", store="fuse", records=150, make="qemu-storage-daemon", shared=True),
        Change(0, 0, "slow", 2),
        Change(30, 0, "fast"),
    ),
    _case(
        "nbd-dead-store-shared",
        "NBD that was added, its store dead for 35 s, and its server serves somebody else, too",
        Disk("nbd", store="fuse", make="qemu-storage-daemon", syntax="added", shared=True),
        *_off("dead", 35, "alive"),
    ),
    _case(
        "nbd-slow-added-netns",
        "QEMU in a network namespace of its own, slow NBD that was added to it",
        Disk("nbd", store="fuse", records=150, make="qemu-nbd", syntax="added"),
        Change(0, 0, "slow", 1),
        Change(30, 0, "fast"),
        noises=("netns",),
    ),
    _case(
        "iscsi-gaps",
        "a slow iSCSI target frozen for so long that QEMU connects anew, and slow afterwards",
        Disk("iscsi", store="fuse", records=150),
        Change(0, 0, "slow", 1),
        *_off("freeze", 20.5, "thaw"),
        Change(28, 0, "fast"),
        storage_stall=25,
    ),
    _case(
        "iscsi-frozen",
        "an iSCSI target frozen for 45 s",
        Disk("iscsi"),
        *_off("freeze", 45, "thaw"),
        storage_stall=60,
    ),
    _case(
        "iscsi-restarted",
        "an iSCSI target that is back after 15 s",
        Disk("iscsi"),
        *_off("leave", 15, "back"),
        storage_stall=_PAST_RETRY,
    ),
    _case(
        "frozen",
        "a frozen control group, thawed after 15 s, SIGTERM pending: may be killed, data at risk",
        _LOCAL,
        Change(0, PROCESS, "frozen"),
        Change(15, PROCESS, "go"),
        results=frozenset({"exited", "killed", "survived"}),
    ),
    _case(
        "traced",
        "under a debugger, which lets go after 15 s: may be killed, data at risk",
        _LOCAL,
        Change(0, PROCESS, "trace"),
        Change(15, PROCESS, "go"),
        results=frozenset({"exited", "killed", "survived"}),
    ),
    _case(
        "killed-elsewhere",
        "NBD frozen, and somebody else sends SIGKILL after 5 s: data at risk",
        _NBD,
        Change(0, 0, "freeze"),
        Change(5, PROCESS, "kill"),
        lost=61,
    ),
    _case(
        "host-paused",
        "NBD frozen, and the whole host paused for 25 s meanwhile",
        _NBD,
        Change(0, 0, "freeze"),
        Change(5, HOST, "pause"),
        Change(30, HOST, "go"),
        Change(36, 0, "thaw"),
    ),
)

_WAITED_WRONGLY: Final = (
    _case(
        "nbd-dead-reconnecting",
        "NBD frozen for good, beside an NBD disk that reconnects for ever",
        (replace(_RECONNECTS, in_flight=2), _NBD),
        Change(0, 0, "leave"),
        Change(0, 1, "freeze"),
        dead=True,
    ),
    _case(
        "nbd-dead-netdev",
        "NBD frozen for good, beside a netdev whose peer goes on sending",
        _NBD,
        Change(0, 0, "freeze"),
        noises=("netdev",),
        dead=True,
    ),
    _case(
        "nbd-dead-export",
        "NBD frozen for good in a flush, while QEMU itself exports a disk to a busy client",
        replace(_NBD, flush=True),
        Change(0, 0, "freeze"),
        noises=("export",),
        dead=True,
    ),
    _case(
        "iscsi-dead-store",
        "iSCSI whose store is dead while the target answers NOPs",
        Disk("iscsi", store="fuse"),
        Change(0, 0, "dead"),
        dead=True,
    ),
    _case(
        "fuse-dead-neighbour",
        "an image on FUSE hangs for good, a healthy one lies on a disk that anybody writes to",
        (_LOCAL, _FUSE),
        Change(0, 1, "freeze"),
        noises=("neighbour",),
        dead=True,
    ),
    _case(
        "fuse-dead-group",
        "an image on FUSE hangs for good, and somebody in its control group writes",
        _FUSE,
        Change(0, 0, "freeze"),
        noises=("group",),
        dead=True,
    ),
    _case(
        "disk-dead",
        "a disk of the kernel's own hangs for good",
        Disk(store="disk"),
        Change(0, 0, "freeze"),
        dead=True,
    ),
    _case(
        "disk-dead-export",
        "the same in a flush, while QEMU itself exports another disk to a client that writes",
        Disk(store="disk", flush=True),
        Change(0, 0, "freeze"),
        noises=("export",),
        dead=True,
    ),
    _case(
        "disk-dead-neighbour",
        "a disk with io_uring hangs for good, and a neighbour writes to the same file system",
        (_LOCAL, Disk(store="disk", cache="none", aio="io_uring")),
        Change(0, 1, "freeze"),
        noises=("neighbour",),
        dead=True,
    ),
    _case(
        "vhost-dead-logging",
        "a vhost-user backend that hangs for good and writes that to its log, beside local qcow2",
        (_LOCAL, Disk("vhost", logs=True)),
        Change(0, 1, "freeze"),
        dead=True,
    ),
    _case(
        "nbd-dead-shared",
        "the store of an NBD server is dead, which serves somebody else, too, who is busy",
        Disk("nbd", store="fuse", make="qemu-storage-daemon", shared=True),
        Change(0, 0, "dead"),
        dead=True,
    ),
    _case(
        "fuse-dead-shared-beside",
        "an image on FUSE hangs for good, beside healthy NBD whose server somebody else uses",
        (_FUSE, Disk("nbd", make="qemu-storage-daemon", shared=True)),
        Change(0, 0, "freeze"),
        dead=True,
    ),
    _case(
        "pipe-dead-shared",
        "stderr is a full pipe that nobody reads, beside NBD whose server somebody else uses",
        (_LOCAL, Disk("nbd", make="qemu-storage-daemon", syntax="added", shared=True)),
        Change(0, PROCESS, "pipe"),
        dead=True,
    ),
    _case(
        "uring-dead-beside",
        "a disk with io_uring hangs for good, beside one on a loop device over a busy disk",
        (Disk(store="disk", cache="none", aio="io_uring", in_flight=1), Disk(store="loop")),
        Change(0, 0, "freeze"),
        noises=("neighbour",),
        dead=True,
    ),
    _case(
        "uring-dead-neighbour",
        "an image on FUSE with io_uring hangs for good, a healthy one lies on a busy disk",
        (_LOCAL, Disk(store="fuse", cache="none", aio="io_uring", in_flight=1)),
        Change(0, 1, "freeze"),
        noises=("neighbour",),
        dead=True,
    ),
    _case(
        "mirror-dead",
        "a mirror to NBD that is frozen for good",
        (Disk(syntax="blockdev"), Disk("nbd", syntax="mirror")),
        Change(0, 1, "freeze"),
        dead=True,
    ),
    _case(
        "frozen-logging",
        "a frozen control group, and a vhost-user backend that writes a log",
        (_LOCAL, Disk("vhost", logs=True)),
        Change(0, PROCESS, "frozen"),
        dead=True,
    ),
    _case(
        "fuse-dead",
        "an image on FUSE hangs for good, no disk known",
        _FUSE,
        Change(0, 0, "freeze"),
        dead=True,
    ),
    _case(
        "nbd-dead",
        "NBD frozen for good, nothing else",
        _NBD,
        Change(0, 0, "freeze"),
        dead=True,
    ),
    _case(
        "nbd-dead-pool",
        "NBD frozen for good, beside a local disk whose pool threads end meanwhile",
        (_LOCAL, _NBD),
        Change(0, 1, "freeze"),
        dead=True,
    ),
    _case(
        "vhost-dead",
        "vhost-user frozen for good, nothing else",
        Disk("vhost"),
        Change(0, 0, "freeze"),
        dead=True,
    ),
    _case(
        "vhost-dead-beside",
        "vhost-user frozen for good, beside local qcow2",
        (_LOCAL, Disk("vhost")),
        Change(0, 1, "freeze"),
        dead=True,
    ),
)

CASES: Final[Mapping[str, Case]] = {
    case.spec.name: case for case in (*_KILLED_WRONGLY, *_WAITED_WRONGLY)
}
