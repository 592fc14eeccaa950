"""Locked memory: files are read at once, and unused pages take no memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import TOP

_MB: Final = 1 << 20
_PROGRAM: Final = """
import mmap, re, sys, threading, time
from pathlib import Path
from qkilld.adapters.memlock import MemoryLock

unused = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
with open(sys.argv[1], "rb") as file:
    image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
problems = []
lock = MemoryLock(problems.append)
lock.set(True)
for thread in threading.enumerate():
    if thread.name == "memory":
        thread.join()
status = Path("/proc/self/status").read_text()
maps = Path("/proc/self/smaps").read_text()
read = re.search(re.escape(sys.argv[1]) + r"\\n(?:.*\\n)*?Rss: +(\\d+)", maps)[1]
locked = re.search(re.escape(sys.argv[1]) + r"\\n(?:.*\\n)*?Locked: +(\\d+)", maps)[1]
print(*re.findall(r"^Vm(?:RSS|Lck):\\s+(\\d+)", status, re.M), read, locked, *problems)
"""


def test_only_used_memory_is_locked(tmp_path: Path) -> None:
    needs.root("to lock memory without a limit")
    file = tmp_path / "file"
    file.write_bytes(b"x" * (4 * _MB))
    command = [sys.executable, "-c", _PROGRAM, str(file)]
    result = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60)
    locked, resident, read, locked_of_file = map(int, result.stdout.split())
    assert locked * 1024 > 64 * _MB  # Pages that are used later will be locked, too.
    assert resident * 1024 < 48 * _MB
    assert read * 1024 == locked_of_file * 1024 == 4 * _MB
