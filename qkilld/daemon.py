"""The daemon qkilld: parse its command line, connect its parts, and run it."""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import sys
import threading
from pathlib import Path
from typing import Final

from qkilld import __version__, foreign_descriptors, log_setup
from qkilld.adapters import config, system_files
from qkilld.adapters.argument_types import SuggestingParser
from qkilld.adapters.journal import QueuedJournal, open_journal
from qkilld.adapters.memlock import STACK_BYTES, share_heap
from qkilld.adapters.trace_file import TraceDirectory
from qkilld.engine import events
from qkilld.model import timespan
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import USEC_PER_SEC, ExitCode
from qkilld.model.errors import BusError, ConfigError

_EPILOG: Final = """\
examples:
  qkilld                              serve the system bus, as root
  qkilld --user                       serve the session bus, for your own guests
  qkilld --check-config               print what is wrong with the configuration, and exit
  busctl call org.qkilld1 /org/qkilld1 org.qkilld1.Manager Terminate ut PID 1
                                      stop a guest, and allow SIGKILL

Configuration: /etc/qkilld/qkilld.conf, see qkilld.conf(5). Clients: qkillctl(1), qkilld-stop(8).
Exit codes: 0 stopped or idle, 1 the bus failed or another qkilld owns its name, 2 wrong usage or
configuration.
"""


def main() -> int:
    gc.disable()  # Imports produce no garbage. The event loop enables it again.
    arguments = build_parser().parse_args()
    try:
        configuration = config.load(arguments.root)
    except ConfigError as error:
        print(
            f"qkilld: the configuration is wrong, so qkilld does not start:\n{error}",
            file=sys.stderr,
        )
        return ExitCode.USAGE
    if arguments.check_config:
        print("The configuration is good.")
        return ExitCode.OK
    _take_descriptors()
    threading.stack_size(STACK_BYTES)
    share_heap()
    foreign_descriptors.set_up()
    log_setup.set_up("qkilld", debug=arguments.debug)
    journal = open_journal()
    try:
        with _traces(arguments.trace_dir, journal) as traces:
            # Imported after the configuration is read, so that its errors are reported sooner.
            # asyncio works without TLS, which saves 4 MB of memory, locked while jobs run.
            sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
            import asyncio

            from qkilld.lifecycle import live

            end = live(
                configuration,
                BusAddress(user=arguments.user, address=arguments.bus),
                journal,
                traces,
                varlink=arguments.varlink,
                exit_idle_s=arguments.exit_idle,
            )
            return asyncio.run(end)
    except ConfigError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except BusError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        if not (arguments.user or arguments.bus) and (
            advice := system_files.advice(arguments.root)
        ):
            print(f"qkilld: {advice}", file=sys.stderr)
        return ExitCode.FAILURE
    except ImportError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    finally:
        journal.close()


def build_parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="qkilld",
        description="Stop QEMU guests for callers on D-Bus and Varlink without losing what they "
        "wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    buses = parser.add_mutually_exclusive_group()
    buses.add_argument("--user", action="store_true", help="serve the session bus")
    buses.add_argument(
        "--bus", default="", metavar="ADDRESS", help="serve the bus at this D-Bus address"
    )
    parser.add_argument(
        "--varlink",
        type=Path,
        metavar="PATH",
        help="create a socket at this path and serve Varlink on it, too",
    )
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
        help="record each job in a file in this directory, for qkillctl replay",
    )
    parser.add_argument(
        "--exit-idle",
        type=_seconds,
        metavar="SPAN",
        help="exit when idle for this long, such as 60s; use it only if the bus can activate "
        "qkilld again",
    )
    parser.add_argument("--debug", action="store_true", help="print each failure that is ignored")
    parser.add_argument(
        "--check-config", action="store_true", help="check the configuration and exit"
    )
    parser.add_argument("--version", action="version", version=f"qkilld {__version__}")
    return parser


def _seconds(text: str) -> float:
    """Parse a time span as in systemd.time(7); return seconds."""
    try:
        return timespan.parse(text) / USEC_PER_SEC
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _take_descriptors() -> None:
    """Raise the limit of open files to the maximum: each sampled guest needs about a dozen."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _traces(
    directory: Path | None, journal: QueuedJournal
) -> contextlib.AbstractContextManager[TraceDirectory | None]:
    """Open the directory for traces, if there is one. Raises ConfigError."""
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
