"""The command line of qkilld-stop."""

from __future__ import annotations

import pytest

from qkilld.stop.arguments import parse


@pytest.mark.parametrize(
    ("given", "unit"),
    [("web", "web.service"), ("web.service", "web.service"), ("run-1.scope", "run-1.scope")],
)
def test_the_suffix_of_a_unit_may_be_omitted(given: str, unit: str) -> None:
    assert parse(["--unit", given]).unit == unit
