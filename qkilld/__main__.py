"""Run the daemon as `python -m qkilld`."""

import sys

from qkilld.daemon import main

sys.exit(main())
