"""Data classes that are cheap to define. With Python's own, defining them took an eighth of the
daemon's start.

Python's dataclasses compiles the text of six methods for each class, one by one before Python 3.13.
Here, frozen classes and those with slots share all methods but `__init__`. A class with slots gets
its `__init__` at its first use, because few classes are used at the start. The shared methods
compare, hash and show objects as those of dataclasses do.

At run time, nothing prevents an assignment to a field of a frozen class; mypy does. Without a
__setattr__ that forbids this, an object is made in half the time.
"""

from __future__ import annotations

import dataclasses
import threading
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls=None, /, *, frozen=False, slots=False, kw_only=False):
        def make(cls):
            if not (frozen or slots):
                return dataclasses.dataclass(kw_only=kw_only)(cls)
            made = _with_slots(cls) if slots else cls
            own = cls.__dict__.keys()
            for name, method in _SHARED.items():
                if name not in own:
                    setattr(made, name, method)
            if not frozen:
                made.__hash__ = None
            if slots:
                _complete_later(cls, made, kw_only)
            else:
                _complete(cls, made, kw_only)
            return made

        return make if cls is None else make(cls)


_LATER = ("__dataclass_fields__", "__dataclass_params__", "__match_args__", "_values")
"""The attributes that are completed, with `__init__`, at the first use of the class."""
_LOCK = threading.RLock()


def _with_slots(cls: Any) -> Any:
    """Return a copy of `cls` with slots for its fields, except those with a slot in a base."""
    inherited = {name for base in cls.__mro__ for name in base.__dict__.get("__slots__", ())}
    kinds = cls.__annotations__.items()
    names = [name for name, kind in kinds if not kind.startswith("ClassVar")]
    excluded = {*names, "__dict__", "__weakref__"}
    content = {name: value for name, value in cls.__dict__.items() if name not in excluded}
    content["__slots__"] = tuple(name for name in names if name not in inherited)
    content["__qualname__"] = cls.__qualname__
    return type(cls)(cls.__name__, cls.__bases__, content)


def _complete_later(cls: Any, made: Any, kw_only: bool) -> None:
    """Arrange that the first use of `made` completes it. `cls` is the class without slots, which
    still has the default values of the fields."""
    completed = False

    def complete() -> None:
        nonlocal completed
        with _LOCK:
            if not completed:
                _complete(cls, made, kw_only)
                completed = True

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        complete()
        made.__init__(self, *args, **kwargs)

    made.__init__ = __init__
    for name in _LATER:
        setattr(made, name, _Later(name, complete))


class _Later:
    """An attribute of a class that completes the class when it is read."""

    def __init__(self, name: str, complete: Any) -> None:
        self._name, self._complete = name, complete

    def __get__(self, obj: Any, owner: Any) -> Any:
        self._complete()
        return getattr(owner if obj is None else obj, self._name)


def _complete(cls: Any, made: Any, kw_only: bool) -> None:
    if not cls.__doc__:
        # Without this, dataclasses would write the signature here, which takes as long as all the
        # rest.
        cls.__doc__ = made.__name__
    full = dataclasses.dataclass(eq=False, repr=False, kw_only=kw_only)(cls)
    made._values = _values_of(dataclasses.fields(full))
    for name in (*_LATER[:-1], "__init__"):
        setattr(made, name, full.__dict__[name])


def _values_of(fields: tuple[dataclasses.Field[Any], ...]) -> Any:
    """Return a function that returns the values by which an object is compared."""
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
