"""Options that take an argument, compared with the installed QEMU's help."""

from __future__ import annotations

import re

from qkilld.adapters.qemu_args import NO_ARGUMENT
from tests.lab import needs
from tests.lab.process import run


def test_the_options_without_an_argument() -> None:
    qemu = needs.program("qemu-system-x86_64", "qemu-system-x86")
    text = run([qemu, "-help"], check=True).stdout
    alone = set(re.findall(r"^--?([a-z][\w-]*)(?:  |\t| *$)", text, re.MULTILINE | re.IGNORECASE))
    with_argument = set(re.findall(r"^--?([a-z][\w-]*) \S", text, re.MULTILINE | re.IGNORECASE))
    assert {"daemonize", "S", "nodefaults", "no-shutdown"} <= alone
    # Leave out "dtb" and, for QEMU 11, "M": the help text puts their arguments into a separate
    # column or on the next line.
    assert alone - with_argument - {"dtb", "M"} <= NO_ARGUMENT
    # Leave out "h" ("-h or -help"), and "async-teardown", whose description follows after one
    # space.
    assert not (with_argument - alone - {"h", "async-teardown"}) & NO_ARGUMENT
