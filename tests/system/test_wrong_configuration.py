"""If the configuration is wrong, every call gets an error that says so. No call makes systemd start
qkilld again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Final

import pytest

from tests.evidence.until import until
from tests.lab.container import Container

CALL: Final = ("busctl", "call", "org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager", "ListGuests")
WRONG: Final = "/etc/qkilld/qkilld.conf.d/wrong.conf"
ANSWER: Final = f"qkilld cannot start, because its configuration is wrong at {WRONG}:2"
STARTING: Final = "7d4958e842da4a758f6c1cdc7b36dcc5"
"""The MESSAGE_ID of "Starting qkilld.service", sd-messages.h."""
_CALL: Final = """
import socket
for waits in (False, True):
    client = socket.socket(socket.AF_UNIX)
    client.connect("/run/qkilld/org.qkilld1")
    client.send(b'{"method":"org.qkilld1.ListGuests"}' + bytes(1))
    if waits:
        print(client.recv(4096).decode())
"""


@pytest.fixture
def system(installed: Container) -> Iterator[Container]:
    installed.run("systemctl", "stop", "qkilld.service")
    installed.write(WRONG, "[Policy]\nGarceSec=5s\n")
    installed.run("systemctl", "start", "qkilld.socket")
    yield installed
    installed.run("rm", "-f", WRONG)


def until_failed(system: Container) -> None:
    until(lambda: system.property("qkilld.service", "ActiveState"), "failed".__eq__)


def test_callers_on_the_bus(system: Container) -> None:
    for command in (("qkillctl", "list"), CALL, ("qkillctl", "list")):
        began = time.monotonic()
        done = system.run(*command, check=False)
        assert done.returncode == 1
        assert ANSWER in done.stderr
        # Without an answer, dbus-daemon would give up after 25 s.
        assert time.monotonic() - began < 15
        # A call to a process that is exiting gets an error without this text.
        until_failed(system)
    # The next call starts the daemon.
    system.run("rm", WRONG)
    system.run(*CALL)


def test_one_call_right_after_the_other(system: Container) -> None:
    """A call may arrive while the process that refused the previous call is still exiting."""
    call = f"timeout 15 {' '.join(CALL)}"
    done = system.run("sh", "-c", f"for i in $(seq 20); do {call} || echo $?; done", check=False)
    assert done.stdout.split() == ["1"] * 20
    assert ANSWER in done.stderr


def test_callers_on_varlink(system: Container) -> None:
    """There are two clients. The first disconnects at once. At most two starts of qkilld are needed
    to answer both."""
    since = system.run("date", "+%s.%N").stdout.strip()
    said = system.python("-c", _CALL).stdout
    assert '"error": "org.qkilld1.Failed"' in said and ANSWER in said
    until_failed(system)
    time.sleep(1)
    starts = system.journal(f"--since=@{since}", "UNIT=qkilld.service", f"MESSAGE_ID={STARTING}")
    assert len(starts) in (1, 2)
    assert system.property("qkilld.service", "ActiveState") == "failed"
    assert system.property("qkilld.socket", "ActiveState") == "active"


def test_a_unit_is_checked_with_the_defaults(system: Container) -> None:
    done = system.run("qkillctl", "--json", "check-unit", "dbus.service", check=False)
    assert f"wrong, so this is for the defaults: {WRONG}:2" in done.stderr
    (document,) = json.loads(done.stdout)
    assert document["verdict"] == "unknown"


def test_a_wrong_option(system: Container) -> None:
    path = "/run/systemd/system/qkilld.service.d/wrong.conf"
    system.write(path, "[Service]\nExecStart=\nExecStart=/usr/bin/qkilld --exit-idel 60s\n")
    system.run("systemctl", "daemon-reload")
    try:
        done = system.run("qkillctl", "list", check=False)
    finally:
        system.run("rm", path)
        system.run("systemctl", "daemon-reload")
    assert "qkilld cannot start, because its command line is wrong" in done.stderr
