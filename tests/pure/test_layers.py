"""Imports between packages point one way only."""

from __future__ import annotations

import ast
import graphlib
import re
import tomllib
from collections.abc import Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qkilld"

MAY_IMPORT = {
    "model": {"model"},
    "decision": {"model", "decision"},
    "unitcheck": {"model", "unitcheck"},
    "engine": {"model", "decision", "engine"},
    "adapters": {"model", "engine", "adapters"},
    "evidence": {"model", "engine", "adapters", "evidence"},
    "monitor": {"model", "engine", "adapters", "monitor"},
    "bus": {"model", "decision", "engine", "bus"},
    "varlink": {"model", "decision", "engine", "varlink"},
    "ctl": {"model", "decision", "unitcheck", "adapters", "evidence", "monitor", "bus", "ctl"},
    "launcher": {"model", "launcher"},
    "stop": {
        *("model", "decision", "unitcheck", "engine", "adapters", "evidence", "monitor"),
        *("bus", "varlink", "stop"),
    },
}
"""The entry points (daemon.py, __main__.py) may import everything. `engine` has the Protocols that
adapters and bus implement."""

ONLY_IN = {
    "dbus_next": ("bus/library.py",),
    "dbus_fast": ("bus/library.py",),
    "systemd": (
        "adapters/journal_reader.py",
        "adapters/service_manager.py",
    ),
    "rich": ("ctl/",),
    "psutil": ("ctl/",),
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


def test_no_circle_of_imports() -> None:
    """Imports for types (TYPE_CHECKING) and inside functions count, too."""
    try:
        tuple(graphlib.TopologicalSorter(_graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_daemon_does_not_read_the_journal() -> None:
    """systemd-python holds Python's lock while it reads from a disk, which may hang."""
    graph = _graph()
    reached: set[str] = set()
    ahead = {"qkilld.daemon"}
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead |= graph[name] - reached
    assert "qkilld.adapters.journal" in reached
    assert "qkilld.adapters.journal_reader" not in reached


def _graph() -> dict[str, set[str]]:
    """Return the imports of each module."""
    modules = {_module(path): path for path in FILES}
    return {name: _imported(name, path, modules.keys()) for name, path in modules.items()}


def _module(path: Path) -> str:
    parts = ("qkilld", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, modules: Set[str]) -> set[str]:
    """Return the modules of ours that are imported. `from package import module` is an import of
    that module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {each for each in names if each in modules}
            found |= inside or {str(node.module)} & modules
    return found - {name}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_every_dependency_is_used() -> None:
    """The programs themselves must use each dependency, not only the tests."""
    modules = {"systemd-python": "systemd"}
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^\w.-]", each)[0] for each in project["dependencies"]]
    used = {name.split(".")[0] for path in FILES for name in imports(path)}
    assert {modules.get(name, name.replace("-", "_")) for name in names} <= used


def test_no_two_classes_share_a_name() -> None:
    """A name in a message or a review must be unambiguous, so names that differ only in an
    underscore count as the same."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                name = node.name.removeprefix("_")
                places.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    shared = {name: files for name, files in places.items() if len(files) > 1}
    assert not shared


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_nested_conditional_expressions(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.IfExp):
            inside = [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
            assert inside == [node], f"line {node.lineno}"
