"""Reading the kernel's files about the thread of a virtual processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkilld.monitor.vcpu_threads import VcpuThreads, parse_load

SCHED = """CPU 0/TCG (412, #threads: 4)
-------------------------------------------------------------------
se.exec_start                                :       1930294.584718
se.avg.load_avg                              :                    7
se.avg.runnable_avg                          :                  512
se.avg.util_avg                              :                  151
policy                                       :                    0
prio                                         :                  120
"""
"""A shortened file of Linux 6.18."""


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (SCHED, 512),
        (SCHED.replace(":                    0", ":                    1"), None),
        (SCHED.replace("runnable_avg ", "runnable_load_avg "), None),
        (f"se.avg.runnable_avg : 0\n{SCHED}", 512),
        ("", None),
    ],
    ids=["fair", "real-time", "Linux 5.6", "name", "empty"],
)
def test_the_average_of_a_thread(text: str, load: int | None) -> None:
    assert parse_load(text) == load


def test_the_load_of_all_threads(tmp_path: Path) -> None:
    threads = VcpuThreads(tmp_path, (3, 4))
    for number, text in ((3, SCHED), (4, SCHED.replace("512", "1024"))):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "sched").write_text(text)
        (tmp_path / str(number) / "schedstat").write_text("3000000 1000000 9\n")
    assert (threads.load(), threads.times()) == (1.5, (6000, 2000))
    (tmp_path / "4" / "sched").unlink()
    (tmp_path / "4" / "schedstat").unlink()
    assert (threads.load(), threads.times()) == (None, (None, None))


def test_a_kernel_that_does_not_count(tmp_path: Path) -> None:
    """A kernel that does not count the times shows zeros. Zeros must not be taken for the times of
    a thread that did nothing."""
    (tmp_path / "3").mkdir()
    (tmp_path / "3/schedstat").write_text("0 0 0\n")
    assert VcpuThreads(tmp_path, (3,)).times() == (None, None)
