"""Before SIGKILL: dead network storage is cut off, and QEMU finishes writing to the other disks.

In most stops, the flush before SIGTERM has already saved the other disks. Most tests here skip this
flush, as if the storage had died a moment later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qkilld.decision import flush_plan
from qkilld.decision.flush_plan import FlushPlan
from qkilld.engine.job import Job
from qkilld.model.block_state import BlockState
from qkilld.model.constants import Result
from qkilld.model.policy import Config, Switches
from tests.lab import needs
from tests.lab.bare import BareGuest, Layout, bare_guest
from tests.lab.guest import QEMU
from tests.lab.hung_disk import hung_disk
from tests.lab.nbd import NbdStore, nbd_store
from tests.lab.process import run
from tests.lab.vhost_user import vhost_backend
from tests.monitor.connecting import run_for
from tests.rungs.stopping import FORCE, S, actions, codes, stopper, until

RECORDS = Layout(100, passes=3)
"""300 records. SIGKILL loses about two thirds of them, because their L2 tables are dirty in QEMU's
memory."""
STALL = {"storage_stall": 6 * S, "stall": 2 * S, "grace": S}


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(first: BlockState, *others: object) -> FlushPlan:
        return FlushPlan(False, True, (), "the storage died a moment later")

    monkeypatch.setattr(flush_plan, "plan_flush", plan)


def qcow2(path: Path) -> Path:
    qemu_img = str(needs.program("qemu-img", "qemu-utils"))
    run([qemu_img, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, "10G"], check=True)
    return path


@contextlib.contextmanager
def two_disks(
    directory: Path, local: Path, remote: NbdStore, more: str = ""
) -> Iterator[BareGuest]:
    """Run a guest with a local qcow2 of 300 acknowledged records, and an NBD disk."""
    server = ",".join(f"server.{key}={value}" for key, value in remote.server().items())
    arguments = ["-drive", f"file={local},if=none,id=local,format=qcow2"]
    arguments += ["-drive", f"driver=nbd,{server},if=none,id=remote{more}"]
    arguments += ["-device", "virtio-blk-pci,drive=local", "-device", "virtio-blk-pci,drive=remote"]
    arguments += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
    with bare_guest(directory, arguments) as guest:
        assert guest.write("local", RECORDS) == 300
        yield guest


@contextlib.contextmanager
def store(directory: Path, transport: str = "unix") -> Iterator[NbdStore]:
    file = directory / "remote.raw"
    file.touch()
    with file.open("r+b") as image:
        image.truncate(64 << 20)
    with nbd_store(file, transport=transport) as running:
        yield running


@pytest.fixture
def remote(lab_dir: Path) -> Iterator[NbdStore]:
    with store(lab_dir) as running:
        yield running


def stop(
    guest: BareGuest,
    spans: dict[str, int] | None = None,
    *,
    switches: Switches | None = None,
) -> Job:
    config = Config(
        executables=(str(needs.program(QEMU, "qemu-system-x86").resolve()),),
        switches=switches or Switches(),
    )

    async def work() -> Job:
        async with stopper(config) as stopping:
            job = await stopping.begin_pid(guest.pid, FORCE, spans or STALL)
            await until(lambda: not job.running, 150)
            return job

    return run_for(170, work())


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_all_records_of_the_healthy_disk_are_kept(lab_dir: Path, transport: str) -> None:
    local = qcow2(lab_dir / "local.qcow2")
    with store(lab_dir, transport) as remote, two_disks(lab_dir, local, remote) as guest:
        remote.freeze()
        guest.write_later("remote", 0, 4)
        job = stop(guest)
    assert (job.result, codes(job)) == (Result.EXITED, {"yanked"})
    assert actions(job) == ["SIGTERM", "yank"]
    assert "remote was cut off" in job.risks[0].text
    assert RECORDS.kept(local, "qcow2") == 300


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
def test_without_it_sigkill_loses_most_of_them(lab_dir: Path, remote: NbdStore) -> None:
    local = qcow2(lab_dir / "local.qcow2")
    with two_disks(lab_dir, local, remote) as guest:
        remote.freeze()
        guest.write_later("remote", 0, 4)
        job = stop(guest, switches=Switches(yank=False))
    assert (job.result, actions(job)) == (Result.KILLED, ["SIGTERM", "SIGKILL"])
    assert RECORDS.kept(local, "qcow2") < 200


@pytest.mark.timeout(300)
def test_a_server_that_is_gone_for_good_with_reconnect_delay(
    lab_dir: Path, remote: NbdStore
) -> None:
    """QEMU 7.2 hangs after the yank, so SIGKILL follows. The flush before SIGTERM has saved
    everything."""
    local = qcow2(lab_dir / "local.qcow2")
    with two_disks(lab_dir, local, remote, ",reconnect-delay=3600") as guest:
        remote.leave()
        guest.write_later("remote", 0, 4)
        job = stop(guest)
        guest.close()
    assert job.result in (Result.KILLED, Result.EXITED)
    assert job.data_at_risk and "yanked" in codes(job)
    assert RECORDS.kept(local, "qcow2") == 300


def devices(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("-device", f"virtio-blk-pci,drive={name}")]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
def test_a_healthy_server_is_left_alone_and_has_all_its_time_afterwards(lab_dir: Path) -> None:
    """The disk with the records is on a healthy NBD server. QEMU's last writes to this disk take
    longer than StorageStallSec=. The kernel acknowledges all bytes to the frozen server."""
    local = qcow2(lab_dir / "local.qcow2")
    with local.open("r+b") as image:
        image.truncate(local.stat().st_size + (64 << 20))
    with nbd_store(local) as healthy, store(lab_dir, "tcp") as remote:
        place = f"file.server.type=unix,file.server.path={healthy.server()['path']}"
        arguments = ["-drive", f"driver=qcow2,file.driver=nbd,{place},if=none,id=local"]
        dead = ",".join(f"server.{key}={value}" for key, value in remote.server().items())
        arguments += ["-drive", f"driver=nbd,{dead},if=none,id=remote"]
        arguments += devices(["local", "remote"])
        arguments += ["-qmp", f"unix:{lab_dir / 'qmp'},server=on,wait=off"]
        with bare_guest(lab_dir, arguments) as guest:
            assert guest.write("local", RECORDS) == 300
            healthy.slow("250K")
            remote.freeze()
            guest.write_later("remote", 0, 4)
            job = stop(guest)
    assert job.result is Result.EXITED
    assert "remote was cut off" in job.risks[0].text
    assert all("remote" in risk.text for risk in job.risks)
    yanked = next(rung.at for rung in job.rungs if rung.action == "yank")
    assert job.ended is not None and job.ended - yanked > STALL["storage_stall"]
    assert RECORDS.kept(local, "qcow2") == 300


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
def test_a_vhost_user_device_whose_backend_is_frozen(lab_dir: Path) -> None:
    local = qcow2(lab_dir / "local.qcow2")
    with vhost_backend(lab_dir / "vhost", connects=False) as backend:
        arguments = ["-drive", f"file={local},if=none,id=local,format=qcow2"]
        arguments += devices(["local"])
        arguments += ["-chardev", f"socket,id=back,path={lab_dir / 'vhost'}"]
        arguments += ["-device", "vhost-user-blk-pci,chardev=back,addr=6"]
        arguments += ["-qmp", f"unix:{lab_dir / 'qmp'},server=on,wait=off"]
        with bare_guest(lab_dir, arguments) as guest:
            guest.start_virtio(6)
            assert guest.write("local", RECORDS) == 300
            backend.freeze()
            job = stop(guest)
    assert (job.result, "yank" in actions(job)) == (Result.EXITED, True)
    assert RECORDS.kept(local, "qcow2") == 300


@contextlib.contextmanager
def one_server(
    directory: Path, transport: str, more: Sequence[str] = ()
) -> Iterator[tuple[BareGuest, NbdStore, Path]]:
    """Run a guest with two disks on one healthy server: a qcow2 of 300 acknowledged records, and a
    raw one. Their connections look the same. `more`: arguments for other disks."""
    image, other = qcow2(directory / "a.qcow2"), directory / "b.raw"
    for file, size in ((image, image.stat().st_size + (64 << 20)), (other, 64 << 20)):
        with file.open("ab") as opened:
            opened.truncate(size)
    with nbd_store(image, "qemu-storage-daemon", transport, other=other) as server:
        place = ",".join(f"file.server.{key}={value}" for key, value in server.server().items())
        arguments = ["-drive", f"driver=qcow2,file.driver=nbd,{place},if=none,id=a"]
        arguments += [
            "-drive",
            f"driver=raw,file.driver=nbd,{place},file.export=other,if=none,id=b",
        ]
        arguments += [*devices(["a", "b"]), *more]
        arguments += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
        with bare_guest(directory, arguments) as guest:
            assert guest.write("a", RECORDS) == 300
            guest.write_later("b", 0, 4)
            yield guest, server, image


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_disks_with_one_healthy_server_are_left_alone(lab_dir: Path, transport: str) -> None:
    with store(lab_dir, transport) as remote:
        dead = ",".join(f"server.{key}={value}" for key, value in remote.server().items())
        more = ["-drive", f"driver=nbd,{dead},if=none,id=remote", *devices(["remote"])]
        with one_server(lab_dir, transport, more) as (guest, _, image):
            remote.freeze()
            guest.write_later("remote", 0, 4)
            job = stop(guest)
    assert (job.result, actions(job)) == (Result.EXITED, ["SIGTERM", "yank"])
    assert ["remote" in risk.text for risk in job.risks] == [True]
    assert RECORDS.kept(image, "qcow2") == 300


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
def test_disks_with_one_dead_server_are_cut_off_together(lab_dir: Path) -> None:
    """Only one of them has a request, but it is unknown which."""
    local = qcow2(lab_dir / "local.qcow2")
    more = ["-drive", f"file={local},if=none,id=local,format=qcow2", *devices(["local"])]
    with one_server(lab_dir, "unix", more) as (guest, server, _):
        assert guest.write("local", RECORDS) == 300
        guest.flush("a")
        server.freeze()
        guest.write_later("b", 0, 4)
        job = stop(guest)
    assert (job.result, actions(job)) == (Result.EXITED, ["SIGTERM", "yank"])
    assert [risk.text.partition(" ")[0] for risk in job.risks] == ["a", "b"]
    assert RECORDS.kept(local, "qcow2") == 300


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_flush")
def test_disks_with_one_healthy_server_are_left_alone_beside_a_hung_local_disk(
    lab_dir: Path,
) -> None:
    with hung_disk() as disk:
        file = disk.directory / "hung.raw"
        file.touch()
        os.truncate(file, 64 << 20)
        more = ["-drive", f"file={file},if=none,id=hung,format=raw", *devices(["hung"])]
        with one_server(lab_dir, "unix", more) as (guest, _, _):
            guest.write_later("hung", 0, 4)
            disk.fuse.hang()
            job = stop(guest)
            disk.fuse.fast()
    assert actions(job) == ["SIGTERM", "SIGKILL"]
