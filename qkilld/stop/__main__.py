"""Run qkilld-stop as `python -m qkilld.stop`."""

from __future__ import annotations

from qkilld.stop.main import main

if __name__ == "__main__":
    main()
