"""Test every parser of data from a target, a caller or a file with arbitrary input.

A parser must return, or raise an exception that its docstring names. Data that was written must be
read back unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qkilld.adapters import cgroup_unit, config, journal_reader, pidfile, procfs, qemu_args
from qkilld.adapters.unix_table import parse_unix_row
from qkilld.bus import values
from qkilld.bus.framing import MAX_CALL, Frames
from qkilld.ctl.guest_storage import image_paths
from qkilld.engine import snapshot
from qkilld.evidence import files, meminfo, sockdiag
from qkilld.evidence.block_graph import config_paths, read_block_graph
from qkilld.evidence.cgroup import CgroupReader
from qkilld.evidence.mounts import MountStatistics
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.rings import requests_in_flight
from qkilld.launcher import options
from qkilld.model import timespan, trace
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.errors import ConfigError, InvalidArgs, MonitorError
from qkilld.model.json_text import MAX_DEPTH, decode_json
from qkilld.model.text import MAX_TEXT, printable
from qkilld.model.unit import Command
from qkilld.monitor.agent import AgentClient
from qkilld.monitor.channel import Lines
from qkilld.monitor.hmp import HmpClient
from qkilld.monitor.qmp import QmpClient
from qkilld.unitcheck import command, command_text, dropin, storage, unit_text
from qkilld.unitcheck.shell import read_shell
from qkilld.unitcheck.stop_line import read_line
from tests.fuzz.messages import Aims, Source
from tests.lab.process import TOP

anything = st.binary(max_size=400)
texts = st.text(max_size=200) | anything.map(os.fsdecode)
"""Text as Python reads it from a file or a command line: invalid UTF-8 becomes surrogates."""
words = st.sampled_from(
    [
        *("-name", "guest=web,debug-threads=on", "-uuid", "-qmp", "unix:/run/a,,b,server=on"),
        *("-chardev", "socket,id=m,path=/x", "-mon", '{"backend":{"type":"null"}}', "-S", "--"),
        *("-drive", "file=nbd://host/x", "tcp:[::1]:4444", "mon:stdio", "-", "", ",", "=", ",,="),
        *("-blockdev", "driver=qcow2,node-name=a,file.driver=nbd,file.server.type=inet", "-vnc"),
        *('file=json:{"driver":"nbd","server":{"type":"inet","port":"x"}}', "-hda"),
        *("nbd:unix:/s:exportname=", "nbd://[::1]:99999/x?socket=", "iscsi://u%40h:0/t/0", ":5900"),
        *("-netdev", "socket,id=n,connect=h:1", "-spice", "port=5930,addr=::1", "-add-fd", "fd=9"),
        *(
            "-incoming",
            "tcp:0:99999999999999999999",
            "-device",
            "-readconfig",
            "rbd:pool/x:mon_host=a",
        ),
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)
nested_options = json_values.map(json.dumps) | st.recursive(
    st.sampled_from(["nbd", "raw", "host", "/x", "1"]),
    lambda inner: st.dictionaries(
        st.sampled_from(["driver", "file", "backing", "server", "type", "host", "port", "path"]),
        inner,
    ),
    max_leaves=12,
).map(json.dumps)
argv = st.lists(
    words | nested_options | texts.map(lambda text: text.replace("\0", "")), max_size=12
)


def lines_of(*patterns: str) -> st.SearchStrategy[bytes]:
    """Generate lines that resemble a file of the kernel, with damage."""
    line = st.one_of(*(st.from_regex(pattern.encode(), fullmatch=True) for pattern in patterns))
    return st.lists(line | anything, max_size=12).map(b"\n".join)


def mutated(documents: list[Any]) -> st.SearchStrategy[Any]:
    """Generate one of these JSON documents with one part replaced, removed or duplicated."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        document = json.loads(json.dumps(draw(st.sampled_from(documents))))
        for _ in range(draw(st.integers(0, 3))):
            holder = document
            while True:
                if not isinstance(holder, dict | list) or not holder:
                    break
                keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                key = draw(st.sampled_from(keys))
                if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
                    holder = holder[key]
                    continue
                if draw(st.booleans()):
                    holder[key] = draw(json_values)
                else:
                    del holder[key]
                break
        return document

    return draw_one()


