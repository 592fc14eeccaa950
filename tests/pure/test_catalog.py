"""The journal's catalogue explains every MESSAGE_ID of the code, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from qkilld.model.event import MessageId
from tests.lab import needs
from tests.lab.process import run

CATALOG = Path(__file__).parents[2] / "packaging" / "qkilld.catalog"


def test_every_message_is_explained() -> None:
    entries = re.findall(r"^# ([A-Z_]+)\n-- ([0-9a-f]{32})\nSubject: \S", CATALOG.read_text(), re.M)
    assert entries == [(message.name, message.value) for message in MessageId]


def test_systemd_can_compile_it(tmp_path: Path) -> None:
    journalctl = str(needs.program("journalctl", "systemd"))
    directory = tmp_path / "usr/lib/systemd/catalog"
    directory.mkdir(parents=True)
    (directory / "qkilld.catalog").write_text(CATALOG.read_text())
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    done = run([journalctl, "--root", tmp_path, "--update-catalog"])
    assert (done.returncode, done.stderr) == (0, "")
    listed = run([journalctl, "--root", tmp_path, "--dump-catalog"]).stdout
    for message in MessageId:
        assert message.value in listed
