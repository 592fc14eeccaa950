"""qkilld, the daemon: wires the parts together, serves a bus, and ends in good order."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

from qkilld import __version__
from qkilld.adapters import config
from qkilld.adapters.journal import QueuedJournal, open_journal
from qkilld.adapters.tracefile import TraceDirectory
from qkilld.engine import events
from qkilld.model.errors import BusError, ConfigError
from qkilld.model.policy import Config
from qkilld.model.words import BUS_NAME, ExitCode

DRAIN_TIMEOUT_S: Final = 2.0
"""For the last replies to be sent."""

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
    # The threads that take samples must not keep the loop from a signal that is due.
    sys.setswitchinterval(0.001)
    journal = open_journal()
    try:
        with _traces(arguments.trace_dir, journal) as traces:
            return asyncio.run(_run(configuration, arguments.bus, arguments.user, journal, traces))
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
    parser.add_argument("--check-config", action="store_true", help="check it and exit")
    parser.add_argument("--version", action="version", version=f"qkilld {__version__}")
    return parser.parse_args(arguments)


def _take_descriptors() -> None:
    """As many as we may: a guest that is held and looked at costs about a dozen."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
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


async def _run(
    configuration: Config,
    address: str | None,
    user: bool,
    journal: QueuedJournal,
    traces: TraceDirectory | None,
) -> int:
    from qkilld.adapters.clock import LoopClock
    from qkilld.adapters.evidence.sampler import EvidenceSampler
    from qkilld.adapters.host import LocalHost
    from qkilld.bus.announcer import Announcer
    from qkilld.bus.connection import connect
    from qkilld.bus.manager import ManagerObject, Tree
    from qkilld.bus.server import Server
    from qkilld.engine.registry import Registry
    from qkilld.engine.service import Service

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    connection = await connect(address, user=user)
    clock, sampler = LoopClock(), EvidenceSampler()
    registry = Registry(configuration, clock, journal, sampler=sampler, traces=traces)
    service = Service(configuration, LocalHost(), registry, clock, sampler)
    manager = ManagerObject(service)
    server = Server(
        connection,
        Tree(manager, service),
        on_fault=lambda doing, error: journal.write(events.internal_error(doing, error)),
    )
    manager.server = server
    registry.observer = Announcer(server)
    try:
        if not await connection.own(BUS_NAME):
            raise BusError(
                f"another process has the name {BUS_NAME} on this bus already: "
                "is qkilld running here? See `qkillctl status`"
            )
        where = "session bus" if user else f"bus at {address}" if address else "system bus"
        journal.write(events.daemon_started(__version__, where))
        _notify("READY=1")
        lost = asyncio.create_task(connection.wait_closed())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((lost, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            journal.write(events.bus_lost(registry.running))
            registry.when_idle(stop.set)
            await stopped
            code = ExitCode.FAILURE
        else:
            code = ExitCode.OK
        _notify("STOPPING=1")
        journal.write(events.daemon_stopping(registry.running))
        registry.cancel_all()
        await server.drain(DRAIN_TIMEOUT_S)
        await connection.flush()
        lost.cancel()
        return code
    finally:
        sampler.close()
        connection.close()


def _notify(state: str) -> None:
    """Tell the service manager, sd_notify(3)."""
    if "NOTIFY_SOCKET" in os.environ:
        from systemd import daemon

        daemon.notify(state)


if __name__ == "__main__":
    sys.exit(main())
