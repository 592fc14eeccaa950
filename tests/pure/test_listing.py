"""Replies that list any number of objects: their bytes, and their order among signals."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from qkilld.bus.framing import IncomingMessage, MessageKind, reply_header
from qkilld.bus.interfaces import OBJECT_MANAGER_GIVES
from qkilld.bus.library import Message, MessageFlag, MessageType, Variant, encode
from qkilld.bus.listing import LAST, Listing, Listings
from qkilld.bus.values import parse
from qkilld.engine import long_replies
from qkilld.engine.long_replies import LongReplies, Pace
from qkilld.model.errors import Busy, NoSuchJob

ROWS = "a(uoss)"
ROOT, ALICE, BOB = 0, 1000, 1001


class EagerPace(Pace):
    """Lets the event loop run after each element."""

    async def rest(self) -> None:
        await asyncio.sleep(0)


def objects_of(texts: dict[str, str]) -> dict[str, Any]:
    return {
        path: {"a.B": {"Text": Variant("s", text), "List": Variant("a(sst)", [[text, "", 1]])}}
        for path, text in texts.items()
    }


def rows_of(texts: dict[str, str]) -> list[Any]:
    return [[7, path, text, "x" * len(path)] for path, text in texts.items()]


@pytest.mark.parametrize("count", [0, 1, 2, 9])
@pytest.mark.parametrize(
    ("signature", "values"), [(ROWS, rows_of), (OBJECT_MANAGER_GIVES, objects_of)]
)
@pytest.mark.each_library
def test_the_bytes_are_those_of_the_library(signature: str, values: Any, count: int) -> None:
    texts = {f"/job/{number}": "ä" * number for number in range(count)}
    listing = Listing(lambda: texts, lambda path: values({path: texts[path]}))
    body = asyncio.run(Listings().encode(signature, listing, Pace()))
    call = IncomingMessage(MessageKind.CALL, 0, 99, "<", sender=":1.5")
    message = Message(
        message_type=MessageType.METHOD_RETURN,
        flags=MessageFlag.NO_REPLY_EXPECTED,
        reply_serial=99,
        destination=":1.5",
        signature=signature,
        body=[values(texts)],
    )
    message.serial = 3
    assert bytes(reply_header(call, 3, signature, len(body)) + body) == bytes(encode(message))


class Objects:
    """Objects that change while they are listed. Each has a text."""

    def __init__(self, count: int) -> None:
        self.texts = {f"/job/{number}": "old" for number in range(count)}
        self.listings = Listings()

    def set(self, path: str, text: str) -> None:
        self.texts[path] = text
        self.listings.announced(path)

    def remove(self, path: str) -> None:
        del self.texts[path]
        self.listings.announced(path)

    def _element(self, path: str) -> list[Any]:
        try:
            return rows_of({path: self.texts[path]})
        except KeyError:
            raise NoSuchJob("gone") from None

    async def encode(self) -> dict[str, str]:
        body = await self.listings.encode(
            ROWS, Listing(lambda: list(self.texts), self._element), EagerPace()
        )
        # The reply must contain every change that a signal has announced before it.
        assert not self.listings._unfinished
        (rows,) = parse(ROWS, bytes(body))
        return {path: text for _, path, text, _ in rows}


def test_a_reply_is_as_new_as_the_signals_before_it() -> None:
    async def run() -> None:
        objects = Objects(100)
        answer = asyncio.create_task(objects.encode())
        for _ in range(50):
            await asyncio.sleep(0)
        objects.set("/job/1", "new")  # Already encoded.
        objects.set("/job/99", "new")  # Not encoded yet.
        objects.set("/job/100", "added")
        objects.remove("/job/2")
        objects.remove("/job/98")
        objects.set("/job/101", "added")
        objects.remove("/job/101")
        objects.listings.announced("/org/qkilld1")  # Not a listed object.
        expected = dict(objects.texts)
        assert await answer == expected
        assert (expected["/job/1"], expected["/job/100"]) == ("new", "added")

    def element_of_none(path: str) -> None:
        return None

    asyncio.run(run())
    body = asyncio.run(Listings().encode(ROWS, Listing(lambda: "ab", element_of_none), Pace()))
    assert body == bytes(8)


def test_objects_that_change_too_fast_are_not_listed_for_ever() -> None:
    async def run() -> None:
        objects = Objects(100)
        answer = asyncio.create_task(objects.encode())
        with pytest.raises(Busy):
            for step in range(10_000):
                if answer.done():
                    break
                for number in (step, step + 50):
                    objects.set(f"/job/{number % 100}", "new")
                await asyncio.sleep(0)
            answer.result()
        assert not objects.listings._unfinished
        # The next listing, without such changes, succeeds.
        assert await objects.encode() == objects.texts

    asyncio.run(run())


def test_many_objects_that_come_or_go_at_once_do_not_end_a_listing() -> None:
    """For instance, a thousand ended jobs are forgotten at a time, or a thousand guests start."""

    async def run() -> None:
        objects = Objects(100)
        answer = asyncio.create_task(objects.encode())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number in range(1000):
            objects.listings.announced(f"/guest/{number}")  # These are not listed.
            objects.set(f"/job/{100 + number}", "added")
        for _ in range(500):
            await asyncio.sleep(0)
        for number in range(1000):
            objects.remove(f"/job/{number}")
        assert await answer == objects.texts
        assert len(objects.texts) == 100

    asyncio.run(run())


@pytest.mark.parametrize("changes", [1, 25, 40])
def test_many_objects_are_listed_while_they_change(
    monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    """`changes`: how many objects change between two steps. At first, a step encodes 20
    elements."""
    count, element_s = 1000, 0.0001
    now = longest = 0.0
    monkeypatch.setattr(long_replies, "time", SimpleNamespace(monotonic=lambda: now))
    objects = Objects(count)

    def element(path: str) -> list[Any]:
        nonlocal now
        now += element_s
        return rows_of({path: objects.texts[path]})

    async def run() -> None:
        nonlocal longest
        listing = Listing(lambda: list(objects.texts), element)
        answer = asyncio.create_task(objects.listings.encode(ROWS, listing, Pace()))
        number, before = 0, now
        while not answer.done():
            for _ in range(changes):
                objects.set(f"/job/{number % count}", str(number))
                number += 1
            expected = dict(objects.texts)
            await asyncio.sleep(0)
            longest, before = max(longest, now - before), now
        (rows,) = parse(ROWS, bytes(answer.result()))
        assert {path: text for _, path, text, _ in rows} == expected

    asyncio.run(run())
    assert longest < long_replies.MAX_STEP_S + (LAST + 2) * element_s


def test_one_reply_at_a_time_and_users_take_turns() -> None:
    async def run() -> None:
        replies = LongReplies(frozenset({ROOT}))
        running: list[int] = []
        order: list[int] = []

        async def prepare(uid: int) -> None:
            async with replies.turn(uid):
                running.append(uid)
                order.append(uid)
                assert len([one for one in running if one != ROOT]) <= 1
                assert running.count(ROOT) <= 1
                for _ in range(3):
                    await asyncio.sleep(0)
                running.remove(uid)

        uids = [ALICE, ALICE, ALICE, BOB, BOB, ROOT, ROOT]
        await asyncio.gather(*(prepare(uid) for uid in uids))
        assert [uid for uid in order if uid != ROOT] == [ALICE, BOB, ALICE, BOB, ALICE]
        assert order[:2] == [ALICE, ROOT]  # Root does not wait for users.
        assert not replies._of_user

    asyncio.run(run())
