"""Data classes that are made quickly: an eighth of the daemon's start went into those of Python.

dataclasses compiles the text of six methods for each class, one by one before Python 3.13. Here
only `__init__` is compiled, and the others are shared. Values are compared, hashed and shown as
before. That nobody assigns to a field of a frozen class is checked by mypy alone, which also halves
the time that it takes to make an object.
"""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls=None, /, *, frozen=False, slots=False, kw_only=False):
        def make(cls):
            if not frozen:
                return dataclasses.dataclass(slots=slots, kw_only=kw_only)(cls)
            own = cls.__dict__.keys()
            made = dataclasses.dataclass(eq=False, repr=False, slots=slots, kw_only=kw_only)(cls)
            made._values = _values_of(dataclasses.fields(made))
            for name, method in _SHARED.items():
                if name not in own:
                    setattr(made, name, method)
            return made

        return make if cls is None else make(cls)


def _values_of(fields: tuple[dataclasses.Field[Any], ...]) -> Any:
    """Return a function from an object to the values that are compared."""
    names = [field.name for field in fields if field.compare]
    return attrgetter(*names) if names else staticmethod(lambda obj: ())


def _is_equal(self: Any, other: object) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return self._values(self) == other._values(other)  # type: ignore[attr-defined]


def _hash(self: Any) -> int:
    return hash(self._values(self))


def _show(self: Any) -> str:
    shown = (field.name for field in dataclasses.fields(self) if field.repr)
    values = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
    return f"{type(self).__qualname__}({values})"


_SHARED = {"__eq__": _is_equal, "__hash__": _hash, "__repr__": _show}
