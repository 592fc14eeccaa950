"""Read the processor time of a process. Source: Documentation/scheduler/sched-stats.rst."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessorUsage:
    """The processor usage of all threads of a process since each thread was started."""

    switches: int
    """Context switches, voluntary and involuntary."""
    processor_ms: float
    kept_waiting_ms: float
    """Time in which threads were ready to run, but other processes had the processors."""

    @classmethod
    def of(cls, pid: int) -> ProcessorUsage:
        """Read the usage of a process. Raises OSError if it does not exist."""
        switches, ran, waited = 0, 0, 0
        for thread in threads(pid):
            status = (thread / "status").read_text()
            switches += sum(map(int, re.findall(r"^\w+_ctxt_switches:\s+(\d+)$", status, re.M)))
            times = (thread / "schedstat").read_text().split()
            ran += int(times[0])
            waited += int(times[1])
        return cls(switches, ran / 1e6, waited / 1e6)

    def __sub__(self, earlier: ProcessorUsage) -> ProcessorUsage:
        return ProcessorUsage(
            self.switches - earlier.switches,
            self.processor_ms - earlier.processor_ms,
            self.kept_waiting_ms - earlier.kept_waiting_ms,
        )


def threads(pid: int) -> list[Path]:
    """Return the directories of a process's threads in /proc."""
    return list(Path(f"/proc/{pid}/task").iterdir())
