"""The daemon qkilld. Imports are most of its start, so this module has next to none."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    # Imports produce no garbage; looking for it took 5 ms. The event loop enables it again.
    gc.disable()
    from qkilld.daemon_options import parse
    from qkilld.startup import run

    return run(parse(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
