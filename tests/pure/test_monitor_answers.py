"""Parsing replies of monitors, and rejecting invalid ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qkilld.model.errors import MonitorProtocolError
from qkilld.monitor import answers
from qkilld.monitor.answers import AgentPort, BlockTotals
from qkilld.monitor.endpoints import TcpListener, UnixListener

TREE = """address-space: I/O
  0000000000000000-000000000000ffff (prio 0, i/o): io
    {}-{} (prio 0, i/o): acpi-evt\r
    0000000000000604-0000000000000605 (prio 0, i/o): acpi-cnt
"""


@pytest.mark.parametrize(
    ("port", "expected"), [("0000000000000600", 0x600), ("000000000000b000", 0xB000), ("0" * 16, 0)]
)
def test_the_event_registers(port: str, expected: int) -> None:
    tree = TREE.replace("\r", "").format(port, port)
    assert answers.find_event_registers(tree) == expected


def test_a_machine_without_event_registers() -> None:
    assert answers.find_event_registers("address-space: memory\n") is None
    assert answers.find_event_registers("") is None
    with pytest.raises(MonitorProtocolError):
        answers.find_event_registers(TREE.replace("\r", "").format("f" * 16, "f" * 16))


def test_an_io_port() -> None:
    assert answers.read_port("portw[0x0602] = 0x0120\n", 0x602) == 0x120
    for text in ("", "portw[0x0600] = 0x0120", "portw[0x0602] = 0x", "portb[0x0602] = 0x20"):
        with pytest.raises(MonitorProtocolError):
            answers.read_port(text, 0x602)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("VM status: running\n", "running"),
        ("VM status: running (single step mode)\n", "running"),
        ("VM status: paused\n", "paused"),
        ("VM status: paused (prelaunch)\n", "prelaunch"),
        ("VM status: paused (io-error)\n", "io-error"),
        ("VM status: paused (guest-panicked)\n", "guest-panicked"),
    ],
)
def test_runstates(text: str, expected: str) -> None:
    assert answers.read_runstate_text(text) == expected


def disk(**stats: object) -> dict[str, Any]:
    return {"device": "d", "stats": stats}


@pytest.mark.parametrize(
    ("disks", "expected"),
    [
        ([], BlockTotals(0, 0, None)),
        ([disk(rd_operations=0)], BlockTotals(0, 0, None)),
        ([disk(rd_operations=1, wr_operations=2, flush_operations=3)], BlockTotals(6, 0, None)),
        ([disk(rd_total_time_ns=1999, unmap_total_time_ns=4001)], BlockTotals(0, 6, None)),
        ([disk(rd_operations=1, idle_time_ns=5000)], BlockTotals(1, 0, 5)),
        # A disk that was never used does not change the result.
        ([disk(rd_operations=1, idle_time_ns=5000), disk()], BlockTotals(1, 0, 5)),
        (
            [disk(rd_operations=1, idle_time_ns=5000), disk(wr_operations=1)],
            BlockTotals(2, 0, None),
        ),
        (
            [disk(rd_operations=1, idle_time_ns=9000), disk(rd_operations=1, idle_time_ns=7000)],
            BlockTotals(2, 0, 7),
        ),
        (
            [disk(rd_operations=10**400, wr_operations=-1, flush_operations=True)],
            BlockTotals(0, 0, None),
        ),
    ],
)
def test_block_totals(disks: list[dict[str, Any]], expected: BlockTotals) -> None:
    assert answers.read_block_totals(disks) == expected


def test_block_totals_as_text() -> None:
    text = "root: rd_bytes=9 rd_operations=1 wr_operations=2 flush_operations=3 "
    text += (
        "wr_total_time_ns=1000 rd_total_time_ns=2000 flush_total_time_ns=3000 idle_time_ns=4000\n"
    )
    assert answers.read_block_totals_text(text * 2) == BlockTotals(12, 12, 4)
    assert answers.read_block_totals_text("") == BlockTotals(0, 0, None)


def test_the_agents_port() -> None:
    chardevs = [
        {"label": "x", "frontend-open": False, "filename": "null"},
        {"label": "g", "frontend-open": True, "filename": "disconnected:unix:/a,server=on"},
    ]
    assert answers.read_agent_port(chardevs, "g") == AgentPort(opened=True, held=False)
    assert answers.read_agent_port(chardevs, "x") == AgentPort(opened=False, held=True)
    assert answers.read_agent_port(chardevs, "y") is None


def own(listener: UnixListener | TcpListener, address: object) -> frozenset[str]:
    return answers.read_chardevs_at(CHARDEVS, answers.chardev_places(listener, address))


CHARDEVS = [
    {"label": "m", "filename": "unix:/a,server=on"},
    {"label": "n", "filename": "disconnected:unix:/a,server=on"},
    {"label": "o", "filename": "unix:/ab,server=on"},
    {"label": "p", "filename": "tcp:127.0.0.1:44,server=on <-> 127.0.0.1:5000"},
    {"label": "q", "filename": "tcp:127.0.0.1:44,server=on <-> 127.0.0.1:5001"},
    {"label": "r", "filename": "tcp:[::]:44,server=on <-> [::1]:5002"},
    {"label": "s", "filename": "tcp:[::]:44,server=on <-> [::ffff:127.0.0.1]:5003"},
    {"label": "t", "filename": "unix:,server=on"},
]


@pytest.mark.parametrize(
    ("listener", "address", "labels"),
    [
        (UnixListener(1, ("/a",)), "", {"m", "n"}),
        (UnixListener(1, ("@x",)), "", {"t"}),
        (TcpListener(1, "127.0.0.1", 44), ("127.0.0.1", 5000), {"p"}),
        (TcpListener(1, "::", 44), ("::1", 5002, 0, 0), {"r"}),
        (TcpListener(1, "::", 44), ("127.0.0.1", 5003), {"s"}),
        (TcpListener(1, "::", 44), ("127.0.0.1", 5009), set()),
    ],
)
def test_the_chardevs_of_a_connection(
    listener: UnixListener | TcpListener, address: object, labels: set[str]
) -> None:
    assert own(listener, address) == labels


def test_yank_instances() -> None:
    wire = [{"type": "block-node", "node-name": "n\x1b"}, {"type": "migration"}]
    node, migration = answers.read_yank_instances(wire)
    assert (node.kind, node.name, node.wire) == (
        "block-node",
        "n\N{REPLACEMENT CHARACTER}",
        wire[0],
    )
    assert (migration.kind, migration.name) == ("migration", "")


@pytest.mark.parametrize("answer", [None, 1, "x", [1], [[]], [{}], {}, [{"stats": 1, "type": 1}]])
@pytest.mark.parametrize(
    "read",
    [
        answers.read_runstate,
        answers.read_block_totals,
        answers.read_vcpu_threads,
        answers.read_yank_instances,
    ],
)
def test_malformed_replies_are_refused(read: Callable[[object], object], answer: object) -> None:
    with pytest.raises(MonitorProtocolError):
        read(answer)


@pytest.mark.parametrize("answer", [None, 1, "x", {}])
def test_malformed_lists_of_chardevs_are_refused(answer: object) -> None:
    with pytest.raises(MonitorProtocolError):
        answers.read_agent_port(answer, "g")
    with pytest.raises(MonitorProtocolError):
        answers.read_chardevs_at(answer, ())


@pytest.mark.parametrize("thread", [0, -1, "1", None, 1.5])
def test_malformed_thread_ids_are_refused(thread: object) -> None:
    with pytest.raises(MonitorProtocolError):
        answers.read_vcpu_threads([{"thread-id": thread}])
