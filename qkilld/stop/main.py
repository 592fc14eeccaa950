"""qkilld-stop: its way from the command line to the exit code.

Imports little at first: systemd's clock runs, and a unit may give it a second.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from qkilld.stop.notify import Notifier
from qkilld.stop.options import Options


def main() -> NoReturn:
    options = Options()
    if sys.argv[1:]:
        from qkilld.stop.arguments import parse

        options = parse(sys.argv[1:])
    notifier = Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    if not options.dry_run:
        from qkilld.stop.limits import FIRST

        notifier.extend(FIRST)
    # Collecting garbage costs 7 ms of the imports, which make none; TLS, which asyncio does without
    # where there is none, 5 ms.
    gc.disable()
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    code = _main(options, notifier)
    sys.stdout.flush()
    # systemd waits for the end of the process, which for the interpreter's own order takes 10 ms.
    os._exit(code)


def _main(options: Options, notifier: Notifier) -> int:
    import asyncio
    import logging

    from qkilld.model.errors import NoSuchProcess, QkilldError
    from qkilld.model.words import ExitCode
    from qkilld.stop.log import Log, say
    from qkilld.stop.stopping import Stopping

    # dbus_next logs what concerns only its maintainers, tracebacks among it.
    logging.getLogger().addHandler(logging.NullHandler())
    log = Log()
    try:
        gc.enable()
        stopping = Stopping(options, notifier, log)
        return asyncio.run(stopping.rehearse() if options.dry_run else stopping.run())
    except NoSuchProcess as gone:
        say(f"there is nothing to stop: {gone}")
        return ExitCode.OK
    except QkilldError as error:
        say(str(error))
        return error.exit_code
    except Exception as error:
        from qkilld.engine.events import internal_error

        log.write(internal_error("stopping guests", error))
        return ExitCode.FAILURE
    finally:
        log.close()


if __name__ == "__main__":
    main()
