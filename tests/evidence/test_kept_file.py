"""Files stay open for the next read, as long as there are descriptors for many more guests."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence import kept_file
from qkilld.evidence.kept_file import DescriptorShortage, KeptFile
from qkilld.evidence.sampler import HostTables, Reader
from tests.lab.guest import Guest

SetLimit = Callable[[int], None]


@pytest.fixture
def set_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetLimit]:
    """A function that pretends another limit of open files, and leaves no shortage behind."""
    monkeypatch.setattr(kept_file, "_shortage", DescriptorShortage())

    def set_to(limit: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))

    yield set_to


COUNTERS: dict[str, Any] = {
    "at": 0,
    "cpu": 0,
    "io": None,
    "switches": 0,
    "cgroup": None,
    "host": None,
}


def files_of(guest: Guest) -> list[str]:
    """Return the files below /proc/PID that this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return [name for name in links if name.startswith(f"/proc/{guest.pid}/")]


def opened(file: KeptFile) -> bool:
    return file._descriptor >= 0


def test_a_file_stays_open(tmp_path: Path, set_limit: SetLimit) -> None:
    (tmp_path / "file").write_text("one")
    set_limit(1 << 20)
    file = KeptFile(tmp_path / "file")
    assert file.read() == b"one" and opened(file)
    (tmp_path / "file").write_text("two")
    assert file.read() == b"two" and opened(file)
    file.close()


def test_a_file_is_closed_while_descriptors_are_scarce(tmp_path: Path, set_limit: SetLimit) -> None:
    (tmp_path / "file").write_text("one")
    files = [KeptFile(tmp_path / "file") for _ in range(3)]
    set_limit(1 << 20)
    assert files[0].read() == b"one" and opened(files[0])
    set_limit(1)  # Every descriptor is beyond two thirds of that.
    assert files[1].read() == b"one" and not opened(files[1])
    # One that was open before is closed too, with its next read.
    assert files[0].read() == b"one" and not opened(files[0])
    (tmp_path / "file").write_text("two")
    assert files[0].read() == b"two" and not opened(files[0])
    set_limit(1 << 20)
    assert [file.read() for file in files] == [b"two"] * 3
    assert all(opened(file) for file in files)
    for file in files:
        file.close()


def test_a_shortage_begins_and_ends_at_different_numbers(set_limit: SetLimit) -> None:
    shortage = DescriptorShortage()
    set_limit(900)
    lasts = []
    for number in (449, 599, 600, 599, 450, 449, 599):
        shortage.note(number)
        lasts.append(shortage.lasts)
    assert lasts == [False, False, True, True, True, False, False]


def test_a_guest_is_seen_alike(qemu: Callable[..., Guest], set_limit: SetLimit) -> None:
    guest = qemu()
    set_limit(1 << 20)
    reader = Reader(guest.pid, HostTables())
    kept = reader.read()
    assert len(files_of(guest)) >= 4
    set_limit(1)
    Reader(guest.pid, HostTables()).close()  # Of another guest: it shows that they are scarce.
    reader.read()  # closes them
    scarce = reader.read()
    assert files_of(guest) == []
    reader.close()
    assert replace(scarce, **COUNTERS) == replace(kept, **COUNTERS)
    for name in COUNTERS:
        assert getattr(scarce, name) is not None
