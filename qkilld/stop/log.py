"""Messages of the helper: journal events like the daemon's, and lines on stderr."""

from __future__ import annotations

import sys

from qkilld.adapters.journal_stream import stderr_is_journal

_FAILURES = {
    2: "its command line or configuration is wrong",
    3: "a guest was ended by SIGKILL, and may have lost data",
    4: "a guest is still there",
    5: "the process is not a QEMU that Executables= covers, or its pid was reused",
    6: "qkilld-stop is not allowed to stop the guest",
    7: "there is no such unit",
}
"""Reasons by exit code. Code 1 has no reason, because it stands for any other failure."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qkilld.adapters.journal import QueuedJournal
    from qkilld.model.event import Event


class Log:
    """Implements engine.ports.Journal. Opens the journal at the first event, because most runs have
    no event."""

    def __init__(self) -> None:
        self._journal: QueuedJournal | None = None

    def open(self) -> None:
        """Open the journal. Call this before several threads write to the log."""
        if self._journal is None:
            from qkilld.adapters.journal import open_journal

            self._journal = open_journal("qkilld-stop")

    def write(self, event: Event) -> None:
        self.open()
        assert self._journal is not None
        self._journal.write(event)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def say(text: str) -> None:
    """Print a line on stderr. Under systemd, it goes to the unit's journal. The text may contain
    names that a guest or a caller has chosen."""
    _print("", text)


def _print(prefix: str, text: str) -> None:
    if not text.isprintable():
        from qkilld.model.text import printable

        text = printable(text, len(text))
    from qkilld.debug_log import ignore

    # If the disk with the unit's log is full, the guest must be stopped nevertheless.
    with ignore("printing a line", OSError):
        print(f"{prefix}qkilld-stop: {text}", file=sys.stderr, flush=True)


def say_ending(text: str) -> None:
    """Print how a stop ended, unless stderr is the journal, which has an event for that."""
    if not stderr_is_journal():
        say(text)


def say_failure(code: int) -> None:
    """Report the failure as an error in the unit's journal. systemd itself does not report it if
    ExecStop= has the prefix `-`, as after `qkillctl adopt`. For the prefix `<3>`, see
    sd-daemon(3)."""
    if stderr_is_journal():
        why = _FAILURES.get(code, "see above")
        text = f"The stop failed with exit status {code}: {why}. systemd continues with KillSignal="
        _print("<3>", text)
