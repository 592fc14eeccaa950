"""Our fast data classes behave like Python's, as far as they are used."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

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


def test_classes_with_one_field_and_with_none() -> None:
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


@dataclass(frozen=True, slots=True)
class BaseRecord:
    one: int
    shared: ClassVar[str] = "of the class"


@dataclass(frozen=True, slots=True)
class DerivedRecord(BaseRecord):
    two: list[int] = dataclasses.field(default_factory=list)


def test_a_class_is_compiled_when_it_is_used() -> None:
    @dataclass(frozen=True, slots=True)
    class UnusedRecord:
        one: int
        two: int = 2

    stub = UnusedRecord.__init__
    assert UnusedRecord(1) == UnusedRecord(one=1, two=2)
    assert UnusedRecord.__init__ is not stub
    assert [field.name for field in dataclasses.fields(UnusedRecord)] == ["one", "two"]


def test_the_class_without_slots_is_not_kept() -> None:
    replaced: list[weakref.ref[type]] = []

    def note(cls: type) -> type:
        replaced.append(weakref.ref(cls))
        return cls

    @dataclass(slots=True)
    @note
    class SlottedRecord:
        one: int
        two: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.two = self.one + 1

    gc.collect()
    assert replaced[0]() is None
    assert SlottedRecord(1).two == 2


def test_fields_are_told_without_an_object() -> None:
    @dataclass(frozen=True, slots=True)
    class FieldRecord:
        one: int = 1

    assert dataclasses.is_dataclass(FieldRecord)
    assert [field.default for field in dataclasses.fields(FieldRecord)] == [1]


def test_one_that_is_not_frozen() -> None:
    @dataclass(slots=True)
    class MutableRecord:
        one: int = 1

    changed = MutableRecord()
    changed.one = 2
    assert changed == MutableRecord(2) != MutableRecord()
    assert repr(changed).endswith("MutableRecord(one=2)")
    with pytest.raises(TypeError, match="unhashable"):
        hash(changed)


def test_fields_are_inherited() -> None:
    first, second = DerivedRecord(1), DerivedRecord(1)
    assert first == second and first.two is not second.two
    assert repr(DerivedRecord(1, [2])) == "DerivedRecord(one=1, two=[2])"
    assert DerivedRecord.shared == "of the class" and not hasattr(first, "__dict__")
    assert BaseRecord(1) != DerivedRecord(1)


def test_arguments_that_are_missing() -> None:
    make: Any = QuickRecord
    with pytest.raises(TypeError, match="one"):
        make()


def test_threads_that_use_a_class_first_at_the_same_time() -> None:
    for _ in range(50):

        @dataclass(frozen=True, slots=True)
        class SharedRecord:
            one: int
            two: str = "two"

        start = threading.Barrier(4)

        def make(cls: Any = SharedRecord, barrier: threading.Barrier = start) -> Any:
            barrier.wait()
            return cls(1)

        with ThreadPoolExecutor(4) as pool:
            made = [each.result() for each in [pool.submit(make) for _ in range(4)]]
        assert made == [SharedRecord(1, "two")] * 4
