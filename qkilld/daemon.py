"""The daemon qkilld. Most of its start time goes into imports, so this module imports almost
nothing."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    # Turn the garbage collector off. It would take 5 ms and find nothing, because imports produce
    # no garbage. lifecycle.live turns it on again.
    gc.disable()
    from qkilld.adapters import unused_modules

    unused_modules.set_up()
    from qkilld.daemon_options import parse
    from qkilld.startup import run

    try:
        options = parse(sys.argv[1:])
    except SystemExit as end:
        if end.code:
            from qkilld.failed_start import refuse_calls
            from qkilld.model.bus_address import BusAddress

            refuse_calls("its command line is wrong", BusAddress(user="--user" in sys.argv))
        raise
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
