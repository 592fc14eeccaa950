"""qkilld, the daemon: wires the parts together, serves a bus, and ends in good order."""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import sys
import threading
from pathlib import Path
from typing import Final

from qkilld import __version__
from qkilld.adapters import config
from qkilld.adapters.journal import QueuedJournal, open_journal
from qkilld.adapters.memory import STACK_BYTES
from qkilld.adapters.tracefile import TraceDirectory
from qkilld.engine import events
from qkilld.model import timespan
from qkilld.model.errors import BusError, ConfigError
from qkilld.model.words import USEC_PER_SEC, ExitCode

_EPILOG: Final = """\
examples:
  qkilld                              serve the system bus, as root
  qkilld --user                       serve your own guests on the session bus
  qkilld --check-config               say what is wrong with the configuration, and exit
  busctl call org.qkilld1 /org/qkilld1 org.qkilld1.Manager Terminate ut PID 1
                                      stop a guest, by force if need be

Configuration: /etc/qkilld/qkilld.conf, see qkilld.conf(5). Clients: qkillctl(1).
Exit codes: 0 stopped in good order, 1 the bus failed or another qkilld has it, 2 wrong usage or
configuration.
"""


def main() -> int:
    arguments = _parse(sys.argv[1:])
    try:
        configuration = config.load(arguments.root)
    except ConfigError as error:
        print(f"qkilld: the configuration is wrong, not starting on it:\n{error}", file=sys.stderr)
        return ExitCode.USAGE
    if arguments.check_config:
        print("The configuration is good.")
        return ExitCode.OK
    # dbus_next logs what concerns only its maintainers, tracebacks among it.
    logging.getLogger().addHandler(logging.NullHandler())
    _take_descriptors()
    threading.stack_size(STACK_BYTES)
    journal = open_journal()
    try:
        with _traces(arguments.trace_dir, journal) as traces:
            # Not before: a wrong configuration is told of sooner without. asyncio does without TLS
            # where there is none, which spares 4 MB that would be locked while jobs run.
            sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
            import asyncio

            from qkilld.bus import interfaces
            from qkilld.life import Where, live

            interfaces.load()
            where = Where(arguments.bus, arguments.user, arguments.exit_idle)
            return asyncio.run(live(configuration, where, journal, traces))
    except ConfigError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except BusError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    finally:
        journal.close()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qkilld",
        description="Stops QEMU guests for callers on D-Bus, without losing what they wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="serve the session bus")
    where.add_argument("--bus", metavar="ADDRESS", help="serve the bus at this D-Bus address")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="read the configuration below this directory instead of /",
    )
    parser.add_argument(
        "--trace-dir",
        type=Path,
        metavar="DIR",
        help="record each job in a file there, for qkillctl replay",
    )
    parser.add_argument(
        "--exit-idle",
        type=_seconds,
        metavar="SPAN",
        help="end when there was nothing to do for so long, as 60s; the bus must start it again",
    )
    parser.add_argument("--check-config", action="store_true", help="check it and exit")
    parser.add_argument("--version", action="version", version=f"qkilld {__version__}")
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    """Of a time span as in systemd.time(7)."""
    try:
        return timespan.parse(text) / USEC_PER_SEC
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _take_descriptors() -> None:
    """As many as we may: a guest that is held and looked at costs about a dozen."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _traces(
    directory: Path | None, journal: QueuedJournal
) -> contextlib.AbstractContextManager[TraceDirectory | None]:
    """Where jobs are recorded, if they are to be. Raises ConfigError."""
    if directory is None:
        return contextlib.nullcontext()
    try:
        traces = TraceDirectory(directory, lambda text: journal.write(events.traces_failed(text)))
    except OSError as error:
        raise ConfigError(
            f"traces cannot be written to {directory}: {error.strerror}; "
            "--trace-dir must be a directory that exists"
        ) from None
    return contextlib.closing(traces)


if __name__ == "__main__":
    sys.exit(main())
