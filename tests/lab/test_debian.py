"""A Debian guest loses data if it is not asked to shut down, and keeps the data if it is asked."""

from __future__ import annotations

import signal
import time

import pytest

from tests.lab.debian import FILES, boot_debian
from tests.lab.qmp import Qmp

pytestmark = pytest.mark.timeout(600)


def test_sigterm_alone_loses_what_the_guest_holds() -> None:
    with boot_debian() as debian:
        debian.write_files()
        debian.guest.signal(signal.SIGTERM)
        assert debian.guest.wait_gone(60) == 0
        assert debian.kept() == (0, False)


def test_a_press_of_the_power_button_keeps_the_data() -> None:
    with boot_debian() as debian:
        debian.write_files()
        with Qmp(debian.guest) as qmp:
            qmp.call("system_powerdown")
        began = time.monotonic()
        assert debian.guest.wait_gone(300) == 0
        print(f"off {time.monotonic() - began:.1f} s after the press")
        assert debian.kept() == (FILES, True)


def test_the_shell_tells_of_what_fails() -> None:
    with boot_debian(qmp=False) as debian:
        assert debian.shell.run("cat /etc/hostname") == "lab\n"
        with pytest.raises(AssertionError, match="false"):
            debian.shell.run("false")
