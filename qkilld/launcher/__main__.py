"""Run a guest as `python -m qkilld.launcher NAME`."""

from __future__ import annotations

import sys

from qkilld.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
