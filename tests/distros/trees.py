"""Root file systems of Debian releases, made by debootstrap and kept in .lab/distros.

Programs that run in one never write to it: containers and chroots put an overlay over it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.image import CACHE

DIRECTORY: Final = CACHE / "distros"
_BASE: Final = "systemd-sysv,dbus,udev,procps,iproute2,ca-certificates"
_NO_SERVICES: Final = "usr/sbin/policy-rc.d"
_FAST_UNPACKING: Final = "etc/dpkg/dpkg.cfg.d/unsafe-io"
"""This file keeps dpkg from waiting until each file is on the disk. On a busy machine, the waiting
would take most of the time. Unpacking is safe without it, because an interrupted tree is made
again."""


@dataclass(frozen=True, slots=True)
class Release:
    name: str
    unified: bool
    """Whether the release's systemd needs cgroup v2."""


RELEASES: Final = (Release("bookworm", False), Release("trixie", True), Release("sid", True))


def tree(
    release: Release, packages: Sequence[str], *, variant: str = "", install: bool = True
) -> Path:
    """Return the root file system of a release. If `install` is false, the packages are only
    downloaded, so that apt needs no network. Takes minutes the first time. Raises needs.Missing."""
    needs.root("debootstrap")
    finished = DIRECTORY / f"{release.name}{variant}"
    # If the list of packages has changed, add the new ones.
    listed = finished.with_name(f"{finished.name}.packages")
    wanted = " ".join(packages)
    if finished.is_dir():
        if not listed.exists() or listed.read_text() != wanted:
            _get(finished, packages, install=install)
            listed.write_text(wanted)
        return finished
    new = finished.with_name(f"{finished.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    (new / _FAST_UNPACKING).parent.mkdir(parents=True)
    (new / _FAST_UNPACKING).write_text("force-unsafe-io\n")
    debootstrap = needs.program("debootstrap", "debootstrap")
    options = ["--variant=minbase", f"--include={_BASE}"]
    _run([debootstrap, *options, release.name, new, *_mirror()], new.with_suffix(".log"))
    (new / _NO_SERVICES).write_text("#!/bin/sh\nexit 101\n")
    (new / _NO_SERVICES).chmod(0o755)
    _get(new, packages, install=install)
    new.rename(finished)
    listed.write_text(wanted)
    return finished


def _get(root: Path, packages: Sequence[str], *, install: bool) -> None:
    get = ["apt-get", "-y", "-q", "--no-install-recommends", "install", *packages]
    if not install:
        get.insert(1, "--download-only")
    with _proc(root):
        _run(["chroot", root, *get], root.with_suffix(".log"))


def _mirror() -> list[str]:
    """Return this machine's mirror; [] for debootstrap's default."""
    wanted = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return listed.stdout.splitlines()[:1]


@contextlib.contextmanager
def _proc(root: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", "/proc", root / "proc"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", root / "proc"], check=True)


def _run(command: Sequence[str | Path], log: Path) -> None:
    with log.open("ab") as written:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        )
    if done.returncode:
        raise needs.Missing(f"{command[0]} failed: see {log}")
