"""An earlier qkilld, measured in the same run as this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import TOP
from tests.lab.scratch import scratch

COMMIT: Final = "b662140"
"""The last commit before waits and witnesses, which make a sample read more."""
OURS: Final = "qkilld"
"""The name of this tree in dictionaries with both."""


@contextlib.contextmanager
def trees() -> Iterator[tuple[dict[str, Path], list[str]]]:
    """The trees of this commit and of COMMIT, by name, and notes that say why one is missing."""
    found, notes = {OURS: TOP}, []
    with scratch("t") as directory:
        try:
            _extract(directory)
            found[COMMIT] = directory
        except needs.Missing as missing:
            notes.append(f"{COMMIT} is not measured: {missing}")
        yield found, notes


def environment_of(tree: Path, bytecode: Path) -> dict[str, str]:
    """Makes Python import qkilld from that tree, with bytecode as if installed."""
    return {
        "PYTHONPATH": str(tree),
        "PYTHONPYCACHEPREFIX": str(bytecode / tree.name),
        "PYTHONDONTWRITEBYTECODE": "",
    }


def _extract(directory: Path) -> None:
    git = needs.program("git", "git")
    command = [
        str(git),
        "-c",
        f"safe.directory={TOP}",
        "-C",
        str(TOP),
        "archive",
        "--format=tar",
        COMMIT,
    ]
    # Without the user's configuration.
    done = subprocess.run(command, capture_output=True, env=os.environ | {"HOME": str(directory)})
    if done.returncode != 0:
        raise needs.Missing(f"this is no clone with that commit ({done.stderr.decode().strip()})")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(directory)  # of our own repository