# ---- text, spans, JSON ----


@given(st.text(), st.integers(1, 50) | st.just(MAX_TEXT))
def test_printable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    shown.encode()


@given(texts | st.from_regex(r"[ 0-9.+]*(us|ms|s|min|h|d|w|M|y|infinity)?[ 0-9a-zµ.]*"))
@example("9" * 10_000)
def test_time_spans(text: str) -> None:
    try:
        assert 0 <= timespan.parse(text) <= INFINITY
    except ValueError as error:
        assert str(error).isprintable()


@given(st.integers(0, INFINITY // 2))
def test_a_time_span_is_read_as_it_was_written(usec: int) -> None:
    assert timespan.parse(timespan.format_usec(usec)) == usec


@given(anything | texts | json_values.map(json.dumps))
@example("[" * 100_000)
@example('{"a":' * 100_000)
@example("9" * 100_000)
@example('"' + "\\" * 100_001)
def test_json(text: str | bytes) -> None:
    with contextlib.suppress(ValueError):
        depth, value = 0, decode_json(text)
        while isinstance(value, list | dict) and value:
            value = value[0] if isinstance(value, list) else next(iter(value.values()))
            depth += 1
        assert depth <= MAX_DEPTH


# ---- /proc ----


@given(anything | st.from_regex(rb"[0-9]+ \(.*\) [RSDZTtXI]( -?[0-9]+){18,49}\n", fullmatch=True))
def test_stat(text: bytes) -> None:
    with contextlib.suppress(ProcessLookupError):
        assert procfs.parse_stat(text).command.isprintable()


@given(st.binary(max_size=64).filter(lambda comm: b"\0" not in comm), st.integers(0, 2**63))
def test_a_command_cannot_pass_for_other_fields(comm: bytes, start_time: int) -> None:
    fields = ["S", "1", *["0"] * 15, "7", "0", str(start_time), "0"]
    stat = procfs.parse_stat(b"42 (" + comm + b") " + " ".join(fields).encode() + b"\n")
    assert (stat.comm, stat.state, stat.threads) == (comm, "S", 7)
    assert stat.start_time == start_time


@given(anything, anything.filter(lambda name: b"\n" not in name), st.integers(0, 2**32 - 1))
def test_rows_of_unix_sockets(line: bytes, name: bytes, inode: int) -> None:
    parse_unix_row(line)
    space = b" " if name else b""
    row = parse_unix_row(b"0: 00000002 00000000 00010000 0001 01 %5d" % inode + space + name)
    assert row is not None and (row.inode, row.name, row.listening) == (inode, name, True)


@given(anything | st.from_regex(rb"[0-9]+ [0-9]+ [0-9]+:[0-9]+ /\S* /\S* rw - \S+ \S+ \S+"))
def test_mountinfo(line: bytes) -> None:
    procfs.parse_mount(line, "1")


@given(st.binary(max_size=60))
def test_an_escaped_path_is_read_as_it_was(path: bytes) -> None:
    kernel = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in path)
    assert procfs.unescape(kernel) == path


cgroups = st.lists(
    st.from_regex(r"(0:|[0-9]{1,2}:(name=systemd|memory|cpu)?):/[a-z@\\./_-]{0,60}") | texts,
    max_size=8,
).map("\n".join)


@given(cgroups, cgroups)
def test_cgroup_paths(own: str, init: str) -> None:
    unit = cgroup_unit.unit_of(own, init, lambda: True)
    assert unit is not None
    assert "/" not in unit.system + unit.user
    assert "\n" not in unit.system + unit.user


kernel_files = st.fixed_dictionaries(
    {
        "stat": lines_of(r"[0-9]{1,9} \(.{0,16}\) [A-Z]( [0-9]{1,20}){0,49}"),
        "status": lines_of(r"(Uid|TracerPid|ShdPnd|Threads|x_switches):\t[0-9a-f ]{1,20}"),
        "io": lines_of(r"(rchar|wchar|syscr|read_bytes|write_bytes): [0-9-]{1,25}"),
        "cgroup": lines_of(r"[0-9]{1,3}:(memory|blkio|freezer|name=systemd)?:/[a-z/.]{0,30}"),
        "mountinfo": lines_of(r"[0-9]{1,4} [0-9]{1,4} [0-9]+:[0-9]+ /\S* /\S* rw - \S+ \S+ \S+"),
        "mountstats": lines_of(
            r"device \S+ mounted on \S+ with fstype nfs4? statvers=1.1",
            r"\tbytes:\t[0-9 ]{1,80}",
            r"\t +[A-Z]+: [0-9 ]{1,80}",
        ),
        "smaps": anything,
        "wchan": anything,
        "syscall": lines_of(r"(running|-1|[0-9]{1,4}( 0x[0-9a-f]{1,17}){0,8})"),
        "task/7/stat": lines_of(r"[0-9]{1,9} \(.{0,16}\) [A-Z]( [0-9]{1,20}){0,49}"),
        "task/7/status": lines_of(r"(non)?voluntary_ctxt_switches:\t[0-9]{1,30}"),
        "task/7/syscall": lines_of(r"(running|-1|[0-9]{1,4}( 0x[0-9a-f]{1,17}){0,8})"),
        "task/7/wchan": anything,
        "fdinfo/3": lines_of(
            r"(pos|flags|mnt_id|SqHead|SqTail|CachedSqHead|CqHead|CqTail|CachedCqTail):\t[0-9]{1,25}",
            r"  op=[0-9]{1,3}, task_works=[01]",
        ),
    }
)


@contextlib.contextmanager
def fake_proc(contents: dict[str, bytes]) -> Iterator[Path]:
    """Make a /proc in which process 7 and this process have these files."""
    with tempfile.TemporaryDirectory() as directory:
        proc = Path(directory)
        for name, content in contents.items():
            path = proc / "7" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (proc / "7/fd").mkdir(parents=True)
        (proc / "7/fd/3").symlink_to("anon_inode:[io_uring]")
        (proc / "self").symlink_to("7")
        (proc / "1").symlink_to("7")
        yield proc


@given(kernel_files)
def test_the_readers_of_proc(contents: dict[str, bytes]) -> None:
    with fake_proc(contents) as proc:
        reader = ProcessReader(7, proc)
        groups = CgroupReader(7, proc)
        try:
            found: dict[str, Any] = {}
            for _ in range(2):
                reader.read(found)
                groups.read()
        finally:
            reader.close()
            groups.close()
        descriptors = files.read_descriptors(7, proc)
        if descriptors is not None:
            files.read_images(7, descriptors, proc)
        statistics = MountStatistics(proc)
        for filesystem in procfs.Mounts(7, proc).every():
            statistics.of(filesystem)
        procfs.read_unit(7, proc)
        with contextlib.suppress(OSError):
            procfs.read_identity(7, proc)


@given(lines_of(r"(Dirty|Writeback|WritebackTmp|NFS_Unstable): {1,9}[0-9]{1,25} kB"))
def test_meminfo(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "meminfo").write_bytes(text)
        meminfo.read_memory(Path(directory))


@given(lines_of(r"(SqHead|SqTail|CqHead|CqTail|CachedSqHead):\t[0-9]{1,25}", r"  op=6, t:1"))
def test_rings(text: bytes) -> None:
    found = requests_in_flight(text)
    assert found is None or found.in_flight >= found.timers >= 0


# ---- QEMU's command lines and configuration files ----


@given(argv)
def test_command_lines(arguments: list[str]) -> None:
    name, uuid = qemu_args.name_and_uuid(arguments)
    assert isinstance(name, str) and isinstance(uuid, str)
    for option in qemu_args.parse_command_line(arguments):
        dict(option.properties)
    read_block_graph(arguments, qemu_args.parse_config("\n".join(arguments)))
    config_paths(arguments)
    for path in image_paths(qemu_args.parse_command_line(arguments)):
        assert path.startswith("/")


@given(texts)
@example("a" * 100_000)
@example("," * 100_001)
def test_strings_of_options(text: str) -> None:
    qemu_args.parse_key_values(text, "type")
    qemu_args.parse_legacy_chardev(text)


@given(texts | st.lists(st.from_regex(r'\[[a-z]+( "[^"]*")?\]|  [a-z]+ = "[^"]*"')).map("\n".join))
def test_configurations_of_a_qemu(text: str) -> None:
    for option in qemu_args.parse_config(text):
        dict(option.properties)


@given(st.text(max_size=30))
def test_a_name_is_read_as_it_was_written(name: str) -> None:
    assume("\0" not in name)
    arguments = ["qemu", "-name", f"guest={name.replace(',', ',,')}", "-uuid", "x"]
    assert qemu_args.name_and_uuid(arguments) == (name, "x")


@given(texts)
def test_guest_files(text: str) -> None:
    with contextlib.suppress(ConfigError):
        options.parse(text, "a.conf")


# ---- pidfiles, configuration, units ----


@given(anything | st.from_regex(rb"[ \t\n]*[+-]?[0-9]{1,30}\s*", fullmatch=True))
def test_pidfiles(data: bytes) -> None:
    try:
        assert 0 < pidfile.parse_pid(data, "a.pid") <= pidfile.MAX_PID
    except InvalidArgs as error:
        assert "a.pid" in str(error)


configurations = st.lists(
    st.sampled_from(
        [
            *(b"[Policy]", b"[Target]", b"[Guest a b]", b"[Guest ]", b"[X-Y]", b"[Policy", b"[]"),
            *(b"GraceSec=5s", b"GraceSec=", b"MaxSec=1s", b"StallSec=infinity", b"Garce=1"),
            *(b"Executables=/usr/bin/qemu-*", b"Executables=/*", b"Executables=a/../b"),
            *(
                b"GraceSec=5 \\",
                b"# x \\",
                b"=",
                b"\\",
                b"\xff\xfe",
                b"\0",
                b"\xef\xbb\xbf[Policy]",
            ),
        ]
    )
    | anything,
    max_size=10,
).map(b"\n".join)


@given(configurations)
def test_configuration(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "etc/qkilld/qkilld.conf")
        path.parent.mkdir(parents=True)
        path.write_bytes(text)
        try:
            config.load(Path(directory))
        except ConfigError as error:
            assert all(line.isprintable() for line in str(error).split("\n"))


@given(texts, argv)
def test_commands_of_units(path: str, arguments: list[str]) -> None:
    one = Command(path, tuple(arguments))
    assert read_line(one, {"a": path}).acts
    assert "\n" not in command.line_of(one)
    command.line_of(one).encode("ascii")


@given(texts)
def test_shells_and_unit_files(text: str) -> None:
    with contextlib.suppress(ValueError):
        read_shell(text)
    for value in unit_text.merged([text], "Service", "ExecStop"):
        with contextlib.suppress(ValueError):
            for one in command_text.split_commands(value):
                assert one in value
                assert command_text.ignoring_failure(one).endswith(one)
    unit_text.parse_environment(text)


@given(texts)
def test_unit_names(text: str) -> None:
    storage.escaped(text).encode("ascii")
    assert storage.mount_unit(text).endswith(".mount")


@given(texts)
def test_drop_ins(text: str) -> None:
    ours = dropin.text_of("a.service", "undo", "1", [], text)
    assert dropin.is_ours(ours)
    assert dropin.is_unchanged(ours)
    dropin.is_ours(text)
    dropin.is_unchanged(text)
    dropin.override("/etc/x.conf", text, [])


# ---- state and traces ----

TRACES = sorted((TOP / "tests/traces").glob("*.jsonl"))


def trace_lines() -> list[Any]:
    return [json.loads(line) for file in TRACES for line in file.read_text().splitlines()[:8]]


@given(st.lists(mutated(trace_lines()).map(json.dumps) | texts, max_size=4))
def test_traces(records: list[str]) -> None:
    header = TRACES[0].read_text().splitlines()[0]
    for head in ([], [header]):
        with contextlib.suppress(ValueError):
            trace.decode("\n".join([*head, *records]) + "\n")


@given(mutated(trace_lines()))
def test_a_trace_is_read_as_it_was_written(document: Any) -> None:
    header = TRACES[0].read_text().splitlines()[0]
    try:
        first = trace.decode(f"{header}\n{json.dumps(document)}\n")
    except ValueError:
        return
    text = trace.header_line(first.header)
    text += "".join(trace.record_line(first.header, record) for record in first.records)
    assert trace.decode(text) == first


def saved_jobs() -> list[Any]:
    """Return state files of jobs as the engine writes them."""
    from tests.engine.conftest import FakeProcess, World, make_guest

    world = World()
    found: list[Any] = [{}, {"format": "qkilld-job", "version": 1}]
    for flags in (Flag(0), Flag.FORCE, Flag.FORCE | Flag.FIXED):
        job = world.stop(FakeProcess(make_guest(pid=4711 + flags)), flags)
        world.clock.advance(3)
        found.append(snapshot_of(job))
    return found


def snapshot_of(job: Any) -> Any:
    return json.loads(json.dumps(job.snapshot().to_json()))


@given(mutated(saved_jobs()) | json_values)
def test_saved_jobs(document: Any) -> None:
    try:
        saved = snapshot.decode(document)
    except snapshot.SnapshotError:
        return
    assert snapshot.decode(json.loads(json.dumps(saved.to_json()))) == saved


# ---- sockets: netlink, monitors, the bus ----


class Kernel:
    """A netlink socket that receives these datagrams, and then the end of the reply."""

    def __init__(self, datagrams: list[bytes]) -> None:
        done = struct.pack("=IHHII", 16, 3, 0, 1, 0)
        self._datagrams = [*datagrams, done]

    def recv(self, size: int, flags: int = 0) -> bytes:
        return self._datagrams.pop(0)[:size]


def netlink_message(body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body + bytes(-len(body) % 4)


datagrams = st.lists(
    anything | st.lists(st.binary(max_size=200).map(netlink_message), max_size=4).map(b"".join),
    max_size=4,
)


@given(datagrams)
def test_netlink(received: list[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError, IndexError, struct.error):
        for place in sockdiag._answers(Kernel(received), 0x301):  # type: ignore[arg-type]
            sockdiag._unix(*place)
    with contextlib.suppress(OSError, ValueError, IndexError, struct.error):
        for place in sockdiag._answers(Kernel(received), 0x301):  # type: ignore[arg-type]
            sockdiag._tcp(*place, set())


pieces = st.lists(anything | st.sampled_from([b"\n", b"\r\n", b"{", b"}", b"\xff"]), max_size=12)


@given(pieces)
def test_lines_are_the_same_however_they_arrive(parts: list[bytes]) -> None:
    lines = Lines()
    found = [line for part in parts for line in lines.feed(part)]
    assert found == Lines().feed(b"".join(parts))


GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2}}, "capabilities": ["oob"]}}'
monitor_bytes = st.lists(
    anything
    | st.sampled_from(
        [
            *(GREETING + b"\r\n", b'{"return": {}, "id": 1}\n', b'{"error": 7, "id": 1}\n'),
            *(b'{"return": {}, "id": true}\n', b'{"event": "X", "data": []}\n', b"{\n", b"}\n"),
            *(b"QEMU 7.2.0 monitor - type 'help'\r\n(qemu) ", b"(qemu) ", b"[" * 5000 + b"\n"),
            *(b'\xff{"return": 1}\n', b'{"QMP": 1}\n', b'{"error": {"class": 1}, "id": 1}\n'),
        ]
    )
    | json_values.map(lambda value: json.dumps(value).encode() + b"\n"),
    max_size=8,
)


