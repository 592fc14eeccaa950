"""qkilld-stop, from the command line to the exit code.

At shutdown, a host runs one qkilld-stop for each guest, all at the same time. Most runs let the
daemon stop an idle guest, and exit after 10 ms. So most of the cost is the start of Python. Such
runs import only small modules: not typing, dataclasses, asyncio or a D-Bus library. All other
modules are imported when needed (tests/pure/test_stop_imports.py).
"""

from __future__ import annotations

import gc
import os
import sys

from qkilld.stop.limits import FIRST
from qkilld.stop.notifier import Notifier
from qkilld.stop.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qkilld.stop.log import Log


def main() -> NoReturn:
    options = Options()
    if sys.argv[1:]:
        from qkilld.stop.arguments import parse

        options = parse(sys.argv[1:])
    notifier = Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    if not options.dry_run:
        notifier.extend(FIRST)
        _name_process()
    # Save time. Imports produce no garbage, but searching for it would take 7 ms. asyncio would
    # import ssl, which takes 5 ms and is not needed.
    gc.disable()
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    code = _main(options, notifier)
    if code and not options.dry_run:
        from qkilld.stop.log import say_failure

        say_failure(code)
    sys.stdout.flush()
    # systemd waits for the exit, so skip Python's orderly exit, which takes 10 ms.
    os._exit(code)


def _name_process() -> None:
    """Name this process qkilld-stop, however it was started. qkillctl searches for this name
    before it reloads systemd (ctl.running_stops)."""
    try:
        fd = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"qkilld-stop")
        finally:
            os.close(fd)
    except OSError as error:
        from qkilld.debug_log import note

        note("naming this process", error)


def _main(options: Options, notifier: Notifier) -> int:
    from qkilld.adapters import blockable
    from qkilld.stop.log import Log

    blockable.shared.may_block_caller = True
    if options.debug or "SYSTEMD_LOG_LEVEL" in os.environ:
        from qkilld import log_setup

        log_setup.set_up("qkilld-stop", debug=options.debug)
    log = Log()
    try:
        if options.dry_run:
            from qkilld.stop.rehearsal import rehearse

            return rehearse(options)
        from qkilld.stop.run import StopRun

        return StopRun(options, notifier, log).run()
    except Exception as error:
        return _failed(error, log)
    finally:
        log.close()


def _failed(error: Exception, log: Log) -> int:
    from qkilld.model.constants import ExitCode
    from qkilld.model.errors import NoSuchProcess, QkilldError
    from qkilld.stop.log import say

    if isinstance(error, NoSuchProcess):
        say(f"there is nothing to stop: {error}")
        return ExitCode.OK
    if isinstance(error, QkilldError):
        say(str(error))
        return error.exit_code
    from qkilld.engine.events import internal_error

    log.write(internal_error("stopping guests", error))
    return ExitCode.FAILURE


if __name__ == "__main__":
    main()
