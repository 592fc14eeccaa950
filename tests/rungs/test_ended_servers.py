"""A server that has acknowledged records, and is killed while qkilld stops its guest.

The guest has another disk, on FUSE, whose sync takes some seconds, so QEMU does not exit at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from qkilld.engine.job import Job
from qkilld.engine.snapshot import decode
from qkilld.model.constants import Result
from tests.lab import needs
from tests.lab.bare import BareGuest, Layout, bare_guest
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.process import end, run, spawn
from tests.lab.scratch import scratch
from tests.rungs.stopping import Stopper, actions, codes, stopper, until
from tests.rungs.test_servers import OF_COPIES, stop, wait_for_listener

RECORDS = Layout(60, passes=2)
WRITTEN = 120
SYNC_S = 5.0


def drive(name: str, node: Mapping[str, object]) -> list[str]:
    file = json.dumps(node).replace(",", ",,")
    return ["-drive", f"if=none,id={name},cache=writeback,file=json:{file}"]


def make_image(path: Path, kind: str) -> None:
    extra = ["-o", "cluster_size=4K"] if kind == "qcow2" else []
    qemu_img = needs.program("qemu-img", "qemu-utils")
    run([qemu_img, "create", "-q", "-f", kind, *extra, path, "8G"], check=True)


@contextlib.contextmanager
def slow_guest(directory: Path, arguments: list[str]) -> Iterator[tuple[BareGuest, FuseStore]]:
    """Run a guest whose disk `d` has records, and whose disk `slow` is on FUSE."""
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(scratch("f"))
        make_image(files / "image", "raw")
        fuse = stack.enter_context(fuse_store(files))
        slow = {"driver": "file", "filename": str(fuse.directory / "image")}
        slow_drive = drive("slow", {"driver": "raw", "file": slow})
        guest = stack.enter_context(bare_guest(directory, [*slow_drive, *arguments]))
        stack.callback(fuse.fast)
        guest.write("slow", Layout(5))
        assert guest.write("d", RECORDS) == WRITTEN
        fuse.delay("fsync", SYNC_S)
        yield guest, fuse


async def in_the_sync(job: Job) -> None:
    await until(lambda: "SIGTERM" in actions(job))
    await asyncio.sleep(1.5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
@pytest.mark.parametrize("is_killed", [True, False])
def test_a_server_that_is_killed_and_started_again(
    lab_dir: Path, kind: str, is_killed: bool
) -> None:
    """QEMU reconnects, and exits without an error, but the old server had not written the
    records."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("s"))
        image, path = directory / "image", directory / "nbd"
        image_format = "qcow2" if kind == "qemu-nbd" else "raw"
        make_image(image, image_format)
        argv: list[str | Path] = [needs.program("nbdkit", "nbdkit"), "-f", "-U", path]
        argv += ["--filter=cache", "file", image]
        if kind == "qemu-nbd":
            argv = [needs.program("qemu-nbd", "qemu-utils"), "-t", "-e", "0", "-f", "qcow2"]
            argv += ["--cache=writeback", "-k", path, image]

        def serve() -> subprocess.Popen[bytes]:
            process = spawn(argv, stderr=subprocess.DEVNULL)
            stack.callback(end, process)
            wait_for_listener(path)
            return process

        server = serve()
        nbd = {"driver": "nbd", "server": {"type": "unix", "path": str(path)}}
        node = {"driver": "raw", "file": {**nbd, "reconnect-delay": 300}}
        with slow_guest(lab_dir, drive("d", node)) as (guest, _):

            async def restart(stopping: Stopper, job: Job) -> None:
                await in_the_sync(job)
                if is_killed:
                    server.kill()
                    server.wait()
                    path.unlink()
                    new.append(serve())

            new: list[subprocess.Popen[bytes]] = []
            job = stop(guest, restart)
            guest.close()
        for process in new or [server]:
            process.terminate()
            process.wait(30)
        lost = WRITTEN - RECORDS.kept(image, image_format)
    assert (job.result, bool(lost)) == (Result.EXITED, is_killed)
    assert (codes(job) == {"unknown"}) is job.data_at_risk is is_killed
    assert all(f"(process {server.pid}) ended" in risk.text for risk in job.risks)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_killed", [True, False])
def test_a_server_that_is_killed_while_no_daemon_runs(lab_dir: Path, is_killed: bool) -> None:
    """QEMU cannot reconnect, so no sample of the next daemon shows a server."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("s"))
        image, path = directory / "image", directory / "nbd"
        make_image(image, "raw")
        nbdkit: list[str | Path] = [needs.program("nbdkit", "nbdkit"), "-f", "-U", path]
        server = spawn([*nbdkit, "--filter=cache", "file", image], stderr=subprocess.DEVNULL)
        stack.callback(end, server)
        wait_for_listener(path)
        nbd = {"driver": "nbd", "server": {"type": "unix", "path": str(path)}}
        with slow_guest(lab_dir, drive("d", {"driver": "raw", "file": nbd})) as (guest, _):

            async def resume(stopping: Stopper, job: Job) -> None:
                await in_the_sync(job)
                past = json.dumps(job.snapshot().to_json())
                if is_killed:
                    server.kill()
                    server.wait()
                async with stopper(OF_COPIES) as following:
                    process = following.host.open(guest.pid)
                    resumed = following.registry.resume(process, decode(json.loads(past)))
                    await until(lambda: not resumed.running)
                    jobs.append(resumed)

            jobs: list[Job] = []
            stop(guest, resume)
            guest.close()
    (job,) = jobs
    assert job.result is Result.EXITED
    assert (codes(job) == {"unknown"}) is job.data_at_risk is is_killed
    names = [f"nbdkit (process {server.pid})" in risk.text for risk in job.risks]
    assert any(names) is is_killed


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_killed", [True, False])
def test_a_fuse_server_that_is_killed(lab_dir: Path, is_killed: bool) -> None:
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(scratch("s"))
        make_image(files / "image", "qcow2")
        with (files / "image").open("r+b") as file:
            file.truncate(128 << 20)
        fuse = stack.enter_context(fuse_store(files))
        path = fuse.directory / "image"
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        with slow_guest(lab_dir, drive("d", node)) as (guest, _):

            async def leave(stopping: Stopper, job: Job) -> None:
                await in_the_sync(job)
                if is_killed:
                    fuse.leave()

            job = stop(guest, leave)
            guest.close()
        lost = WRITTEN - RECORDS.kept(files / "image", "qcow2")
    assert (job.result, bool(lost)) == (Result.EXITED, is_killed)
    assert (codes(job) == {"unknown"}) is job.data_at_risk is is_killed
    assert all(f"(process {fuse.process.pid}) ended" in risk.text for risk in job.risks)
