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
"""The last commit in which the waits did not have separate signs of progress. Since then, each
sample reads more."""
OURS: Final = "qkilld"
"""The name of this tree in dictionaries that contain both."""


@contextlib.contextmanager
def trees() -> Iterator[tuple[dict[str, Path], list[str]]]:
    """Yield the source trees of this commit and of COMMIT by name, and notes that say why a tree is
    missing."""
    checkouts, notes = {OURS: TOP}, []
    with scratch("t") as directory:
        try:
            _extract(directory)
            checkouts[COMMIT] = directory
        except needs.Missing as missing:
            notes.append(f"{COMMIT} is not measured: {missing}")
        yield checkouts, notes


def environment_of(tree: Path, bytecode: Path) -> dict[str, str]:
    """Return variables that make Python import qkilld from `tree`, with cached bytecode."""
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
    # HOME hides the user's configuration of git.
    result = subprocess.run(command, capture_output=True, env=os.environ | {"HOME": str(directory)})
    if result.returncode != 0:
        reason = result.stderr.decode().strip()
        raise needs.Missing(f"this is not a git clone with commit {COMMIT} ({reason})")
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
        archive.extractall(directory)  # Safe: it is from our own repository.
