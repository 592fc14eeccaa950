"""The log of qkilld-stop never delays its messages to systemd."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from qkilld.adapters import background, journal
from qkilld.model.event import Event, MessageId, Priority
from qkilld.stop import log as stop_log
from qkilld.stop.notifier import Notifier

EVENT = Event(MessageId.JOB_STARTED, Priority.INFO, "Something happened.")


def test_a_journald_that_does_not_read(lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_journal(identifier: str) -> journal.QueuedJournal:
        return journal.QueuedJournal(journal.Journald(identifier, lab_dir / "journal"))

    monkeypatch.setattr(journal, "open_journal", open_journal)
    monkeypatch.setattr(background, "FLUSH_TIMEOUT_S", 0.2)
    threads = set(threading.enumerate())
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald,
    ):
        journald.bind(str(lab_dir / "journal"))
        manager.bind(str(lab_dir / "notify"))
        manager.setblocking(False)
        log, notifier = stop_log.Log(), Notifier(str(lab_dir / "notify"))
        for number in range(2 * journal.QUEUE_LENGTH):
            log.write(EVENT)  # returns at once, or this test never ends
            if number % 1000 == 0:
                notifier.extend(number)
                assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=%d" % number
        log.close()
    # The socket of the test's journald is closed, so the log's thread has nothing to wait for.
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)


def test_a_sandbox_that_hides_systemd_is_told_of_once(
    lab_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notifier = Notifier(str(lab_dir / "hidden"))
    notifier.extend(1)
    notifier.extend(2)
    said = capfd.readouterr().err
    assert said.count("ExecStop=+/usr/bin/qkilld-stop") == 1
    assert "sandbox" in said
