"""qkillctl history, on a real journal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from qkilld.model.event import MessageId
from tests.lab.container import CHECKOUT, PYTHON, Container
from tests.lab.process import OTHER_UID

QEMU = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
HELPER = f"{PYTHON} -m qkilld.stop"
FORGERY = f"""
import socket
text = (
    "MESSAGE=forged\\nMESSAGE_ID={MessageId.JOB_ENDED.value}\\nQKILLD_GUEST=forged\\n"
    "QKILLD_RESULT=killed\\nQKILLD_DATA_AT_RISK=1\\nOBJECT_SYSTEMD_UNIT=past1.service\\n"
    "SYSLOG_IDENTIFIER=qkilld\\n"
)
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.sendto(text.encode(), "/run/systemd/journal/socket")
"""


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """A system after two stops: one by the daemon, and one without the daemon, in a unit with a
    user."""
    installed.write("/etc/qkilld/qkilld.conf", "")
    installed.run("systemctl", "restart", "qkilld.service")
    stop(installed, "past1.service")
    installed.run("systemctl", "mask", "--now", "--runtime", "qkilld.service")
    try:
        stop(installed, "past2.service", f"User={OTHER_UID}")
        stop(installed, "past3.service", f"User={OTHER_UID}", journald_lags=True)
    finally:
        # Other tests use the system, too.
        installed.run("systemctl", "unmask", "--runtime", "qkilld.service")
    yield installed


def stop(system: Container, unit: str, *lines: str, journald_lags: bool = False) -> None:
    name = unit.removesuffix(".service")
    text = [f"ExecStart={QEMU} -name {name}", f"ExecStop={HELPER}", "NotifyAccess=exec"]
    text += [f"Environment=PYTHONPATH={CHECKOUT} PYTHONDONTWRITEBYTECODE=1", *lines]
    system.write(f"/run/systemd/system/{unit}", "[Service]\n" + "\n".join(text) + "\n")
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "start", unit)
    if journald_lags:
        stop_while_journald_lags(system, unit)
    else:
        system.run("systemctl", "stop", unit)
    system.wait_journal("-u", unit, f"MESSAGE_ID={MessageId.JOB_ENDED.value}")


def stop_while_journald_lags(system: Container, unit: str) -> None:
    """Stop the guest while journald does not read. journald reads again shortly after the guest's
    exit."""
    show = ("systemctl", "show", "--value", "--property=MainPID")
    qemu = system.run(*show, unit).stdout.strip()
    journald = system.run(*show, "systemd-journald.service").stdout.strip()
    # A single process does all this, because on a busy host, the start of another process takes too
    # long.
    script = f"""
        kill -STOP {journald}
        systemctl stop --no-block {unit}
        while test -e /proc/{qemu}; do sleep 0.02; done
        sleep 0.1
    """
    try:
        system.run("sh", "-c", script + f"kill -CONT {journald}")
    finally:
        system.run("kill", "-CONT", journald)


def history(system: Container, *arguments: str, uid: int | None = None) -> list[dict[str, Any]]:
    system.run("journalctl", "--sync")
    done = system.run("qkillctl", "--json", "history", *arguments, uid=uid)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_the_receipts_of_past_stops(system: Container) -> None:
    first, second = history(system, "past1"), history(system, "past2.service")
    for rows, program in ((first, "qkilld"), (second, "qkilld-stop")):
        (row,) = rows
        assert (row["result"], row["data_at_risk"], row["program"]) == ("exited", False, program)
        assert 0 < row["elapsed_usec"] < 60_000_000
        assert abs(row["time_usec"] - time.time() * 1e6) < 600_000_000
    assert first[0]["name"] == "past1" and second[0]["unit"] == "past2.service"
    assert history(system, str(first[0]["pid"])) == first
    everything = history(system)
    assert everything.index(first[0]) < everything.index(second[0])

    text = system.run("qkillctl", "history").stdout
    assert text.splitlines()[0].split() == [
        *("TIME", "PID", "NAME", "UNIT", "RESULT", "TOOK"),
        *("GUEST", "ASKED", "DATA", "AT", "RISK"),
    ]
    assert f" {first[0]['pid']} " in text


def test_a_receipt_has_its_unit_if_journald_lags(system: Container) -> None:
    (row,) = history(system, "past3.service")
    assert (row["result"], row["program"]) == ("exited", "qkilld-stop")


def test_a_stop_is_drawn_from_the_journal(system: Container) -> None:
    system.run("journalctl", "--sync")
    lines = system.run("journalctl", "-o", "json", "-u", "past1.service").stdout.splitlines()
    entries = map(json.loads, lines)
    (number,) = {entry["QKILLD_JOB"] for entry in entries if "QKILLD_JOB" in entry}
    drawn = system.run("qkillctl", "timeline", f"job:{number}").stdout
    words = [element.text or "" for element in ElementTree.fromstring(drawn).iter()]
    assert any(word.startswith("SIGTERM ") for word in words)
    # Each daemon and each helper counts jobs from 1. If several jobs have the same number, the
    # newest one is meant.
    assert any(f"job {number}: exited" in word for word in words)
    missing = system.run("qkillctl", "timeline", "job:999999", check=False)
    assert missing.returncode == 7 and "has no job 999999" in missing.stderr


def test_since(system: Container) -> None:
    (first,) = history(system, "past1")
    assert first in history(system, "--since", "today") or first in history(system, "--since=2d")
    assert history(system, "--since", "2999-01-01") == []
    assert system.run("qkillctl", "history", "--since=0s").stdout.startswith("No stop ")
    done = system.run("qkillctl", "history", "--since", "teatime", check=False)
    assert done.returncode == 2 and '"teatime" is not a time' in done.stderr


def test_forged_journal_entries_do_not_count(system: Container) -> None:
    system.run("python3", "-c", FORGERY, uid=OTHER_UID)
    system.wait_journal("MESSAGE=forged")
    assert [row["name"] for row in history(system, "past1.service")] == ["past1"]
    assert history(system, "forged") == []


def test_a_user_without_access_to_the_journal_is_told(system: Container) -> None:
    done = system.run("qkillctl", "--json", "history", uid=OTHER_UID)
    assert "group systemd-journal" in done.stderr
    assert "past1" not in done.stdout
