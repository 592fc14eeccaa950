"""Our fast data classes behave like Python's, as far as they are used."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class QuickRecord:
    one: int
    two: tuple[int, ...] = ()
    hidden: int = dataclasses.field(default=0, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class SlowRecord:
    one: int
    two: tuple[int, ...] = ()
    hidden: int = dataclasses.field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class OneField:
    value: object


@dataclass(frozen=True, slots=True)
class NoFields: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnMethods:
    name: str

    def __hash__(self) -> int:
        return 7

    def __repr__(self) -> str:
        return "own"


def test_they_compare_hash_and_show_alike() -> None:
    for arguments in ((1,), (1, (2,)), (1, (2,), 3)):
        quick, slow = QuickRecord(*arguments), SlowRecord(*arguments)
        assert repr(quick) == repr(slow).replace("SlowRecord", "QuickRecord")
        assert hash(quick) == hash(slow)
        assert (quick == QuickRecord(1)) is (slow == SlowRecord(1))
        assert (quick != QuickRecord(1)) is (slow != SlowRecord(1))
        assert dataclasses.asdict(quick) == dataclasses.asdict(slow)
        assert dataclasses.replace(quick, one=5) == QuickRecord(5, *arguments[1:])
        assert copy.deepcopy(quick) == pickle.loads(pickle.dumps(quick)) == quick
    other: object = SlowRecord(1)
    assert QuickRecord(1) != other
    assert QuickRecord(1).__match_args__ == SlowRecord(1).__match_args__


def test_of_one_field_and_of_none() -> None:
    assert OneField(1) == OneField(1) != OneField(2)
    assert hash(OneField(1)) == hash(OneField(1))
    assert OneField(1) != OneField((1,))
    assert NoFields() == NoFields() and len({NoFields(), NoFields()}) == 1


def test_methods_of_the_class_itself_stay() -> None:
    assert (hash(OwnMethods(name="a")), repr(OwnMethods(name="a"))) == (7, "own")
    assert OwnMethods(name="a") == OwnMethods(name="a") != OwnMethods(name="b")


def test_a_field_that_there_is_not() -> None:
    wrong: Any = QuickRecord(1)
    with pytest.raises(AttributeError):
        wrong.three = 3
