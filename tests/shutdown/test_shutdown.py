"""Short rows of the shutdown matrix, in qkilld's column."""

from __future__ import annotations

import pytest

from tests.shutdown.__main__ import ROWS, measure


@pytest.mark.timeout(300)
@pytest.mark.parametrize("row", ["healthy", "panicked", "eio", "backup", "halted", "continued"])
def test_the_row_is_as_expected(row: str) -> None:
    cell, expected = measure(row, "qkilld"), ROWS[row]
    assert cell["ended"] in expected.result
    assert cell["kept"] >= expected.kept
    assert cell["asked"] == expected.asked
    assert expected.note in (*cell["notes"], "")
    assert ("SIGCONT" in cell["rungs"]) is (row in ("halted", "continued"))
    assert set(expected.at_risk) <= set(cell["at_risk"])
    if not expected.at_risk:
        assert cell["at_risk"] == []
