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
    # The help text has "-dtb    file" in a column of its own, and lines that wrap after the name;
    # in QEMU 11 -M as well.
    assert alone - with_argument - {"dtb", "M"} <= NO_ARGUMENT
    # "-h or -help"; one space alone before what "-async-teardown" does.
    assert not (with_argument - alone - {"h", "async-teardown"}) & NO_ARGUMENT
