"""The kernel for guests, which packaging/setup unpacks, and the initramfs, which is built here."""

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
"""Files that packaging/setup has downloaded, and files built from them. Not part of the project."""
_SOURCES: Final = Path(__file__).with_name("initramfs")
_MODULES: Final = (
    *("acpi/button", "input/evdev", "virtio/virtio", "virtio/virtio_ring", "block/virtio_blk"),
    *("virtio/virtio_pci_legacy_dev", "virtio/virtio_pci_modern_dev", "virtio/virtio_pci"),
)
"""Kernel modules for the power button, and for disks whose state can be saved."""


@dataclass(frozen=True, slots=True)
class Image:
    kernel: Path
    initramfs: Path


def guest_image() -> Image:
    """Return the kernel, and an initramfs of the current sources. Build the initramfs if necessary.

    Concurrent builds are safe, because each writes a file of its own and then renames it. Raises
    needs.Missing.
    """
    kernels = sorted(CACHE.glob("guest/boot/vmlinuz-*"))
    if not kernels:
        raise needs.Missing("there is no kernel for a guest in .lab/guest: run `make setup`")
    return Image(kernels[-1], _initramfs())


def busybox() -> Path:
    """Return a static busybox. Raises needs.Missing."""
    for path in (CACHE / "guest/bin/busybox", Path("/bin/busybox")):
        if path.exists():
            return path
    raise needs.Missing("there is no busybox in .lab/guest: run `make setup`")


def _initramfs() -> Path:
    static = busybox()
    cpio = needs.program("cpio", "cpio")
    gcc = needs.program("gcc", "gcc libc6-dev")
    programs = sorted(_SOURCES.glob("*.c"))
    modules = [
        path
        for name in _MODULES
        for path in CACHE.glob(f"guest/lib/modules/*/kernel/drivers/{name}.ko")
    ]
    inputs = [static, _SOURCES / "init", *programs, *modules, Path(__file__)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in inputs))
    name = f"initramfs-{digest.hexdigest()[:16]}.cpio"
    # The checkout may be read-only, if it belongs to another user.
    home = CACHE if os.access(CACHE, os.W_OK) else run_directory()
    for built in (CACHE / name, home / name):
        if built.exists():
            return built
    with tempfile.TemporaryDirectory(prefix="build-", dir=home) as work:
        root = Path(work) / "root"
        (root / "bin").mkdir(parents=True)
        (root / "lib").mkdir()
        for module in modules:
            shutil.copy(module, root / "lib")
        shutil.copy(static, root / "bin/busybox")
        shutil.copy(_SOURCES / "init", root / "init")
        (root / "init").chmod(0o755)
        for source in programs:
            run([gcc, "-O2", "-static", "-o", root / "bin" / source.stem, source], check=True)
        # The kernel's own initramfs has /dev/console, for the first process.
        archive = Path(work) / "cpio"
        pack = 'cd "$1" && find . | "$2" -o -H newc -R 0:0 --quiet >"$3"'
        run(["sh", "-c", pack, "sh", root, cpio, archive], check=True)
        archive.rename(home / name)
    for old in home.glob("initramfs-*.cpio"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return home / name
