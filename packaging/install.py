"""`make install` and `make uninstall`: put every file where systemd, D-Bus, polkit and the message
catalogue look for it, and remove exactly these files again.

The Python package is byte-compiled and put into a directory of its own, so that nothing else on the
machine imports it by accident. The programs are short scripts that import it from there. Files in
units/, dbus/ and packaging/ that match the patterns below are installed. They are written for
PREFIX=/usr. Paths of our programs and documentation in them are replaced by the installed paths.

Needs no network and no module outside of the standard library, and runs under the interpreter that
the programs will use.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import py_compile
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

TOP: Final = Path(__file__).resolve().parents[1]
PROJECT: Final[dict[str, Any]] = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]

PRIVATE_PROGRAMS: Final = {
    "complete": "qkilld.ctl.complete:main",
    "qemu-guest": "qkilld.launcher.main:main",
    "undo-adopt": "qkilld.ctl.undo_adopt:main",
}
"""The programs in PREFIX/lib/qkilld: name → module:function. They are run by shells, our units and
package removal."""

DEBIAN: Final = {
    "dbus-next": "python3-dbus-next",
    "dbus-fast": "python3-dbus-fast",
    "psutil": "python3-psutil",
    "rich": "python3-rich",
    "systemd-python": "python3-systemd",
}
"""Python distribution that the project depends on → Debian package that contains it."""

_SCRIPT: Final = """\
#!{python} {options}
# Isolated (-I), so that no variable in the environment adds other modules.
import sys

sys.path.insert(0, {package!r})
from {module} import {function}

sys.exit({function}())
"""


class InstallError(Exception):
    """An error whose text says what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Places:
    """Absolute directories of the finished system, without DESTDIR."""

    bindir: str
    libdir: str
    """PREFIX/lib, whose subdirectory qkilld/ is ours."""
    mandir: str
    docdir: str
    unitdir: str
    userunitdir: str
    catalogdir: str
    dbusdatadir: str
    """The parent of dbus-1/."""
    polkitdir: str
    """The directory of polkit's actions."""
    bashdir: str
    """The directory of the completions for bash; zshdir is for zsh, and fishdir for fish."""
    zshdir: str
    fishdir: str

    @property
    def private(self) -> str:
        return f"{self.libdir}/qkilld"

    @property
    def package(self) -> str:
        return f"{self.private}/python"

    @property
    def manifest(self) -> str:
        """The path of the manifest. Each line of the manifest is an installed file, or a directory
        that was created, with a slash at its end."""
        return f"{self.private}/installed-files"


@dataclass(frozen=True, slots=True)
class File:
    content: bytes
    mode: int = 0o644


def files(places: Places, python: str, *, packaged: bool) -> Iterator[tuple[str, File]]:
    """Yield the path and the content of every installed file except byte code."""
    public = {f"{places.bindir}/{name}": entry for name, entry in PROJECT["scripts"].items()}
    private = {f"{places.private}/{name}": entry for name, entry in PRIVATE_PROGRAMS.items()}
    for path, entry in (public | private).items():
        yield path, File(_script(python, places.package, entry), 0o755)
    for source in sorted((TOP / "qkilld").rglob("*.py")):
        yield f"{places.package}/{source.relative_to(TOP)}", File(source.read_bytes())
    moved = {f"/usr/bin/{Path(path).name}": path for path in public}
    moved |= {f"/usr/lib/qkilld/{Path(path).name}": path for path in private}
    moved["/usr/share/doc/qkilld"] = places.docdir
    dbus = f"{places.dbusdatadir}/dbus-1"
    for pattern, directory in (
        ("dbus/*.xml", f"{places.package}/qkilld/interfaces"),
        ("dbus/*.xml", f"{dbus}/interfaces"),
        ("dbus/*.varlink", f"{places.package}/qkilld/interfaces"),
        ("dbus/*.conf", f"{dbus}/system.d"),
        ("dbus/*.service", f"{dbus}/system-services"),
        ("dbus/user/*.service", f"{dbus}/services"),
        ("units/*.service", places.unitdir),
        ("units/*.socket", places.unitdir),
        ("units/*.d/*.conf", places.unitdir),
        ("units/user/*.service", places.userunitdir),
        ("units/user/*.socket", places.userunitdir),
        ("units/user/*.d/*.conf", places.userunitdir),
        ("packaging/*.policy", places.polkitdir),
        ("packaging/*.catalog", places.catalogdir),
        ("packaging/qkilld.conf", places.private),
        ("packaging/qkilld.sysusers", f"{places.libdir}/sysusers.d"),
        ("packaging/guest-example.conf", places.docdir),
        # Authors of clients need these files. README.md links to them at these places.
        ("dbus/README.md", f"{places.docdir}/dbus"),
        ("dbus/*.varlink", f"{places.docdir}/dbus"),
        *(
            (f"dbus/examples/*.{kind}", f"{places.docdir}/dbus/examples")
            for kind in ("c", "png", "py")
        ),
        ("packaging/man/*.[1-8]", places.mandir),
        ("README.md", places.docdir),
        ("NEWS.md", places.docdir),
        *([] if packaged else [("LICENSE", places.docdir)]),
    ):
        for source in sorted(TOP.glob(pattern)):
            section = f"man{source.suffix[1:]}/" if directory == places.mandir else ""
            unit = f"{source.parent.name}/" if source.parent.suffix == ".d" else ""
            content = source.read_bytes()
            if source.suffix != ".png":
                content = _relocated(content.decode(), moved).encode()
            name = "qkilld.conf" if source.suffix == ".sysusers" else source.name
            yield f"{directory}/{section}{unit}{name}", File(content)
    for shell, text in _completions().items():
        path = {
            "bash": f"{places.bashdir}/qkillctl",
            "zsh": f"{places.zshdir}/_qkillctl",
            "fish": f"{places.fishdir}/qkillctl.fish",
        }[shell]
        yield path, File(_relocated(text, moved).encode())


