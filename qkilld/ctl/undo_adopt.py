"""Run when qkilld is removed: delete the drop-ins of adopt from system units.

Calls no service, so unlike `qkillctl adopt --undo --all` it works in a chroot, and stops no guards
of scopes. The caller must reload systemd. Edited drop-ins are kept, and their paths are printed.
Without qkilld-stop, systemd stops their units with SIGTERM. Drop-ins of user managers are left to
their users.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from qkilld.ctl.dropin_file import all_drop_ins
from qkilld.model.constants import ExitCode
from qkilld.model.errors import QkilldError
from qkilld.model.text import printable

_BASES: Final = ("etc/systemd/system", "run/systemd/system")
_SHOWN: Final = 4096


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="undo-adopt", description="Remove every drop-in of `qkillctl adopt`."
    )
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR")
    root = parser.parse_args().root
    code = ExitCode.OK
    # all_drop_ins() leaves out files of the same name that adopt did not write, such as those of
    # `make install UNITDIR=/etc/systemd/system`.
    for drop_in in (each for base in _BASES for each in all_drop_ins(root / base)):
        try:
            if drop_in.remove():
                print(f"Removed {_text(drop_in.path)}")
        except QkilldError as error:
            print(f"Left {_text(drop_in.path)}: {_text(error)}", file=sys.stderr)
            code = ExitCode.FAILURE
    return code


def _text(value: object) -> str:
    return printable(str(value), _SHOWN)


if __name__ == "__main__":
    sys.exit(main())
