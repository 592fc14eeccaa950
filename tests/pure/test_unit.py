"""What can be told of a unit from what systemd says of it."""

from __future__ import annotations

import pytest

from qkilld.model.unit import Command, UnitFacts

STOP = (Command("/usr/bin/podman", ("podman", "stop", "web")),)


@pytest.mark.parametrize(
    "facts, cares",
    [
        (UnitFacts("web.service", exec_stop=STOP), True),
        (UnitFacts("web.service"), False),
        (UnitFacts("user@1000.service", exec_stop=STOP), False),
        (UnitFacts("machine-qemu\\x2d1\\x2dweb.scope"), False),
    ],
)
def test_who_takes_care_of_the_guests_in_it(facts: UnitFacts, cares: bool) -> None:
    assert facts.cares_for_guests is cares
