"""Parsing hostile text of a target must take time only in proportion to its length.

Before the parsers were corrected, each case took between 5 s and several hours, or gigabytes of
memory. The limit is a hundred times the processor time that the case takes now.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from qkilld.adapters.qemu_args import name_and_uuid, parse_command_line
from qkilld.evidence.block_graph import read_block_graph
from qkilld.model.json_text import MAX_DEPTH, decode_json
from qkilld.monitor.endpoints import MAX_CLAIMS, TcpListener, UnixListener, find_endpoints

SECONDS = 3.0
WORD = 120_000
"""The length of one word. The kernel allows 128 KiB."""


def cost(function: Callable[[], Any]) -> float:
    before = time.process_time()
    with contextlib.suppress(ValueError):  # The text may be refused.
        function()
    return time.process_time() - before


@pytest.mark.parametrize("quote", ["\\'", '\\"', "'", '"', "\\", "\\\\'", '\\\\"'])
@pytest.mark.parametrize("start", ["", "{", "{'", '{"', '{"a":"'])
def test_quotes_without_an_end(quote: str, start: str) -> None:
    text = start + quote * (WORD // len(quote))
    brackets = MAX_DEPTH * "[]"
    assert cost(lambda: decode_json(brackets + "[" + text)) < SECONDS
    for option in ("-blockdev", "-chardev", "-name", "-drive"):
        argv = ["qemu", option, text]
        assert cost(partial(name_and_uuid, argv)) < SECONDS
        assert cost(partial(read_block_graph, argv)) < SECONDS


@pytest.mark.parametrize(
    "word",
    [
        "." * WORD,
        "a." * (WORD // 2),
        ",".join("a." * 100 + f"{number}.file=x" for number in range(WORD // 220)),
        '{"' + (WORD // 2) * "a" + '":[' + (WORD // 4) * "0," + "0]}",
        "file=json:" + MAX_DEPTH * '{"a":' + "0" + MAX_DEPTH * "}",
        "/libvirt/qemu/" * (WORD // 14),
    ],
    ids=["dots", "levels", "many levels", "long key of a list", "nested", "paths"],
)
@pytest.mark.parametrize("option", ["-drive", "-blockdev", "-device"])
def test_keys_with_many_levels(option: str, word: str) -> None:
    assert cost(lambda: read_block_graph(["qemu", option, word])) < SECONDS


def test_many_monitors_beside_many_sockets() -> None:
    listeners = [
        UnixListener(number, (f"/run/{number}",), frozenset({number}), in_use=False)
        for number in range(1000)
    ]
    on_tcp = [
        TcpListener(number, "127.0.0.1", number, frozenset({number}))
        for number in range(1000, 2000)
    ]
    for argument in ("socket,fd=7,server=on", "unix:/run/5,server=on", "tcp::1,server=on"):
        options = parse_command_line(["qemu", *(5_000 * ["-qmp", argument])])
        assert cost(partial(find_endpoints, options, listeners, on_tcp)) < SECONDS
        found = find_endpoints(options, listeners, on_tcp)
        assert not found.endpoints
        assert found.obstacles == (f"the guest has more than {MAX_CLAIMS} character devices",)


def test_a_path_that_looks_like_libvirts_again_and_again() -> None:
    path = "/libvirt/qemu/" * (WORD // 14)
    options = parse_command_line(["qemu", "-qmp", f"unix:{path},server=on"])
    assert cost(lambda: find_endpoints(options, [])) < SECONDS


def test_a_long_key_above_a_long_list_takes_no_memory() -> None:
    """A key was repeated for each element: 147 MB for one command line."""
    text = '{"' + 1000 * "k" + '":[' + (WORD // 2) * "0," + "0]}"
    (option,) = parse_command_line(["qemu", "-blockdev", text])
    assert sum(map(len, option.flat)) < 5 * WORD
    (option,) = parse_command_line(["qemu", "-blockdev", '{"a":[' + 9_999 * "0," + "0]}"])
    assert len(option.flat) == 10_000
