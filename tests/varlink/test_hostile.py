"""Hostile input on the Varlink socket: other clients are served, and nothing is leaked."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from pathlib import Path
from typing import Any, Final

from tests.evidence.until import until
from tests.lab.process import OTHER_UID
from tests.varlink.conftest import VarlinkService

ROUNDS: Final = 150
VALUES: Final[tuple[Any, ...]] = (
    *(None, True, 0, -1, 1, 2**31, 2**63 - 1, 2**64, 1e308, "", "force", "a\ud800", "\0"),
    *([], {}, [[]], ["force"] * 500, {"pid": 1}, [{"pid": 1}], "x" * 30_000),
)
NAMES: Final = (
    *("GetStatus", "Terminate", "TerminateUnit", "TerminateAll", "Plan", "Inspect", "ListGuests"),
    *("ListJobs", "GetJobByPID", "Wait", "Cancel", "Extend", "Hold", "Release", "Force", "", "X"),
)
KEYS: Final = (
    *("pid", "startTime", "flags", "options", "processes", "unit", "job", "usec", "byUnit", "x"),
)


def message(rng: random.Random) -> bytes:
    """Return a call that is wrong, nearly right, or not a call at all."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(2000)).replace(b"\0", b"")
    call: dict[str, Any] = {
        "method": f"org.qkilld1.{rng.choice(NAMES)}",
        "parameters": {key: rng.choice(VALUES) for key in rng.sample(KEYS, rng.randrange(4))},
    }
    for key in rng.sample(("more", "oneway", "upgrade", "method", "parameters"), 1):
        call[key] = (
            rng.choice((True, False, *VALUES)) if rng.random() < 0.3 else call.get(key, True)
        )
    data = bytearray(json.dumps(call).encode())
    if rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(1, 256)
    return bytes(data)


def attack(service: VarlinkService, rng: random.Random) -> None:
    """As another user, send some calls, sometimes with descriptors, and disconnect at any time."""
    with service.client(OTHER_UID) as client, contextlib.suppress(OSError):
        client.socket.settimeout(5)
        for _ in range(rng.randrange(1, 5)):
            data = message(rng) + b"\0"
            cut = rng.randrange(len(data)) if rng.random() < 0.2 else len(data)
            if rng.random() < 0.1:
                socket.send_fds(client.socket, [data[:cut]], [0] * rng.randrange(1, 7))
            else:
                client.socket.sendall(data[:cut])
        if rng.random() < 0.5:
            client.socket.recv(1 << 16)


def test_hostile_messages_neither_leak_nor_block(service: VarlinkService) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    descriptors = Path(f"/proc/{service.daemon.pid}/fd")

    def opened() -> int:
        return len(os.listdir(descriptors))  # noqa: PTH208  # the names are not wanted

    with service.client() as root:
        root.call("ListJobs")
        before = opened()
        for _ in range(ROUNDS):
            attack(service, rng)
            assert root.call("ListJobs") == {"jobs": []}, f"seed {seed}"
        assert until(opened, lambda count: count <= before + 1), f"seed {seed}"
    said = service.daemon.stderr.text()
    assert "Traceback" not in said and "internal" not in said.lower(), f"seed {seed}:\n{said}"
