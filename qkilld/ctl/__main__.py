"""Run qkillctl as `python -m qkilld.ctl`."""

from __future__ import annotations

import sys

from qkilld.ctl.main import main

if __name__ == "__main__":
    sys.exit(main())
