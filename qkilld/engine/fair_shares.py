"""Divide a limited number of places, such as threads that may block, among users. Programs that
must start quickly (stop.main) use this module, so it imports nothing."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_SUBORDINATE = 65536
"""Uids from this one on may belong to users of a directory service, or be subordinate uids
(subuid(5)). One user can have more subordinate uids than there are places."""

_ranges: list[tuple[int, int, int]] = []
"""Sorted by the first uid."""


def set_subordinate_uids(ranges: Sequence[tuple[int, int, int]]) -> None:
    """Set the ranges of subordinate uids: the first uid, the last uid, and their user. Call this
    before any place is taken. A uid in two ranges belongs to the range that begins later."""
    _ranges[:] = sorted(ranges)


def user_of(uid: int) -> int:
    """Return the user whose limits apply to a uid: for a known subordinate uid, the user who has
    it. This gives no rights; it is used only for limits."""
    if uid < FIRST_SUBORDINATE or not _ranges:
        return uid
    # Imported only here, because programs without ranges do not need it.
    from bisect import bisect_right

    # Search by bisection, because tens of thousands of users may have ranges.
    first, last, user = _ranges[bisect_right(_ranges, (uid + 1,)) - 1]
    return user if first <= uid <= last else uid


class FairShares:
    """The places that users have taken. This class has no lock.

    Root may take all `places`, and only root may take the last `of_root` of them. Each other user
    gets a first place if one is free. All further places are limited to `shared`, divided equally
    among the users who have places. So some places stay free for users who have none. Uids that may
    be subordinate can together take at most half of (`places` - `of_root` + `shared`).
    """

    def __init__(self, places: int, *, of_root: int, shared: int) -> None:
        self._places = places
        self._of_users = places - of_root
        self._shared = shared
        self._taken: dict[int, int] = {}

    @property
    def taken(self) -> int:
        return sum(self._taken.values())

    def has_room(self, uid: int) -> bool:
        """Return whether the user may take another place."""
        uid = user_of(uid)
        taken, own = self.taken, self._taken.get(uid, 0)
        if uid == 0 or taken >= self._places:
            return taken < self._places
        by_users = taken - self._taken.get(0, 0)
        if uid >= FIRST_SUBORDINATE:
            subordinate = sum(n for user, n in self._taken.items() if user >= FIRST_SUBORDINATE)
            if subordinate >= (self._of_users + self._shared) // 2:
                return False
        if not own:
            return by_users < self._of_users
        users = sum(other != 0 for other in self._taken)
        further = by_users - users
        return by_users < self._of_users and further < self._shared and own <= self._shared // users

    def take(self, uid: int) -> None:
        """Take a place, even if there is no room."""
        uid = user_of(uid)
        self._taken[uid] = self._taken.get(uid, 0) + 1

    def give_back(self, uid: int) -> None:
        uid = user_of(uid)
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]
