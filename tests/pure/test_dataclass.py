"""Our fast data classes behave like Python's, as far as they are used."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Quick:
    one: int
    two: tuple[int, ...] = ()
    hidden: int = dataclasses.field(default=0, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Slow:
    one: int
    two: tuple[int, ...] = ()
    hidden: int = dataclasses.field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Single:
    value: object


@dataclass(frozen=True, slots=True)
class Empty: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    name: str

    def __hash__(self) -> int:
        return 7

    def __repr__(self) -> str:
        return "own"


def test_they_compare_hash_and_show_alike() -> None:
    for arguments in ((1,), (1, (2,)), (1, (2,), 3)):
        quick, slow = Quick(*arguments), Slow(*arguments)
        assert repr(quick) == repr(slow).replace("Slow", "Quick")
        assert hash(quick) == hash(slow)
        assert (quick == Quick(1)) is (slow == Slow(1))
        assert (quick != Quick(1)) is (slow != Slow(1))
        assert dataclasses.asdict(quick) == dataclasses.asdict(slow)
        assert dataclasses.replace(quick, one=5) == Quick(5, *arguments[1:])
        assert copy.deepcopy(quick) == pickle.loads(pickle.dumps(quick)) == quick
    other: object = Slow(1)
    assert Quick(1) != other
    assert Quick(1).__match_args__ == Slow(1).__match_args__


def test_of_one_field_and_of_none() -> None:
    assert Single(1) == Single(1) != Single(2)
    assert hash(Single(1)) == hash(Single(1))
    assert Single(1) != Single((1,))
    assert Empty() == Empty() and len({Empty(), Empty()}) == 1


def test_methods_of_the_class_itself_stay() -> None:
    assert (hash(Own(name="a")), repr(Own(name="a"))) == (7, "own")
    assert Own(name="a") == Own(name="a") != Own(name="b")


def test_a_field_that_there_is_not() -> None:
    wrong: Any = Quick(1)
    with pytest.raises(AttributeError):
        wrong.three = 3
