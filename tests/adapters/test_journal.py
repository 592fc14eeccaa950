"""Where events go, and that they never hold anything up."""

from __future__ import annotations

import threading

import pytest

from qkilld.adapters import journal
from qkilld.engine.events import Event, MessageId, Priority, internal_error
from qkilld.model.guest import Guest, Identity, Label, Unit

IDENTITY = Identity(17, 99, 1000, "qemu", "S", "/usr/bin/qemu-system-x86_64", False)


def event(text: str = "Something happened.", **more: object) -> Event:
    return Event(MessageId.JOB_STARTED, Priority.INFO, text, **more)  # type: ignore[arg-type]


def test_a_journal_that_blocks_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "QUEUE_LENGTH", 3)
    entered, release = threading.Event(), threading.Event()
    written: list[str] = []

    def sink(what: Event) -> None:
        entered.set()
        release.wait()
        written.append(what.message)

    queued = journal.QueuedJournal(sink)
    queued.write(event("0"))
    entered.wait()
    for number in range(1, 10):
        queued.write(event(str(number)))  # returns at once, or this test never ends
    release.set()
    queued.close()
    # One was being written, three waited, the rest is dropped and counted.
    assert written == ["0", "1", "2", "3"]
    assert "6 events were dropped" in capsys.readouterr().err


def test_a_journal_that_fails_is_survived() -> None:
    written: list[str] = []

    def sink(what: Event) -> None:
        if what.message == "bad":
            raise OSError("no journal")
        written.append(what.message)

    queued = journal.QueuedJournal(sink)
    for text in ("bad", "good"):
        queued.write(event(text))
    queued.close()
    assert written == ["good"]


def test_stderr_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    journal.to_stderr(event(fields={"QKILLD_JOB": "7", "QKILLD_PHASE": "kill", "QKILLD_X": "y"}))
    journal.to_stderr(Event(MessageId.JOB_ENDED, Priority.WARNING, "Watch out."))
    journal.to_stderr(internal_error("testing", ValueError("why")))
    plain, warning, error, *trace = capsys.readouterr().err.splitlines()
    assert plain == "Something happened. [job=7 phase=kill]"
    assert warning == "warning: Watch out."
    assert error == "error: Internal error while testing: ValueError."
    assert trace == ["ValueError: why"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (Unit(), {"OBJECT_PID": "17"}),
        (
            Unit("web.service"),
            {"OBJECT_PID": "17", "OBJECT_SYSTEMD_UNIT": "web.service"},
        ),
        (
            Unit("user@1000.service", "web.service"),
            {
                "OBJECT_PID": "17",
                "OBJECT_SYSTEMD_UNIT": "user@1000.service",
                "OBJECT_SYSTEMD_USER_UNIT": "web.service",
                "OBJECT_UID": "1000",
            },
        ),
    ],
)
def test_the_unit_is_named_for_journald_cannot_always_look_it_up(
    unit: Unit, expected: dict[str, str]
) -> None:
    assert journal._object_fields(Guest(IDENTITY, Label("web", unit=unit))) == expected


def test_journald_only_where_stderr_is_connected_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "1:2", "nonsense", ":"):
        monkeypatch.setenv("JOURNAL_STREAM", value)
        assert not journal.stderr_is_journal()
