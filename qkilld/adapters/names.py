"""Read the names of guests from their command lines. Each read may block forever.

To read a command line, the kernel takes the target's memory lock (procfs.py). Any user can make a
process keep this lock forever, for example with an argument on a page of a FUSE file. So each user
gets only a few reading threads, and each call has one deadline for all its names. If a name is not
read before the deadline, later calls do not wait for it, but return it once it has been read.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import field
from typing import Final

from qkilld.debug_log import note_once
from qkilld.engine.fair_shares import FairShares, user_of
from qkilld.engine.long_replies import Pace
from qkilld.model.dataclass import dataclass
from qkilld.model.guest import Identity

Names = tuple[str | None, str, bool, bool]
"""The guest's name and UUID, whether it may have a QMP monitor, and whether it may have storage on
a network. A missing name or UUID is "", and an unknown name is None."""
UNKNOWN: Final[Names] = (None, "", False, True)
Key = tuple[int, int, str]
"""pid, start time, executable. The executable is included, because execve(2) keeps the pid and the
start time, but replaces the command line, which has the names."""

TIMEOUT_S: Final = 0.5
TIMEOUT_EACH_S: Final = 0.0005
"""The time that each name adds to the timeout. Reading a name usually takes 10 to 50 µs."""
MAX_THREADS: Final = 64
RESERVED_FOR_ROOT: Final = 16
MAX_SHARED: Final = 24
"""See FairShares."""
MAX_QUEUE: Final = 16_384
"""The maximum number of command lines of one user that wait for a thread."""
MAX_NAMES: Final = 16_384
"""The maximum number of names that are kept after the call that needed them."""
_TICK_S: Final = 0.01
"""If a user's threads have read nothing for this long (s), another thread is started."""


@dataclass(slots=True)
class _UserQueue:
    """The command lines of one user's processes that are still to be read."""

    waiting: deque[Key] = field(default_factory=deque)
    reading: set[Key] = field(default_factory=set)
    threads: int = 0
    read: int = 0
    """The number of command lines read so far."""
    read_before: int = 0
    """The value of `read` one _TICK_S ago."""


