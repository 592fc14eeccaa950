"""qkilld's named tuples behave like those of typing."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, get_type_hints

import qkilld
from qkilld.model.named_tuple import NamedTuple


class Ours(NamedTuple):
    """A place."""

    name: str
    sizes: tuple[int, ...] = ()
    """Sizes."""
    parent: Ours | None = None

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def __str__(self) -> str:
        return f"<{self.name}>"


class Theirs(typing.NamedTuple):
    """A place."""

    name: str
    sizes: tuple[int, ...] = ()
    """Sizes."""
    parent: Theirs | None = None

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def __str__(self) -> str:
        return f"<{self.name}>"


def test_they_are_alike() -> None:
    kinds: list[Any] = [Ours, Theirs]
    mine, other = (kind("a", sizes=(1, 2)) for kind in kinds)
    assert mine == other == ("a", (1, 2), None)
    assert hash(mine) == hash(other)
    assert repr(mine) == repr(other).replace("Theirs", "Ours")
    assert mine._asdict() == other._asdict()
    assert mine._replace(name="b").name == "b"
    assert (mine.total, str(mine)) == (other.total, str(other)) == (3, "<a>")
    assert not hasattr(mine, "__dict__")
    names = ("__doc__", "__module__", "_fields", "_field_defaults", "__match_args__")
    for name in names:
        assert getattr(Ours, name) == getattr(Theirs, name), name
    assert Ours.__qualname__ == "Ours"
    assert get_type_hints(Ours).keys() == get_type_hints(Theirs).keys()
    match mine:
        case Ours(name, parent=None):
            assert name == "a"
        case _:
            raise AssertionError(mine)


def test_nobody_uses_those_of_typing() -> None:
    """Named tuples of typing compile each annotation. The first compilation takes 0.2 MB."""
    for path in Path(qkilld.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from typing import"):
                assert "NamedTuple" not in line, path
