"""Files below the root of another process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qkilld.adapters import target_files
from qkilld.adapters.target_files import open_path, read_config
from tests.lab import needs
from tests.lab.process import OTHER_UID, run, spawn


@pytest.mark.parametrize(
    "path",
    [
        "/run/qmp",
        "run/./qmp",
        "/../../run/../run/qmp",
        "/absolute/qmp",
        "/relative/qmp",
        "/to-the-file",
    ],
)
def test_links_and_dots_stay_below_the_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/qmp").touch()
    (tmp_path / "absolute").symlink_to("/run")
    (tmp_path / "relative").symlink_to("../../run")
    (tmp_path / "to-the-file").symlink_to("absolute/qmp")
    file = open_path(tmp_path, path)
    assert os.path.samestat(os.fstat(file), (tmp_path / "run/qmp").stat())
    os.close(file)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/nothing/qmp", errno.ENOENT),
        ("/file/qmp", errno.ENOTDIR),
        ("/circle", errno.ELOOP),
        ("/out", errno.ENOENT),
        ("/self/fd", errno.ENOENT),
    ],
)
def test_paths_that_end_nowhere_fail(tmp_path: Path, path: str, error: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "out").symlink_to(Path(__file__))
    (tmp_path / "self").symlink_to("/proc/self")
    with pytest.raises(OSError) as caught:
        open_path(tmp_path, path)
    assert caught.value.errno == error


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_relative_path_and_its_links(tmp_path: Path) -> None:
    """A relative path begins in the directory, and an absolute link in the root."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/qmp").touch()
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm/link").symlink_to("/run/qmp")
    (tmp_path / "vm/own").touch()
    for path, found in (("link", "run/qmp"), ("own", "vm/own"), ("../own", "vm/own")):
        file = open_path(tmp_path, path, tmp_path / "vm")
        assert os.path.samestat(os.fstat(file), (tmp_path / found).stat())
        os.close(file)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("d/" * target_files.MAX_DEPTH + "f", errno.ELOOP),
        ("d/../" * (target_files.MAX_PATH // 6) + "d", None),
        ("x" * target_files.MAX_PATH, errno.ENAMETOOLONG),
        ("fan/" * 20, errno.ELOOP),
    ],
)
def test_descriptors_and_steps_of_a_path_are_bounded(
    tmp_path: Path, path: str, error: int | None
) -> None:
    """The number of descriptors and steps is bounded."""
    place = tmp_path
    for _ in range(target_files.MAX_DEPTH + 1):
        place /= "d"
        place.mkdir()
    (tmp_path / "fan").symlink_to("./" * 1000 + "d/../" * 200)
    before = descriptors()
    if error is None:
        os.close(open_path(tmp_path, path))
    else:
        with pytest.raises(OSError) as caught:
            open_path(tmp_path, path)
        assert caught.value.errno == error
    assert descriptors() == before


def test_no_link_of_procfs_is_gone_through(tmp_path: Path) -> None:
    """If the root has a procfs, /proc/1/root and /proc/self/fd are ordinary links."""
    needs.root("to mount a procfs")
    (tmp_path / "proc").mkdir()
    run(["mount", "-t", "proc", "proc", tmp_path / "proc"], check=True)
    try:
        secret = os.open("/etc/passwd", os.O_RDONLY)
        for path in ("/proc/1/root/etc/passwd", "/proc/self/cwd/x", f"/proc/self/fd/{secret}"):
            with pytest.raises((FileNotFoundError, PermissionError)):
                open_path(tmp_path, path)
        os.close(secret)
    finally:
        run(["umount", tmp_path / "proc"], check=True)


def test_renaming_directories_meanwhile_does_not_escape_the_root(tmp_path: Path) -> None:
    """Even if directories are renamed meanwhile, the path ends below the root or fails."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/f").write_text("inside")
    (root / "f").write_text("inside")
    (outside / "b").mkdir(parents=True)
    (tmp_path / "f").write_text("outside")
    (outside / "f").write_text("outside")
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            (root / "a/b").rename(outside / "moved")
            (root / "a/b").symlink_to("../../outside")
            (root / "a/b").unlink()
            (outside / "moved").rename(root / "a/b")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(3000):
            for path in ("/a/b/f", "/a/b/../../f", "/a/b/../../../f"):
                try:
                    file = open_path(root, path)
                except FileNotFoundError:
                    continue
                assert Path(f"/proc/self/fd/{file}").read_text() == "inside"
                os.close(file)
    finally:
        stop.set()
        thread.join()


@contextmanager
def process_in(directory: Path) -> Iterator[int]:
    """Run a process of another user in this working directory."""
    with spawn(["sleep", "1000"], cwd=directory, uid=OTHER_UID) as process:
        yield process.pid
        process.kill()


def test_a_config_that_its_user_cannot_read_is_not_read(tmp_path: Path) -> None:
    needs.root("to be another user")
    for place in (tmp_path, *tmp_path.parents):
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o001)
    (tmp_path / "closed").mkdir(mode=0o700)
    for name in ("open", "closed/inside", "private", "group"):
        (tmp_path / name).write_text("[machine]")
    (tmp_path / "private").chmod(0o600)
    (tmp_path / "group").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "closed/inside")
    os.mkfifo(tmp_path / "fifo", 0o666)
    with process_in(tmp_path) as pid:
        assert read_config(pid, "open") == read_config(pid, f"{tmp_path}/open") == "[machine]"
        for path in ("closed/inside", "private", "group", "link", f"{tmp_path}/closed/inside"):
            with pytest.raises(PermissionError):
                read_config(pid, path)
        with pytest.raises((ValueError, PermissionError)):
            read_config(pid, "fifo")
    assert read_config(os.getpid(), f"{tmp_path}/closed/inside") == "[machine]"
