"""Data classes that are cheap to define. Python's dataclasses took an eighth of the daemon's start
time.

For each class, Python's module compiles the text of six methods (before Python 3.13, one by one).
Here, frozen classes and those with slots share all methods except `__init__`. A class with slots
gets its `__init__` at its first use, because few classes are used at the start. The shared methods
compare, hash and show objects as Python's module does.

Only mypy prevents assignments to fields of a frozen class. Without a `__setattr__` that prevents
them, making an object takes half the time.
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
            namespace = _namespace_of(cls)
            made = _with_slots(cls, namespace) if slots else cls
            for name, method in _SHARED.items():
                if name not in namespace:
                    setattr(made, name, method)
            if not frozen:
                made.__hash__ = None
            if slots:
                _complete_later(made, namespace, kw_only)
            else:
                _complete(made, cls, kw_only)
            return made

        return make if cls is None else make(cls)


_LOCK = threading.RLock()
_INCOMPLETE: dict[type, tuple[dict[str, Any], bool]] = {}
"""For each class that has not been used yet: its namespace (with the fields' default values), and
whether the fields are keyword-only. Keeping the class without slots instead would take 3 kB
per class."""


def _namespace_of(cls: Any) -> dict[str, Any]:
    of_instances = ("__dict__", "__weakref__")
    namespace = {name: value for name, value in vars(cls).items() if name not in of_instances}
    return namespace | {"__qualname__": cls.__qualname__}


def _with_slots(cls: Any, namespace: dict[str, Any]) -> Any:
    """Return a copy of `cls` with slots for those fields that have no slot in a base."""
    inherited = {name for base in cls.__mro__ for name in base.__dict__.get("__slots__", ())}
    kinds = cls.__annotations__.items()
    names = [name for name, kind in kinds if not kind.startswith("ClassVar")]
    content = {name: value for name, value in namespace.items() if name not in names}
    content["__slots__"] = tuple(name for name in names if name not in inherited)
    return type(cls)(cls.__name__, cls.__bases__, content)


def _complete_later(made: Any, namespace: dict[str, Any], kw_only: bool) -> None:
    """Complete the class `made` at its first use."""
    _INCOMPLETE[made] = namespace, kw_only

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _complete_now(made)
        made.__init__(self, *args, **kwargs)

    made.__init__ = __init__
    for attribute in _LATER:
        setattr(made, attribute.name, attribute)


def _complete_now(made: type) -> None:
    with _LOCK:
        if made in _INCOMPLETE:
            namespace, kw_only = _INCOMPLETE[made]
            without_slots = type(made)(made.__name__, made.__bases__, namespace)
            _complete(made, without_slots, kw_only)
            del _INCOMPLETE[made]


class _Later:
    """An attribute of all incomplete classes. Reading it completes the class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, obj: Any, owner: type) -> Any:
        for each in owner.__mro__:
            _complete_now(each)
        return getattr(owner if obj is None else obj, self.name)


_FROM_DATACLASSES = ("__dataclass_fields__", "__dataclass_params__", "__match_args__")
_LATER = [_Later(name) for name in (*_FROM_DATACLASSES, "_values")]
"""The attributes, besides `__init__`, that a class gets at its first use."""


def _complete(made: Any, cls: Any, kw_only: bool) -> None:
    """Let Python's module make the attributes that `made` lacks. `cls` is the same class without
    slots."""
    if not cls.__doc__:
        # Otherwise, Python's module would set __doc__ to the signature. Making the signature takes
        # as long as all the rest.
        cls.__doc__ = made.__name__
    full = dataclasses.dataclass(eq=False, repr=False, kw_only=kw_only)(cls)
    made._values = _values_of(dataclasses.fields(full))
    for name in (*_FROM_DATACLASSES, "__init__"):
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
