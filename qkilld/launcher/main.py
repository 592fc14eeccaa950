"""Start the QEMU process of a named guest, in place of this process."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from qkilld.launcher.options import command, parse
from qkilld.model.constants import ExitCode
from qkilld.model.errors import ConfigError

DIRECTORY: Final = Path("/etc/qkilld/guests")
MAX_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9:_\\@-][A-Za-z0-9:_.\\@-]{0,200}")
"""The characters of unit names, systemd.unit(5). A leading dot is not allowed, because it would
hide the guest's file."""


def main() -> int:
    """Execute QEMU in this process. Return an exit code if that fails."""
    if len(sys.argv) != 2 or not _NAME.fullmatch(sys.argv[1]):
        print("usage: qemu-guest NAME, for qemu-guest@NAME.service", file=sys.stderr)
        return ExitCode.USAGE
    name = sys.argv[1]
    path = DIRECTORY / f"{name}.conf"
    # systemd sets the variable from RuntimeDirectory= of the unit. If a drop-in adds directories,
    # ours is the first.
    runtime = os.environ.get("RUNTIME_DIRECTORY", f"/run/qemu-guest/{name}").partition(":")[0]
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: is it the right file?")
        argv = command(
            parse(os.fsdecode(content), str(path)),
            name=name,
            machine=os.uname().machine,
            qmp=f"{runtime}/qmp",
            agent=f"{runtime}/agent",
        )
    except OSError as error:
        print(f"qemu-guest: {path}: {error.strerror}", file=sys.stderr)
        return ExitCode.USAGE
    except ConfigError as error:
        print(f"qemu-guest: {error}", file=sys.stderr)
        return ExitCode.USAGE
    try:
        os.execv(argv[0], argv)
    except OSError as error:
        print(f"qemu-guest: {argv[0]}: {error.strerror}", file=sys.stderr)
    return ExitCode.FAILURE


if __name__ == "__main__":
    sys.exit(main())