def _completions() -> dict[str, str]:
    """Generate the completion scripts with the package in this checkout. Shell → script."""
    sys.path.insert(0, str(TOP))
    from qkilld.ctl.completion import scripts

    return scripts()


def stage(root: str, places: Places, python: str) -> None:
    """Write the files of a package below `root`. Byte code, the manifest and the licence are left
    out, because package managers handle them. Raises OSError."""
    for path, file in files(places, python, packaged=True):
        _make_directories(root, path)
        _write(root + path, file)


def install(root: str, places: Places, python: str) -> None:
    """Install everything. `root` is DESTDIR, "" for this system. Raises InstallError, OSError."""
    before = _read_manifest(root, places)
    made = {line for line in before if line.endswith("/")}
    written = set()
    for path, file in files(places, python, packaged=False):
        made |= _make_directories(root, path)
        _write(root + path, file)
        written.add(path)
    for source in sorted(path for path in written if path.endswith(".py")):
        compiled = importlib.util.cache_from_source(source)
        made |= _make_directories(root, compiled)
        # With UNCHECKED_HASH, every build has the same byte code, and programs do not look at the
        # sources when they start.
        py_compile.compile(
            root + source,
            cfile=root + compiled,
            dfile=source,
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        written.add(compiled)
    manifest = sorted(made | written | {places.manifest})
    _write(root + places.manifest, File("".join(f"{line}\n" for line in manifest).encode()))
    # Remove files that only the previous version had.
    _remove(root, set(before) - set(manifest))


def uninstall(root: str, places: Places) -> bool:
    """Remove everything that was installed. Return False if there was nothing. Raises
    InstallError, OSError."""
    manifest = _read_manifest(root, places)
    if manifest:
        # Run the module directly: the installed program would look for it at the path without
        # DESTDIR.
        undo = [sys.executable, "-B", "-m", "qkilld.ctl.undo_adopt", "--root", root or "/"]
        environment = {"PYTHONPATH": root + places.package}
        if subprocess.run(undo, cwd="/", env=environment, check=False).returncode == 4:
            raise InstallError("qkilld-stop is stopping a guest; nothing was removed")
    _remove_links(root, {line for line in manifest if line.endswith(".service")})
    # Other interpreters may have written byte code, too.
    for compiled in Path(root + places.package).rglob("__pycache__/*.pyc"):
        compiled.unlink()
    _remove(root, manifest)
    return bool(manifest)


def _script(python: str, package: str, entry: str) -> bytes:
    module, _, function = entry.partition(":")
    # qkilld-stop looks for installed packages when it needs one (qkilld/stop/systemd_units.py).
    options = "-IS" if module.startswith("qkilld.stop.") else "-I"
    script = _SCRIPT.format(
        python=python, options=options, package=package, module=module, function=function
    )
    return script.encode()


def _relocated(text: str, moved: dict[str, str]) -> str:
    # Try longer names first, because some names begin with a shorter one.
    names = "|".join(re.escape(name) for name in sorted(moved, key=len, reverse=True))
    return re.sub(rf"(?:{names})(?![\w-])", lambda found: moved[found[0]], text)


def _make_directories(root: str, path: str) -> set[str]:
    """Create the missing parents of a file. Return them in the form of the manifest."""
    made = set()
    for directory in reversed(Path(path).parents):
        with contextlib.suppress(FileExistsError):
            Path(f"{root}{directory}").mkdir()
            made.add(f"{directory}/")
    return made


def _write(target: str, file: File) -> None:
    """Replace a file atomically: a program that starts meanwhile reads the old or the new one."""
    handle, new = tempfile.mkstemp(dir=Path(target).parent, prefix=".qkilld-")
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(file.content)
            os.fchmod(opened.fileno(), file.mode)
        Path(new).replace(target)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise


def _read_manifest(root: str, places: Places) -> list[str]:
    """Return the lines of the manifest; empty if there is none."""
    try:
        lines = Path(root + places.manifest).read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        if not line.startswith("/") or ".." in line.split("/"):
            raise InstallError(
                f"{root}{places.manifest} is not a list of installed files: {line!r} is not a "
                "path; remove this file and install again"
            )
    return lines


def _remove(root: str, lines: Iterable[str]) -> None:
    """Remove the files, and then the directories that are empty, the deepest first."""
    for line in lines:
        if not line.endswith("/"):
            Path(root + line).unlink(missing_ok=True)
    for line in sorted((line for line in lines if line.endswith("/")), key=len, reverse=True):
        with contextlib.suppress(OSError):
            Path(root + line).rmdir()


def _remove_links(root: str, units: set[str]) -> None:
    """Remove the links that `systemctl enable` made for these units."""
    for link in Path(f"{root}/etc/systemd").glob("*/*.*/*"):
        if link.is_symlink():
            target = Path(root + str(link.readlink()))
            if f"{target.parent.resolve()}/{target.name}".removeprefix(root) in units:
                link.unlink()


def missing() -> list[str]:
    """Return the Debian packages that this interpreter lacks, with the required versions."""
    wanted = [each.partition(";")[0] for each in PROJECT["dependencies"]]
    # One of the two D-Bus libraries is enough.
    buses = [each for each in wanted if each.startswith("dbus-")]
    lacking = [name for each in wanted if each not in buses and (name := _lacking(each))]
    if all(map(_lacking, buses)):
        works = buses[0] if sys.version_info < (3, 15) else buses[1]
        lacking.insert(0, _lacking(works))
    return lacking


def _lacking(wanted: str) -> str:
    """Return the Debian package of a requirement; "" if it is met."""
    name, relation, version = re.split("(==|>=)", wanted)
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return DEBIAN[name]
    if found != version and (relation == "==" or _number(found) < _number(version)):
        return f"{DEBIAN[name]} ({found} is there, {relation} {version} is needed)"
    return ""


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--destdir", default="")
    parser.add_argument("--package", choices=("yes", "no"), default="no")
    parser.add_argument("--python", required=True)
    for field in fields(Places):
        parser.add_argument(f"--{field.name}", required=True)
    arguments = parser.parse_args()
    root = str(Path(arguments.destdir).resolve()).rstrip("/") if arguments.destdir else ""
    directories = {field.name: getattr(arguments, field.name) for field in fields(Places)}
    os.umask(0o022)
    try:
        for name, path in [*directories.items(), ("python", arguments.python)]:
            if not re.fullmatch(r"/[\w./+@%~-]+", path):
                raise InstallError(
                    f"{name.upper()}={path} is not an absolute path of plain characters"
                )
        places = Places(**{name: os.path.normpath(path) for name, path in directories.items()})
        if arguments.action == "install" and arguments.package == "yes":
            stage(root, places, arguments.python)
        elif arguments.action == "install":
            install(root, places, arguments.python)
            lacking = missing()
            if lacking:
                print(f"Packages that qkilld still needs: apt-get install {', '.join(lacking)}")
        elif not uninstall(root, places):
            print(f"qkilld is not installed there: there is no {root}{places.manifest}")
    except OSError as error:
        sys.exit(f"make {arguments.action}: {error.filename}: {error.strerror}")
    except InstallError as refused:
        sys.exit(f"make {arguments.action}: {refused}")
    if not root and arguments.package == "no":
        print(
            "Now, as root: systemd-sysusers qkilld.conf; systemctl daemon-reload; "
            "journalctl --update-catalog"
        )


if __name__ == "__main__":
    main()
