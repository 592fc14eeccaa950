"""In which units qkilld-stop runs, by the command lines of their processes."""

from __future__ import annotations

import pytest

from qkilld.unitcheck.command import runs_helper


@pytest.mark.parametrize(
    ("command_line", "runs"),
    [
        ("/usr/bin/python3 -I /usr/bin/qkilld-stop --force", True),
        ("python3.13 -IB /usr/bin/qkilld-stop", True),
        ("/usr/bin/python3 -m qkilld.stop", True),
        ("/usr/bin/python3 /usr/bin/qkilld-stop --reason $'it\\'s late'", True),
        ("qkilld-stop", True),
        ('sh -c "qkilld-stop; cp /srv/a /srv/b"', False),
        ('sh -c "python3 -m qkilld.stop && cp /srv/a /srv/b"', False),
        ("cp /srv/qkilld-stop /srv/b", False),
        ("/usr/bin/qemu-system-x86_64 -name qkilld-stop", False),
        ("[qkilld-stop]", False),
        ("", False),
    ],
)
def test_what_runs_qkilld_stop(command_line: str, runs: bool) -> None:
    assert runs_helper(command_line) is runs
