"""Start systemd-nspawn on a throwaway system. Run this as `python -m tests.lab.nspawn`.

    nspawn MOUNTPOINT LOWER UPPER -- SYSTEMD-NSPAWN ARGUMENT...

The system is an overlay. Its lower layer is LOWER (/ for the host's root). Its upper layer is in
memory: a copy of the tree UPPER, and all later writes. All mounts are in this process's own mount
namespace, so they end with this process. MOUNTPOINT is an empty directory. `{root}` in the
arguments is replaced by the path of the finished tree.

This works even if / is not a mount point, as in a plain chroot.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

_CLONE_NEWNS: Final = 0x00020000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
_libc: Final = ctypes.CDLL(None, use_errno=True)
_CGROUPS: Final = "/sys/fs/cgroup"
_NO_V1: Final = 258
"""From this version on, systemd-nspawn refuses to run on a host that has cgroup v1 in _CGROUPS."""


def main() -> None:
    mountpoint, lower, upper, dashes, *command = sys.argv[1:]
    assert dashes == "--", sys.argv
    _private_mounts(mountpoint)
    root = _system(Path(mountpoint), Path(lower), Path(upper))
    # Hide /run from nspawn, because nspawn would leave files there.
    of_systemd = Path("/run/systemd")
    _mount("tmpfs", str(of_systemd if of_systemd.is_dir() else "/run"), "tmpfs", 0, "mode=0755")
    if _version(command[0]) >= _NO_V1 and not Path(_CGROUPS, "cgroup.procs").exists():
        _mount("cgroup2", _CGROUPS, "cgroup2", 0)
    command = [argument.replace("{root}", str(root)) for argument in command]
    os.execv(command[0], command)


def _version(nspawn: str) -> int:
    """Return the version of systemd-nspawn."""
    shown = subprocess.run([nspawn, "--version"], check=True, capture_output=True, text=True).stdout
    return int(re.findall(r"\d+", shown)[0])


def _private_mounts(mountpoint: str) -> None:
    _check(_libc.unshare(_CLONE_NEWNS), "a mount namespace")
    try:
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        return
    except OSError:  # / is not a mount point: this process is in a chroot.
        pass
    # Enter our own mount namespace again: this leads to its real root, where mounts can be made
    # private. Then return to the chroot. nspawn requires that the root is a mount point, so mount
    # the chroot at another place, and make that place the root.
    inside = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _check(_libc.setns(namespace, _CLONE_NEWNS), "the mount namespace")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    os.fchdir(inside)
    os.chroot(".")
    _mount("/", mountpoint, None, _MS_BIND | _MS_REC)
    os.chroot(mountpoint)
    os.chdir("/")


def _system(mountpoint: Path, lower: Path, upper: Path) -> Path:
    _mount("tmpfs", str(mountpoint), "tmpfs", 0, "mode=0755")
    shutil.copytree(upper, mountpoint / "upper", symlinks=True)
    for hidden in (mountpoint / "upper").rglob(".hide"):
        # In overlayfs, this attribute hides the directory with the same name in LOWER.
        hidden.unlink()
        os.setxattr(hidden.parent, "trusted.overlay.opaque", b"y")
    (mountpoint / "work").mkdir()
    root = mountpoint / "root"
    root.mkdir()
    layers = f"lowerdir={lower},upperdir={mountpoint}/upper,workdir={mountpoint}/work"
    _mount("overlay", str(root), "overlay", 0, layers)
    return root


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    done = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        os.fsencode(data),
    )
    _check(done, f"{kind or 'a mount'} at {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        main()
    except OSError as failure:
        sys.exit(f"no throwaway system here: {failure}")
