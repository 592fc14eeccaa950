"""Connect the parts of the daemon, and run it."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from pathlib import Path

from qkilld import foreign_descriptors, log_setup
from qkilld.adapters import config, open_files, system_files
from qkilld.adapters.journal import QueuedJournal, open_journal
from qkilld.adapters.memlock import STACK_BYTES, share_heap
from qkilld.adapters.subordinate_uids import read_subordinate_uids
from qkilld.adapters.trace_file import TraceDirectory
from qkilld.daemon_options import DaemonOptions
from qkilld.engine import events
from qkilld.engine.fair_shares import set_subordinate_uids
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import ExitCode
from qkilld.model.errors import BusError, ConfigError


def run(options: DaemonOptions) -> int:
    """Run the daemon; return the exit code."""
    try:
        configuration = config.load(options.root)
    except ConfigError as error:
        print(
            f"qkilld: the configuration is wrong, so qkilld does not start:\n{error}",
            file=sys.stderr,
        )
        if not options.check_config:
            _refuse_calls(f"its configuration is wrong at {error.place}", options)
        return ExitCode.USAGE
    if options.check_config:
        print("The configuration is good.")
        return ExitCode.OK
    open_files.raise_limit()  # Each sampled guest needs about a dozen descriptors.
    threading.stack_size(STACK_BYTES)
    share_heap()
    foreign_descriptors.set_up()
    set_subordinate_uids(read_subordinate_uids())
    log_setup.set_up("qkilld", debug=options.debug)
    journal = open_journal()
    try:
        with _traces(options.trace_dir, journal) as traces:
            # Free the classes that model.dataclass has replaced, so that later imports can use
            # their memory. After gc.freeze() below, they could not be freed.
            gc.collect()
            # Imported late, so that errors in the configuration are reported sooner.
            import asyncio

            gc.freeze()
            from qkilld.lifecycle import live

            end = live(
                configuration,
                BusAddress(user=options.user, address=options.bus),
                journal,
                traces,
                varlink=options.varlink,
                exit_idle_s=options.exit_idle,
            )
            # lifecycle handles SIGINT. With SIG_DFL, asyncio installs no handler of its own, which
            # lifecycle would have to replace: that would import the module inspect.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            return asyncio.run(end)
    except ConfigError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        journal.close()
        _refuse_calls(str(error), options)
        return ExitCode.USAGE
    except BusError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        if not (options.user or options.bus) and (advice := system_files.advice(options.root)):
            print(f"qkilld: {advice}", file=sys.stderr)
        return ExitCode.FAILURE
    except ImportError as error:
        print(f"qkilld: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    finally:
        journal.close()


def _refuse_calls(why: str, options: DaemonOptions) -> None:
    """Does not return if systemd has started this process."""
    # Imported late, because it imports asyncio.
    from qkilld.failed_start import refuse_calls

    refuse_calls(why, BusAddress(user=options.user, address=options.bus))


def _traces(
    directory: Path | None, journal: QueuedJournal
) -> contextlib.AbstractContextManager[TraceDirectory | None]:
    """Open the directory for traces, if one is given. Raises ConfigError."""
    if directory is None:
        return contextlib.nullcontext()
    try:
        traces = TraceDirectory(directory, lambda text: journal.write(events.traces_failed(text)))
    except OSError as error:
        raise ConfigError(
            f"traces cannot be written to {directory}: {error.strerror}; "
            "--trace-dir must be a directory that exists and that qkilld may write to"
        ) from None
    return contextlib.closing(traces)
