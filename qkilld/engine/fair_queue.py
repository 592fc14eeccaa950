"""Choose whose calls are served next. Users take turns, however many calls and connections they
have.

A pure data structure. All connections of a user share the user's turns. The calls of a connection
get no turn until its uid is known. The calls of each connection keep their order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import field
from typing import Final, Generic, TypeVar

from qkilld.engine.fair_shares import user_of
from qkilld.model.dataclass import dataclass

MAX_CALLS: Final = 1024
"""The maximum number of calls that may wait for one uid, or for one connection of unknown uid."""
MAX_BYTES: Final = 256 << 10
"""The maximum number of bytes in the bodies of one uid's waiting calls."""
MAX_TOTAL: Final = 4096
"""The maximum number of calls that may wait in total. When this number is reached, each connection
may still have up to SPARE calls waiting, with at most SPARE_BYTES in total."""
MAX_TOTAL_BYTES: Final = 1 << 20
SPARE: Final = 8
SPARE_BYTES: Final = 16 << 10
"""This is also the maximum length of a call by a user with limits. A bus allows 2,048 connections,
so their spare calls need at most 32 MiB."""
CALLS_PER_TURN: Final = 4
BYTES_PER_TURN: Final = 16 << 10
"""A turn ends after this many bytes, because long calls take long to check."""
CROWD: Final = 64
"""A user with more waiting calls than this gets only one call per turn."""

Item = TypeVar("Item")


@dataclass(slots=True)
class _ConnectionQueues(Generic[Item]):
    """The waiting calls of the connections of one user."""

    waiting: OrderedDict[str, deque[tuple[Item, int]]] = field(default_factory=OrderedDict)
    """The waiting calls and their sizes, by connection. The first connection is served next."""
    count: int = 0
    size: int = 0


class FairQueue(Generic[Item]):
    def __init__(self, unlimited: frozenset[int] = frozenset({0})) -> None:
        """`unlimited`: uids without a limit on waiting calls."""
        self._unlimited = unlimited
        self._groups: OrderedDict[int, _ConnectionQueues[Item]] = OrderedDict()
        """The queues of users with waiting calls. The first user has the next turn."""
        self._uids: dict[str, int] = {}
        """The uid of each connection with waiting calls in `_groups`."""
        self._strangers: dict[str, _ConnectionQueues[Item]] = {}
        """The queues of connections of unknown uid."""
        self._count = 0
        self._size = 0

    def __bool__(self) -> bool:
        """Whether a call of a known user waits."""
        return bool(self._groups)

    @property
    def users(self) -> int:
        """The number of users with waiting calls."""
        return len(self._groups)

    @property
    def crowded(self) -> bool:
        """Whether every user with waiting calls has a limit and more than CROWD waiting calls."""
        return all(
            group.count > CROWD and uid not in self._unlimited
            for uid, group in self._groups.items()
        )

    def put(self, name: str, uid: int | None, item: Item, size: int) -> bool:
        """Add a call of the connection `name`; return False if too many calls or bytes wait."""
        group = self._strangers.get(name) if uid is None else self._groups.get(user_of(uid))
        if group is None:
            group = _ConnectionQueues()
        unlimited = uid in self._unlimited
        crowded = self._count >= MAX_TOTAL or self._size + size > MAX_TOTAL_BYTES
        full = group.count >= MAX_CALLS or group.size + size > MAX_BYTES
        if not unlimited and (full or (crowded and not _can_spare(group.waiting.get(name), size))):
            return False
        if uid is None:
            self._strangers[name] = group
        else:
            self._groups[user_of(uid)] = group
            self._uids[name] = uid
        group.waiting.setdefault(name, deque()).append((item, size))
        group.count += 1
        group.size += size
        if not unlimited:
            self._count += 1
            self._size += size
        return True

    def introduce(self, name: str, uid: int) -> None:
        """Set the uid of a connection."""
        stranger = self._strangers.pop(name, None)
        if stranger is None:
            return
        if uid in self._unlimited:
            self._count -= stranger.count
            self._size -= stranger.size
        group = self._groups.setdefault(user_of(uid), _ConnectionQueues())
        self._uids[name] = uid
        group.waiting.setdefault(name, deque()).extendleft(reversed(stranger.waiting[name]))
        group.count += stranger.count
        group.size += stranger.size

    def forget(self, name: str, uid: int | None) -> list[Item]:
        """Remove a closed connection. Return its waiting calls, which need no reply any more."""
        user = None if uid is None else user_of(uid)
        group = self._strangers.pop(name, None) if user is None else self._groups.get(user)
        waiting = None if group is None else group.waiting.pop(name, None)
        if group is None or waiting is None:
            return []
        self._uids.pop(name, None)
        for _, size in waiting:
            self._count_down(uid, group, size)
        return [item for item, _ in waiting]

    def turn(self) -> list[tuple[int, Item]]:
        """Give the next user a turn: remove and return this user's next calls, each with the uid of
        its caller. A call of a known user must be waiting."""
        user, group = next(iter(self._groups.items()))
        most = 1 if group.count > CROWD and user not in self._unlimited else CALLS_PER_TURN
        self._groups.move_to_end(user)
        items: list[tuple[int, Item]] = []
        total_size = 0
        while group.count and len(items) < most and total_size < BYTES_PER_TURN:
            name, queue = next(iter(group.waiting.items()))
            uid, (item, size) = self._uids[name], queue.popleft()
            items.append((uid, item))
            total_size += size
            if queue:
                group.waiting.move_to_end(name)
            else:
                del group.waiting[name], self._uids[name]
            self._count_down(uid, group, size)
        return items

    def _count_down(self, uid: int | None, group: _ConnectionQueues[Item], size: int) -> None:
        group.count -= 1
        group.size -= size
        if uid not in self._unlimited:
            self._count -= 1
            self._size -= size
        if uid is not None and not group.count:
            del self._groups[user_of(uid)]


def _can_spare(own: deque[tuple[Item, int]] | None, size: int) -> bool:
    """Return whether a connection may add a call when MAX_TOTAL is reached. `own`: its waiting
    calls."""
    if own is None:
        return size <= SPARE_BYTES
    return len(own) < SPARE and sum(waiting for _, waiting in own) + size <= SPARE_BYTES
