"""The parts that a job works with, and the callbacks through which it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from qkilld.model.dataclass import dataclass

if TYPE_CHECKING:
    from qkilld.engine.ports import (
        Clock,
        Journal,
        Monitors,
        Process,
        Sampler,
        ServerExits,
        Traces,
    )

J = TypeVar("J")
"""The class of the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collaborators(Generic[J]):
    clock: Clock
    journal: Journal
    sampler: Sampler | None
    """If None, every sample is empty."""
    monitors: Monitors | None
    """If None, guests cannot be asked."""
    traces: Traces | None
    executables: tuple[str, ...]
    """Globs of QEMU executables."""
    may_yank: Callable[[str | None], bool]
    """Returns Yank= for the guest with this name: whether dead storage may be cut off."""
    load: Callable[[], int]
    """Returns the number of running jobs."""
    when_saved: Callable[[Callable[[], None]], None]
    """Calls back when all changes so far are saved, or saving has failed."""
    on_change: Callable[[J], None]
    on_sample: Callable[[J], None]
    """Called instead of `on_change` after a sample that changed nothing worth reporting."""
    on_end: Callable[[J], None]
    on_survivor_exit: Callable[[J], None]
    on_monitor: Callable[[J, int | None], None]
    """Called when a job has opened its guest's monitor, or lost it. The number is the descriptor of
    the connection if systemd should keep a copy for the next daemon. If the number is None, systemd
    must drop its copy: QEMU serves no other client while a copy is open."""
    server_exits: Callable[[Process], ServerExits] | None
    """If None, the servers of network disks are not watched."""
    stopping: Callable[[frozenset[int]], frozenset[int]]
    """Returns which of these processes are being stopped by a job (server_watch.is_stopping)."""
    write_down: Callable[[J, Callable[[], None]], None]
    """Saves the job. Calls back when the job is saved, or if saving takes too long."""
