"""A full-screen terminal with single-key input, restored on exit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from qkilld.debug_log import ignore

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_SEQUENCES: Final = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
}
_NAMES: Final = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace"}


class FullScreen:
    """A context manager that always restores the terminal."""

    def __init__(self, console: Console, on_key: Callable[[str], None]) -> None:
        """`on_key` is called in the event loop with a character, or up, down, page up, page down,
        enter, backspace or escape."""
        self._console = console
        self._on_key = on_key
        self._fd: int | None = None
        self._saved_mode: Any = None
        """The terminal settings to restore; None if unchanged."""
        self._live: Live | None = None
        self.on_resume: Callable[[], None] = lambda: None
        """Called when the screen must be redrawn, after a resize or a suspension."""

    @property
    def has_keys(self) -> bool:
        """Whether keys can be read: standard input must be a terminal, too."""
        return self._fd is not None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return self._console.size.width, self._console.size.height

    def draw(self, lines: Sequence[Text]) -> None:
        """Raises OSError if the terminal is gone."""
        from rich.console import Group

        if self._live is not None:
            self._live.update(Group(*lines), refresh=True)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave the full screen while the context lasts."""
        self._leave()
        try:
            yield
        finally:
            self._enter()
            self.on_resume()

    def __enter__(self) -> FullScreen:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTSTP, self._stop)
        loop.add_signal_handler(signal.SIGWINCH, lambda: self.on_resume())
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTSTP, signal.SIGWINCH):
            loop.remove_signal_handler(number)
        self._leave()

    def _stop(self) -> None:
        """Handle Ctrl-Z: restore the terminal, stop, and redraw after SIGCONT."""
        with self.suspended():
            os.kill(os.getpid(), signal.SIGSTOP)

    def _enter(self) -> None:
        from rich.live import Live

        if self._fd is not None:
            self._saved_mode = termios.tcgetattr(self._fd)
            # Do not use raw mode, because Ctrl-C and Ctrl-Z would then send no signals.
            tty.setcbreak(self._fd, termios.TCSADRAIN)
            asyncio.get_running_loop().add_reader(self._fd, self._read)
        self._live = Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def _leave(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            # Ignore errors of a terminal that is closed.
            with ignore("leaving the full screen", OSError):
                live.stop()
        if self._fd is not None and self._saved_mode is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            with ignore("restoring the terminal", termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved_mode)
            self._saved_mode = None

    def _read(self) -> None:
        assert self._fd is not None
        try:
            data = os.read(self._fd, 256)
        except OSError:
            data = b""
        if not data:
            # The terminal is gone. It is enough to stop reading, because SIGHUP ends the program.
            asyncio.get_running_loop().remove_reader(self._fd)
            return
        for key in keys_of(data.decode(errors="ignore")):
            self._on_key(key)


def keys_of(text: str) -> list[str]:
    """Return the keys in terminal input, in the form for `on_key`. Unknown sequences are
    skipped."""
    keys = []
    at = 0
    while at < len(text):
        sequence = next((one for one in _SEQUENCES if text.startswith(one, at)), "")
        if sequence:
            keys.append(_SEQUENCES[sequence])
            at += len(sequence)
        elif text[at] == "\x1b" and text[at + 1 : at + 2] in ("[", "O"):
            # Skip an unknown sequence.
            at += 2
            while at < len(text) and not "@" <= text[at] <= "~":
                at += 1
            at += 1
        elif text[at] == "\x1b":
            keys.append("escape")
            at += 1
        else:
            character = text[at]
            if character in _NAMES:
                keys.append(_NAMES[character])
            elif character.isprintable():
                keys.append(character)
            at += 1
    return keys