class NameReader:
    """Use a NameReader in a single running loop."""

    def __init__(self, read: Callable[[int], Names]) -> None:
        """`read` takes a process id. It is called in threads, and must not raise."""
        self._read = read
        self._lock = threading.Lock()
        """Protects the queues; never held during a read."""
        self._users: dict[int, _UserQueue] = {}
        self._threads = FairShares(MAX_THREADS, of_root=RESERVED_FOR_ROOT, shared=MAX_SHARED)
        self._results: deque[tuple[Key, Names]] = deque()
        self._names: dict[Key, Names] = {}
        self._needed: Counter[Key] = Counter()
        """How many calls need each name."""
        self._pending: set[Key] = set()
        """Names that wait for a thread or are being read."""
        self._late_keys: set[Key] = set()
        """Names that were not read before a deadline."""
        self._wake = asyncio.Event()

    async def names(self, identities: Sequence[Identity]) -> list[Names]:
        """Return names in the order of `identities`; UNKNOWN for those not read in time."""
        self._collect()
        loop, pace = asyncio.get_running_loop(), Pace()
        wanted: dict[Key, int] = {}
        late_users: set[int] = set()
        needed: list[Key] = []
        try:
            for identity in identities:
                key, uid = _key(identity), user_of(identity.uid)
                needed.append(key)
                self._needed[key] += 1
                if key in self._late_keys:
                    late_users.add(uid)
                elif key not in self._names:
                    wanted[key] = uid
                    self._queue(key, uid)
                await pace.rest()
            for uid in late_users:
                # These names have no thread yet, because the user had reached the limit of
                # threads, or a thread could not be started.
                self._start_thread(uid, loop)
            if wanted:
                await self._wait(wanted)
            names = []
            for key in needed:
                names.append(self._names.get(key, UNKNOWN))
                await pace.rest()
            return names
        finally:
            for key in needed:
                self._needed[key] -= 1
                if not self._needed[key]:
                    del self._needed[key]
            # Make room by forgetting names that this call needed and no other call needs.
            while needed and len(self._names) > MAX_NAMES:
                if (key := needed.pop()) not in self._needed:
                    self._names.pop(key, None)

    def keep(self, alive: Set[Key]) -> None:
        """Forget each name that no call needs and whose process is not in `alive` (see
        `keys_of`)."""
        self._names = {
            key: names for key, names in self._names.items() if key in alive or key in self._needed
        }
        with self._lock:
            for queue in self._users.values():
                # Keep names that are not late: a call waits for them, and their processes may have
                # started after `alive` was read.
                queue.waiting = deque(
                    key for key in queue.waiting if key in alive or key not in self._late_keys
                )
            self._users = {
                uid: queue for uid, queue in self._users.items() if queue.waiting or queue.threads
            }
            keys = {
                key for queue in self._users.values() for key in (*queue.waiting, *queue.reading)
            }
        # Names that were read since the last `_collect` are not in `keys`. The next `_collect`
        # stores them.
        self._pending &= keys
        self._late_keys &= keys

    async def _wait(self, wanted: Mapping[Key, int]) -> None:
        loop = asyncio.get_running_loop()
        remaining_s = TIMEOUT_S + TIMEOUT_EACH_S * len(wanted)
        users = set(wanted.values())
        missing = wanted.keys() & self._pending
        while missing and remaining_s > 0:
            start = loop.time()
            for uid in users:
                self._start_thread(uid, loop)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining_s, _TICK_S)):
                    await self._wake.wait()
            self._collect()
            missing &= self._pending
            # On a busy host, this process sometimes gets no processor for a while. Do not count
            # such a pause, because perhaps the reading threads had no processor, either.
            remaining_s -= min(loop.time() - start, 2 * _TICK_S)
        for pid, *_ in missing:
            note_once(f"reading the command line of process {pid}", "it takes too long")
        self._late_keys |= missing

    def _queue(self, key: Key, uid: int) -> None:
        with self._lock:
            queue = self._users.setdefault(uid, _UserQueue())
            if key not in self._pending and len(queue.waiting) < MAX_QUEUE:
                self._pending.add(key)
                queue.waiting.append(key)

    def _start_thread(self, uid: int, loop: asyncio.AbstractEventLoop) -> None:
        """Start a thread if the user's queue is not empty and the user's threads make no
        progress."""
        with self._lock:
            if (queue := self._users.get(uid)) is None:
                return
            stuck = queue.read == queue.read_before
            queue.read_before = queue.read
            if not queue.waiting or not (stuck or not queue.threads):
                return
            if not self._threads.has_room(uid):
                return
            queue.threads += 1
            self._threads.take(uid)
        try:
            threading.Thread(
                target=self._work, args=(uid, queue, loop), name=f"names-{uid}", daemon=True
            ).start()
        except RuntimeError as error:  # The system allows no more threads.
            note_once("starting a thread for names", error)
            with self._lock:
                self._end_thread(uid, queue)

    def _end_thread(self, uid: int, queue: _UserQueue) -> None:
        queue.threads -= 1
        self._threads.give_back(uid)

    def _work(self, uid: int, queue: _UserQueue, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._lock:
                if not queue.waiting:
                    self._end_thread(uid, queue)
                    break
                key = queue.waiting.popleft()
                queue.reading.add(key)
            names = self._read(key[0])
            with self._lock:
                queue.reading.discard(key)
                queue.read += 1
                self._results.append((key, names))
        # A blocked read may return after the loop was closed. Then nobody waits for the names.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._wake.set)

    def _collect(self) -> None:
        while self._results:
            key, names = self._results.popleft()
            # Keep a late name only if there is room, because no call waits for it.
            is_kept = key not in self._late_keys or len(self._names) < MAX_NAMES
            if names[0] is not None and is_kept:
                self._names[key] = names
            self._pending.discard(key)
            self._late_keys.discard(key)


def keys_of(identities: Iterable[Identity]) -> Set[Key]:
    """Return the keys under which NameReader keeps the names of these processes."""
    return {_key(identity) for identity in identities}


def _key(identity: Identity) -> Key:
    return (*identity.key, identity.executable)
