"""Which uids are subordinate uids of which user."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkilld.adapters.subordinate_uids import read_subordinate_uids

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
alice:x:1000:1000:,,,:/home/alice:/bin/bash
bob:x:1001:1001::/home/bob:/bin/sh
"""


@pytest.mark.parametrize(
    ("subuid", "expected"),
    [
        ("", []),
        ("alice:100000:65536\n", [(100_000, 165_535, 1000)]),
        ("1001:165536:10\nalice:200000:1", [(165_536, 165_545, 1001), (200_000, 200_000, 1000)]),
        # Two users of a directory service: one has two ranges, the other has one.
        (
            "carol:300000:5\ncarol:400000:5\ndave:500000:5",
            [(300_000, 300_004, -4), (400_000, 400_004, -4), (500_000, 500_004, -5)],
        ),
        # Ranges that belong to root, or that begin below the first subordinate uid, are left out.
        ("root:100000:65536\n0:200000:65536\nalice:0:100\nalice:65535:10\n", []),
        ("alice\nalice:x:y\nalice:-1:5\nalice:100000:65536:9\n#\n\udcff:1\n", []),
    ],
)
def test_ranges(lab_dir: Path, subuid: str, expected: list[tuple[int, int, int]]) -> None:
    (lab_dir / "passwd").write_text(PASSWD)
    (lab_dir / "subuid").write_text(subuid, errors="surrogateescape")
    assert read_subordinate_uids(lab_dir / "subuid", lab_dir / "passwd") == expected


def test_files_that_are_not_there(lab_dir: Path) -> None:
    assert read_subordinate_uids(lab_dir / "subuid", lab_dir / "passwd") == []
    (lab_dir / "subuid").write_text("1000:100000:65536\n")
    assert read_subordinate_uids(lab_dir / "subuid", lab_dir / "passwd") == [
        (100_000, 165_535, 1000)
    ]
