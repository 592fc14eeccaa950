"""Compute how long systemd should wait for the helper. Pure; times are in µs unless noted. Imports
nothing, to start fast: see stop.main.

For the limits that the unit's own settings impose, see decision.unit_limits.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

USEC_PER_SEC = 1_000_000
FIRST = 10 * USEC_PER_SEC
"""The extension while no job is known. It is long enough to call the daemon and to receive a
refusal."""
NO_STATE = "Asking qkilld to stop the guest"
"""The status until a job has begun."""
STEP = 20 * USEC_PER_SEC
"""The longest extension before MARGIN is added. The helper sends an extension every second."""
MARGIN = 5 * USEC_PER_SEC
"""An extension ends this long after the time of the job's next step."""
ASK_ALL = 20 * 60 * USEC_PER_SEC
"""Time limit for asking all guests of a host. systemd limits a host shutdown to 30 minutes, and
qkilld-guests.service uses at most 25 of them."""
MAX_RESTARTS = 3
"""How many times to search for another QEMU of the unit after the guest has exited. systemd's own
signals stop any later QEMU."""
RESTART_S = 1.0
"""How long (s) to wait for a shell to start another QEMU."""


def extension(deadlines: Iterable[int], now: int) -> int:
    """Return the value of EXTEND_TIMEOUT_USEC= for running jobs with these deadlines.

    A deadline is the time of a job's next step, which follows from the job's policy. So the policy
    limits the extension.
    """
    longest = max((deadline - now for deadline in deadlines), default=0)
    return min(max(longest, 0), STEP) + MARGIN
