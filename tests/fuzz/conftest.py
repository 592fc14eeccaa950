"""How much input Hypothesis makes. By default, it makes little, and always the same. With
--hypothesis-profile=fuzz, it makes much random input."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

# Set no deadline, because a test must not fail on a busy host. pytest's timeout ends an endless
# loop.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
# Shrinking a failing input may take minutes, so only `make fuzz` does it.
_QUICK = (Phase.explicit, Phase.generate)
settings.register_profile("short", max_examples=60, derandomize=True, phases=_QUICK, **_COMMON)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("QKILLD_FUZZ_EXAMPLES", "2000")), **_COMMON
)
settings.load_profile("short")
