"""A guest with a local disk, and with an image on a file system that does not answer. The local
disk is flushed first, because QEMU's main thread hangs when it asks the file system (7.2 to
11.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld.evidence.sampler import HostTables, Reader
from qkilld.model.sample import ImagePlace
from tests.evidence.until import until as wait_until
from tests.lab.bare import BareGuest, bare_guest
from tests.lab.bus import Client, plain
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.guest import Guest
from tests.lab.qmp import Qmp
from tests.rungs.stopping import FORCE, S
from tests.rungs.test_yank import RECORDS, devices, qcow2, stop

STALL = {"storage_stall": 4 * S, "stall": 2 * S, "grace": S}


@pytest.fixture
def store(lab_dir: Path) -> Iterator[FuseStore]:
    files = lab_dir / "files"
    files.mkdir()
    with (files / "remote.raw").open("wb") as image:
        image.truncate(64 << 20)
    with fuse_store(files) as running:
        yield running


def drive(name: str, path: Path, form: str) -> list[str]:
    return ["-drive", f"file={path},if=none,id={name},format={form}"]


@contextlib.contextmanager
def two_disks(directory: Path, local: Path, store: FuseStore) -> Iterator[BareGuest]:
    """Run a guest with a disk on FUSE, and a local qcow2 of 300 acknowledged records."""
    arguments = [
        *drive("remote", store.directory / "remote.raw", "raw"),
        *drive("local", local, "qcow2"),
        *devices(["remote", "local"]),
        *("-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"),
    ]
    with bare_guest(directory, arguments) as guest:
        assert guest.write("local", RECORDS) == 300
        yield guest
        store.fast()  # the process exits only when FUSE answers


@pytest.mark.timeout(300)
@pytest.mark.parametrize("in_flight", [True, False])
def test_the_local_disk_is_flushed(lab_dir: Path, store: FuseStore, in_flight: bool) -> None:
    local = qcow2(lab_dir / "local.qcow2")
    with two_disks(lab_dir, local, store) as guest:
        store.hang()
        if in_flight:
            guest.write_later("remote", 0, 4)
        job = stop(guest, STALL)
        print(job.flush, job.rungs, job.result)
    assert (job.flush.outcome, job.flush.proven) == ("partial", False)
    assert "flushed but for remote" in job.flush.reason
    assert job.rungs[0].action == "flush"
    assert RECORDS.kept(local, "qcow2") == 300


@pytest.mark.timeout(300)
def test_a_file_system_that_answers_is_flushed_as_well(lab_dir: Path, store: FuseStore) -> None:
    local = qcow2(lab_dir / "local.qcow2")
    with two_disks(lab_dir, local, store) as guest:
        job = stop(guest, STALL)
    assert (job.flush.outcome, job.flush.proven) == ("complete", True)
    assert [rung.action for rung in job.rungs] == ["flush", "SIGTERM"]


def test_the_place_of_each_image_is_known_from_outside(lab_dir: Path, store: FuseStore) -> None:
    local = qcow2(lab_dir / "local.qcow2")
    with two_disks(lab_dir, local, store) as guest:
        store.hang()
        reader = Reader(guest.pid, HostTables())
        images = wait_until(lambda: reader.read().images, lambda known: known is not None)
        reader.close()
    numbers = {image.names: image.mount for image in images or ()}
    assert numbers.keys() == {("local",), ("remote",)}
    assert numbers["local",] == "" and numbers["remote",].startswith("0:")
    assert ImagePlace(("local",), "") in (images or ())


def test_a_plan_leaves_the_guest_running(
    qemu: Callable[..., Guest], lab_dir: Path, store: FuseStore, client: Client
) -> None:
    remote = drive("remote", store.directory / "remote.raw", "raw")
    guest = qemu(arguments=["-M", "q35", *remote, *devices(["remote"])])
    store.hang()
    warnings = plain(client.call("Plan", "uta{sv}", guest.pid, int(FORCE), {})[0])["warnings"]
    assert any("was not asked for disks" in text for text in warnings)
    with Qmp(guest) as qmp:
        assert "status" in qmp.call("query-status")
    store.fast()
