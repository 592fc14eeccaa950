"""Modules of Python's library that the daemon does not import, or only at their first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import qkilld
from qkilld.adapters.unused_modules import DEFERRED

PROGRAM = """
import gc, sys
sys.path.insert(0, sys.argv.pop(1))
from qkilld.adapters import unused_modules
unused_modules.set_up()
import asyncio, dataclasses, pathlib, traceback
import qkilld.lifecycle
from qkilld.bus import bus_service
from typing import ForwardRef
standing_in = [sys.modules[name] for name in unused_modules.DEFERRED]
if sys.version_info >= (3, 14):  # dataclasses import ast, and use inspect.signature().
    standing_in = [module for module in standing_in if module.__name__ != "inspect"]
else:
    assert not {"ast", "_ast", "dis"} & set(sys.modules)
for module in standing_in:
    assert type(module) is unused_modules._DeferredModule, module.__name__
assert "gettext" not in sys.modules
assert not {"qkilld.engine.ports", "qkilld.engine.ladder_job"} & set(sys.modules)
assert not [x for x in gc.get_objects() if type(x) is ForwardRef]
"""
USE = """
from importlib import import_module
for module in standing_in:
    name = module.__name__
    assert module.__file__.endswith(name.replace(".", "/") + ".py"), name
    assert import_module(name).__file__ == module.__file__
    assert import_module(name) is sys.modules[name] is not module
import asyncio.sslproto, inspect
from textwrap import indent
assert indent("a", " ") == " a"
assert asyncio.sslproto.SSLProtocol.__module__ == "asyncio.sslproto"
assert inspect.signature(qkilld.lifecycle.live).parameters["varlink"].kind.name == "KEYWORD_ONLY"
try:
    standing_in[0].does_not_exist
except AttributeError:
    print("complete")
"""


def run(program: str) -> str:
    command = [sys.executable, "-I", "-c", program, str(Path(qkilld.__file__).parents[1])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_daemon_is_imported_without_them() -> None:
    assert "inspect" in DEFERRED
    run(PROGRAM)


def test_each_is_there_when_it_is_used() -> None:
    assert run(PROGRAM + USE) == "complete\n"
