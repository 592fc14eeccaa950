"""Encode replies that list any number of objects, in steps. The event loop runs between the steps.

Signals that are sent between the steps reach the client before the reply does. So the reply must
be as new as these signals: if a signal announces an object, that object is encoded again.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from qkilld.bus.library import encode_body
from qkilld.engine.long_replies import Pace
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import Busy, NoSuchJob

MAX_REPETITIONS: Final = 4
"""Each element is encoded at most this many times on average. If the list is then still not
current, objects change faster than they can be listed."""
SPARE: Final = 64
"""The number of encodings allowed beyond MAX_REPETITIONS: a few objects may change often."""
LAST: Final = 32
"""If no more than this many elements are left, they are encoded in one step, so that none of them
can change meanwhile. If the elements are jobs with all properties, the step takes about 3 ms."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The value of a reply that is an array of structures or dictionary entries."""

    keys: Callable[[], Iterable[str]]
    """Returns the keys of all elements. If an element describes an object, its key is the object's
    path."""
    element: Callable[[str], Any]
    """Returns an array that contains only the element with this key. Returns None or raises
    NoSuchJob if there is no such element (any more)."""


class Listings:
    """The listings of one connection."""

    def __init__(self) -> None:
        self._unfinished: list[OrderedDict[str, None]] = []
        """For each listing: the keys of the elements to encode, the next one first."""

    def announced(self, path: str) -> None:
        """Call this when a signal announces that an object has appeared, changed or disappeared."""
        for keys in self._unfinished:
            keys[path] = None

    async def encode(self, signature: str, listing: Listing, pace: Pace) -> bytearray:
        """Return the body of the reply. Until the caller awaits something, the body includes every
        change that signals have announced. Raises Busy if the objects change too fast."""
        keys: OrderedDict[str, None] = OrderedDict()
        encoded: dict[str, bytes] = {}
        self._unfinished.append(keys)
        try:
            keys.update(dict.fromkeys(listing.keys()))
            left_in_pass, left = len(keys), SPARE
            while keys:
                if not left_in_pass:
                    # Make the steps longer, so that objects are encoded faster than they change.
                    pace.lengthen()
                    left_in_pass = len(keys)
                left_in_pass -= 1
                key, _ = keys.popitem(last=False)
                try:
                    array = listing.element(key)
                except NoSuchJob:
                    array = None
                if array is None:
                    # The object has disappeared, or does not belong to this listing. Such keys do
                    # not count towards the limit, because any number of them may be announced.
                    encoded.pop(key, None)
                else:
                    left += MAX_REPETITIONS * (key not in encoded) - 1
                    if left < 0:
                        raise Busy("The jobs change faster than they can be listed; try again")
                    encoded[key] = bytes(encode_body(signature, [array])[_START:])
                if len(keys) > LAST:
                    await pace.rest()
            return _array(encoded.values())
        finally:
            self._unfinished = [each for each in self._unfinished if each is not keys]


_START: Final = 8
"""The offset of the first element in an array of structures or dictionary entries, which are
aligned to 8 bytes. So the bytes of an element do not depend on its place."""


def _array(elements: Iterable[bytes]) -> bytearray:
    array = bytearray(_START)
    for element in elements:
        array += bytes(-len(array) % 8)
        array += element
    struct.pack_into("<I", array, 0, len(array) - _START)
    return array
