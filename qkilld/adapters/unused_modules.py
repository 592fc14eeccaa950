"""Keep the daemon from importing modules of Python's library that it does not use.

asyncio, dataclasses, pathlib and traceback import these modules for functions that qkilld does not
call. These modules would take 5.7 MB of memory, which is locked while jobs run, and 5 ms at the
start. Python 3.15 has lazy imports for this (PEP 810).
"""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any, Final

_ABSENT: Final = ("ssl",)
"""Modules that asyncio does not need."""
DEFERRED: Final = (
    "asyncio.sslproto",
    "inspect",
    "ipaddress",
    "locale",
    "ntpath",
    "textwrap",
    "tokenize",
)
"""These modules are imported only at their first use, for example when a traceback reads the
source."""
_LOCK = threading.Lock()


def set_up() -> None:
    """Call this before anything imports these modules."""
    for name in _ABSENT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    for name in DEFERRED:
        sys.modules.setdefault(name, _DeferredModule(name))
    if sys.version_info[:2] == (3, 13):
        vars(sys.modules["inspect"]).setdefault("get_annotations", _annotations)


def _annotations(cls: type) -> dict[str, Any]:
    """Replaces inspect.get_annotations(), the only function of `inspect` that `dataclasses` calls
    on Python 3.13."""
    return dict(vars(cls).get("__annotations__", {}))


class _DeferredModule(ModuleType):
    """Takes the place of a module until one of its attributes is read."""

    def __getattr__(self, attribute: str) -> Any:
        from importlib import import_module

        name = self.__name__
        with _LOCK:
            if sys.modules.get(name) is self:
                del sys.modules[name]
        return getattr(import_module(name), attribute)