@pytest.mark.parametrize(
    "talk",
    [
        pytest.param(lambda sock: _with(QmpClient, sock, "execute", "query-status"), id="qmp"),
        pytest.param(lambda sock: _with(HmpClient, sock, "hmp", "info status"), id="hmp"),
        pytest.param(lambda sock: _with(AgentClient, sock, "execute", "guest-ping"), id="agent"),
    ],
)
@given(sent=monitor_bytes)
def test_monitors_and_agents(talk: Callable[[socket.socket], Any], sent: list[bytes]) -> None:
    """The other end sends everything before the first request, then closes the connection."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        theirs.sendall(b"".join(sent))
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(MonitorError):
            asyncio.run(talk(ours))


async def _with(client_class: Any, connection: socket.socket, member: str, word: str) -> None:
    client = await client_class.open(connection, timeout_s=20)
    try:
        await getattr(client, member)(word, timeout_s=20)
    finally:
        client.close()


def bus_stream(seed: int, count: int) -> list[bytes]:
    source = Source(str(seed), Aims((1,), (2,)))
    return [source.next()[1].marshal(serial) for serial in range(1, count + 1)]


@given(st.integers(0, 2**32), st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_messages_are_the_same_however_they_arrive(seed: int, sizes: list[int]) -> None:
    stream = b"".join(bus_stream(seed, 5))
    whole, cut = Frames(), Frames()
    found, at, turn = [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)] * (1 + len(stream) // 2000)
        found += list(cut.feed(stream[at : at + size]))
        at, turn = at + size, turn + 1
    assert found == list(whole.feed(stream))


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 7))))
def test_damaged_messages(seed: int, flips: list[tuple[int, int]]) -> None:
    """The data after the damage may be parsed wrongly, but is parsed to its end."""
    stream = bytearray(b"".join(bus_stream(seed, 5)))
    for at, bit in flips:
        stream[at % len(stream)] ^= 1 << bit
    for message in Frames().feed(bytes(stream)):
        if message is not None and message.body is not None:
            with contextlib.suppress(ValueError):
                values.parse(message.signature, message.body, message.order)


@given(st.text("ybnqiuxtdsogvha(){}", max_size=40), anything)
@example("a" * 254 + "y", bytes(100))
@example("(" * 120 + "y" + ")" * 120, bytes(200))
@example("v", b"\1v\0" * 60)
@example("aa()", b"\xff\0\0\0" + bytes(300))
def test_bodies(signature: str, body: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(values.parse(signature, body), list)


@given(st.integers(0, 2**32))
def test_messages_that_a_bus_lets_pass_are_read(seed: int) -> None:
    for raw in bus_stream(seed, 5):
        (message,) = Frames().feed(raw)
        if message is None or message.body is None:
            assert message is None or len(raw) > MAX_CALL
            continue
        # The parser refuses nesting deeper than 12; the generator nests up to 60.
        with contextlib.suppress(ValueError):
            values.parse(message.signature, message.body, message.order)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("MESSAGE_ID", "QKILLD_RESULT", "QKILLD_GUEST", "OBJECT_PID", "_UID"),
                *("OBJECT_SYSTEMD_UNIT", "_SYSTEMD_UNIT", "QKILLD_ELAPSED_USEC"),
            ]
        ),
        st.sampled_from(["killed", "0", "a.service"])
        | st.text()
        | anything
        | st.integers()
        | st.lists(anything, min_size=1),
    )
)
def test_receipts_in_the_journal(entry: dict[str, Any]) -> None:
    """Another service can write anything in our name. Only the time comes from journald."""
    now = datetime.datetime.now(tz=datetime.UTC)
    journal_reader.receipts_of([entry | {"__REALTIME_TIMESTAMP": now}] * 2)
