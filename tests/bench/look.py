"""A program that takes samples with the qkilld in PYTHONPATH. This may be an earlier qkilld.

Each line of stdin is a process id. The program samples that process, computes the verdict, and
prints the µs of processor time.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any


def main() -> int:
    reader_of, assess = _import_functions()
    readers: dict[int, Any] = {}
    known: dict[int, Any] = {}
    for line in sys.stdin:
        pid = int(line)
        began = time.thread_time_ns()
        if pid not in readers:
            readers[pid] = reader_of(pid)
        known[pid] = assess(known.get(pid), readers[pid].read())
        print((time.thread_time_ns() - began) / 1000, flush=True)
    return 0


def _import_functions() -> tuple[Any, Any]:
    """Return the functions that make readers and compute verdicts. In the earlier tree, they are in
    other modules."""
    try:
        sampler = import_module("qkilld.evidence.sampler")
        assess = import_module("qkilld.decision.verdict").assess
        tables = sampler.HostTables
    except ImportError:
        sampler = import_module("qkilld.adapters.evidence.sampler")
        assess = import_module("qkilld.judgement.verdict").assess
        tables = sampler.Tables
    return lambda pid: sampler.Reader(pid, tables()), assess


if __name__ == "__main__":
    sys.exit(main())
