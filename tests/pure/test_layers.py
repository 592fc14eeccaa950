"""Arrows between the parts point one way only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qkilld"

MAY_IMPORT = {
    "model": {"model"},
    "judgement": {"model", "judgement"},
    "engine": {"model", "judgement", "engine"},
    "adapters": {"model", "engine", "adapters"},
    "bus": {"model", "judgement", "engine", "bus"},
    "ctl": {"model", "judgement", "adapters", "bus", "ctl"},
    "guest": {"model", "guest"},
    "stop": {"model", "judgement", "engine", "adapters", "bus", "stop"},
}
"""The entry points (daemon.py, __main__.py) may import everything. `engine` has the Protocols that
adapters and bus implement."""

ONLY_IN = {
    "dbus_next": ("bus/",),
    "systemd": ("adapters/journal.py", "adapters/manager.py"),
    "rich": ("ctl/",),
    "psutil": ("adapters/",),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            found += (
                [f"{module}.{alias.name}" for alias in node.names]
                if module == "qkilld"
                else [module]
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "qkilld" and rest and len(inside.parts) > 1 and (PACKAGE / rest[0]).is_dir():
            assert rest[0] in MAY_IMPORT[inside.parts[0]], f"{inside} imports {name}"
        for package, places in ONLY_IN.items():
            if top == package:
                assert str(inside).startswith(places), f"{inside} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
