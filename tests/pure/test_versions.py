"""The version number, in every file that contains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qkilld import __version__

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("packaging/debian/changelog", r"\Aqkilld \(([\d.]+)-"),
        ("packaging/rpm/qkilld.spec", r"^Version: +(\S+)$"),
        ("packaging/arch/PKGBUILD", r"^pkgver=(\S+)$"),
        ("packaging/nix/package.nix", r'^  version = "(.*)";$'),
        ("NEWS.md", r"\A# NEWS\n\n## ([\d.]+)"),
    ],
)
def test_they_agree(path: str, pattern: str) -> None:
    found = re.search(pattern, (TOP / path).read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == __version__
