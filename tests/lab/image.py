"""What a guest boots: the kernel that set-up unpacked, and an initramfs that is built here once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import TOP, run
from tests.lab.scratch import run_directory

CACHE: Final = TOP / ".lab"
"""What set-up fetched and what was built from it. Not part of the project."""
_SOURCES: Final = Path(__file__).with_name("initramfs")


@dataclass(frozen=True, slots=True)
class Image:
    kernel: Path
    initramfs: Path


def guest_image() -> Image:
    """Kernel and initramfs, built if the built one is not of these sources.

    Two processes may build at once: each builds aside and renames. Raises needs.Missing.
    """
    kernels = sorted(CACHE.glob("guest/boot/vmlinuz-*"))
    if not kernels:
        raise needs.Missing("there is no kernel for a guest in .lab/guest: run `make setup`")
    return Image(kernels[-1], _initramfs())


def busybox() -> Path:
    """A static one. Raises needs.Missing."""
    for path in (CACHE / "guest/bin/busybox", Path("/bin/busybox")):
        if path.exists():
            return path
    raise needs.Missing("there is no busybox in .lab/guest: run `make setup`")


def _initramfs() -> Path:
    static = busybox()
    cpio = needs.program("cpio", "cpio")
    gcc = needs.program("gcc", "gcc libc6-dev")
    programs = sorted(_SOURCES.glob("*.c"))
    inputs = [static, _SOURCES / "init", *programs, Path(__file__)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in inputs))
    name = f"initramfs-{digest.hexdigest()[:16]}.cpio"
    # A checkout that belongs to somebody else may be read and not written.
    home = CACHE if os.access(CACHE, os.W_OK) else run_directory()
    for built in (CACHE / name, home / name):
        if built.exists():
            return built
    with tempfile.TemporaryDirectory(prefix="build-", dir=home) as work:
        root = Path(work) / "root"
        (root / "bin").mkdir(parents=True)
        shutil.copy(static, root / "bin/busybox")
        shutil.copy(_SOURCES / "init", root / "init")
        (root / "init").chmod(0o755)
        for source in programs:
            run([gcc, "-O2", "-static", "-o", root / "bin" / source.stem, source], check=True)
        # /dev/console, which the first process is given, is in the kernel's own initramfs.
        archive = Path(work) / "cpio"
        pack = 'cd "$1" && find . | "$2" -o -H newc -R 0:0 --quiet >"$3"'
        run(["sh", "-c", pack, "sh", root, cpio, archive], check=True)
        archive.rename(home / name)
    for old in home.glob("initramfs-*.cpio"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return home / name
