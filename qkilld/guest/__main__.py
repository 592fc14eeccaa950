"""Run a guest as `python -m qkilld.guest NAME`."""

from __future__ import annotations

import sys

from qkilld.guest.main import main

if __name__ == "__main__":
    sys.exit(main())
