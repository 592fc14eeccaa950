"""`python -m qkilld` is the daemon."""

import sys

from qkilld.daemon import main

sys.exit(main())
