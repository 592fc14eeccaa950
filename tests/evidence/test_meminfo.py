"""The reader of /proc/meminfo reads a table of texts, and the file of this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkilld.evidence.meminfo import read_memory
from qkilld.model.sample import Memory


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("MemTotal: 9 kB\nDirty:      3 kB\nWriteback:    4 kB\n", Memory(3072, 4096)),
        ("Dirty: 1 kB\nWriteback: 2 kB\nWritebackTmp: 4 kB\n", Memory(1024, 6144)),
        ("Dirty: 1 kB\nWriteback: 2 kB\nNFS_Unstable: 8 kB\n", Memory(1024, 10240)),
        ("Dirty: 1 kB\nWritebackTmp: 4 kB\n", None),
        ("Dirty: x kB\nWriteback: 4 kB\n", None),
        ("Dirty:", None),
        ("", None),
    ],
)
def test_values_of_meminfo(lab_dir: Path, text: str, told: Memory | None) -> None:
    (lab_dir / "meminfo").write_text(text)
    assert read_memory(lab_dir) == told


def test_a_missing_meminfo_is_unknown(lab_dir: Path) -> None:
    assert read_memory(lab_dir) is None


def test_for_real() -> None:
    memory = read_memory()
    assert memory is not None
    assert memory.dirty >= 0 and memory.writeback >= 0
