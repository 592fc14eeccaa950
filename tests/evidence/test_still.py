"""If a process has not run, some of its values are not read again; the others are read anyway."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence import sampler
from qkilld.evidence.block_graph import read_block_graph
from qkilld.evidence.cgroup import SHARED_AGE_S, CgroupReader, SharedGroups
from qkilld.evidence.files import Descriptors
from qkilld.evidence.hierarchies import Hierarchies
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.sampler import MEMORY_AGE_S, HostTables
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.evidence.threads import ThreadReader
from qkilld.model.sample import Cgroup, Memory
from tests.evidence.until import until
from tests.lab.process import end, spawn

SLEEPER = "import sys; print(flush=True); [print(flush=True) for line in sys.stdin]"
"""A program that answers each line with a line."""
DEAF = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); " + SLEEPER


@contextlib.contextmanager
def python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    process = spawn([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        end(process)


def read(reader: ProcessReader) -> dict[str, Any]:
    found: dict[str, Any] = {"state": "?"}
    reader.read(found)
    return found


class Count:
    """Counts the calls of a method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.calls = 0
        method = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return method(*arguments)

        monkeypatch.setattr(owner, name, counted)


def test_a_process_that_runs_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Count(monkeypatch, ThreadReader, "read")
    with python(SLEEPER) as process:
        assert process.stdin is not None and process.stdout is not None
        reader = ProcessReader(process.pid)

        def skipped() -> bool:
            before = threads.calls
            read(reader)
            return threads.calls == before

        until(skipped, bool)
        before = read(reader)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline()
        assert reader.has_run()
        now = read(reader)
        assert now["io"].syscr > before["io"].syscr
        assert now["switches"] >= before["switches"]
        until(skipped, bool)
        reader.close()


def test_a_signal_that_it_does_not_take_shows_though_it_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with python(DEAF) as process:
        reader = ProcessReader(process.pid)
        until(lambda: (read(reader), reader.has_run())[1], lambda has_run: not has_run)
        assert read(reader)["term_pending"] is False
        os.kill(process.pid, signal.SIGTERM)
        assert read(reader)["term_pending"] is True
        reader.close()


def test_a_clock_that_misses_short_runs_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Count(monkeypatch, ThreadReader, "read")
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: 4_000_000)
    with python(SLEEPER) as process:
        reader = ProcessReader(process.pid)
        for _ in range(5):
            read(reader)
        assert threads.calls == 5
        reader.close()


def test_of_a_process_that_is_gone_nothing_is_remembered() -> None:
    with python(SLEEPER) as process:
        reader = ProcessReader(process.pid)
        until(lambda: (read(reader), reader.has_run())[1], lambda has_run: not has_run)
    found = read(reader)
    assert (found["state"], found["threads"], found["io"]) == ("?", None, None)
    reader.close()


def test_sockets_that_are_no_storage_are_asked_for_once(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = Count(monkeypatch, SocketTable, "unix")
    path = str(lab_dir / "monitor")
    graph = read_block_graph(["qemu", "-chardev", f"socket,id=m,path={path},server=on"])
    with contextlib.ExitStack() as stack:
        server, client, later = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in "123")
        server.bind(path)
        server.listen()
        client.connect(path)
        later.connect(path)
        served, fresh = (stack.enter_context(server.accept()[0]) for _ in "12")
        # Let the reader see only these two sockets, although this process has others.
        two = tuple((str(one.fileno()), os.fstat(one.fileno()).st_ino) for one in (server, served))
        reader = SocketReader(os.getpid())
        reader.refresh(Descriptors(2, (), two), graph)
        sockets = reader.read(SocketTable())
        assert sockets is not None and [socket.role for socket in sockets] == ["other"]
        calls = dumps.calls
        assert reader.read(SocketTable()) is sockets
        assert dumps.calls == calls
        # Another socket replaces one that was not storage.
        os.dup2(fresh.fileno(), served.fileno())
        reader.read(SocketTable())
        assert dumps.calls > calls


def test_groups_that_are_shared_are_read_once_for_all(lab_dir: Path) -> None:
    for path, text in (
        ("proc/self/mountinfo", "30 1 0:23 / /cg rw - cgroup2 cgroup2 rw\n"),
        ("cg/vms/memory.stat", "anon 1\nfile_dirty 3\nfile_writeback 4\n"),
        ("cg/vms/cgroup.procs", "7\n8\n"),
        ("cg/vms/cgroup.events", "populated 1\nfrozen 0\n"),
        ("cg/vms/cgroup.freeze", "0\n"),
        *((f"proc/{pid}/cgroup", "0::/vms\n") for pid in (7, 8)),
        *((f"proc/{pid}/stat", f"{pid} (x) S 1" + " 0" * 48) for pid in (7, 8)),
    ):
        (lab_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (lab_dir / path).write_text(text)
    now = 0.0
    shared = SharedGroups(lambda: now)
    proc = lab_dir / "proc"
    hierarchies = Hierarchies(proc, lab_dir)
    one, other = (CgroupReader(pid, proc, hierarchies, shared=shared) for pid in (7, 8))
    figures = Cgroup(False, 3, 4, None, None, False)
    assert one.read() == figures
    (lab_dir / "cg/vms/memory.stat").write_text("anon 1\nfile_dirty 5\nfile_writeback 4\n")
    (lab_dir / "cg/vms/cgroup.events").write_text("populated 1\nfrozen 1\n")
    # The freezer is read each time.
    assert other.read() == Cgroup(False, 3, 4, None, None, True)
    now = SHARED_AGE_S
    assert other.read() == Cgroup(False, 5, 4, None, None, True)
    assert one.read() is one.read()
    one.close()
    other.close()


def test_the_host_is_read_at_once_if_a_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now, reads = 100.0, 0

    def read_memory() -> Memory:
        nonlocal reads
        reads += 1
        return Memory(reads, 0)

    monkeypatch.setattr(sampler, "read_memory", read_memory)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    tables = HostTables()
    assert tables.recent(waits=False)[2] == Memory(1, 0)
    now += 1
    assert tables.recent(waits=False)[2] == Memory(1, 0)
    assert tables.recent(waits=True)[2] == Memory(2, 0)
    now += MEMORY_AGE_S + 1
    assert tables.recent(waits=False)[2] == Memory(3, 0)
