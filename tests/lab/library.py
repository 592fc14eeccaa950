"""Choose which D-Bus libraries qkilld can import: all that are installed, or only dbus-fast."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Final

from tests.lab import needs
from tests.lab.process import TOP
from tests.lab.scratch import run_directory

NAMES: Final = ("dbus-next", "dbus-fast")


def use(name: str) -> None:
    """Make this process and its children use this library. Call this before qkilld.bus is imported.
    Raises needs.Missing if the library is not installed."""
    if name == "dbus-next":
        return
    if importlib.util.find_spec("dbus_fast") is None:
        raise needs.Missing("dbus-fast is not installed: `make venv`")
    sys.modules["dbus_next"] = None  # type: ignore[assignment]
    shadow = run_directory() / "shadow"
    (shadow / "dbus_next").mkdir(parents=True, exist_ok=True)
    (shadow / "dbus_next/__init__.py").write_text("raise ImportError('hidden by the tests')\n")
    os.environ["QKILLD_TEST_SHADOW"] = str(shadow)


def python_path() -> str:
    """Return PYTHONPATH for programs of the checkout."""
    shadow = os.environ.get("QKILLD_TEST_SHADOW")
    return f"{shadow}:{TOP}" if shadow else str(TOP)
