"""Run when qkilld is removed: delete the drop-ins of adopt from system units.

Unlike `qkillctl adopt --undo --all`, this program works in a chroot, and does not stop guards of
scopes. The caller must reload systemd. Edited drop-ins are kept, and their paths are printed. Once
qkilld-stop is gone, systemd uses SIGTERM to stop units whose drop-ins were kept. Users must remove
the drop-ins of their user managers themselves.

While qkilld-stop stops a guest in a system unit, nothing is removed: qkilld-stop would lose its
extended timeout, and the modules that it has not yet imported. If the stop takes longer than 30 s,
the exit code is 4, and the package must not be removed. Stops in units of user managers are not
noticed. With --now, for package managers that remove the package anyway, this program does not
wait.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Final

from qkilld.bus.connection import connect
from qkilld.bus.systemd import Systemd
from qkilld.ctl.dropin_file import all_drop_ins
from qkilld.ctl.running_stops import StopsRunning, wait_for_stops
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
    parser.add_argument("--now", action="store_true", help="do not wait for running stops")
    arguments = parser.parse_args()
    root = arguments.root
    code = ExitCode.OK
    if not arguments.now and root == Path("/") and Path("/run/systemd/system").is_dir():
        try:
            asyncio.run(_wait_for_stops())
        except StopsRunning as error:
            print(f"qkilld cannot be removed now. {_text(error)}", file=sys.stderr)
            return error.exit_code
        except QkilldError as error:
            print(f"Cannot tell whether guests are being stopped: {_text(error)}", file=sys.stderr)
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


async def _wait_for_stops() -> None:
    connection = await connect()
    try:
        advice = (
            "Try again when they have ended, or end them with `systemctl kill UNIT`, which sends"
            " SIGTERM to the guest"
        )
        await wait_for_stops(Systemd(connection), advice)
    finally:
        connection.close()


def _text(value: object) -> str:
    return printable(str(value), _SHOWN)


if __name__ == "__main__":
    sys.exit(main())
