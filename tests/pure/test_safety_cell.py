"""The safety matrix: attempts in which the storage of a row did not behave as described."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.safety import cell
from tests.safety.cases import CASES, Case, StorageMismatch
from tests.safety.cell import ATTEMPTS, Cell
from tests.safety.outcome import Outcome
from tests.safety.policies import COLUMNS, Column

CASE, COLUMN = CASES["queue-threads"], COLUMNS["wchar"]
GOOD = Cell(CASE.name, COLUMN.name, 90, 0, 0, Outcome("exited", 18.5), wrong=[])


@pytest.mark.parametrize("bad", range(ATTEMPTS + 1))
def test_it_is_measured_again_and_not_for_ever(
    bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0

    def measure(case: Case, column: Column, traces: Path | None) -> Cell:
        nonlocal attempts
        attempts += 1
        (tmp_path / f"{attempts}.jsonl").touch()
        if attempts <= bad:
            raise StorageMismatch("the disk took 0 bytes in 2 s")
        return GOOD

    monkeypatch.setattr(cell, "_measure", measure)
    if bad >= ATTEMPTS:
        with pytest.raises(StorageMismatch):
            cell.measure(CASE, COLUMN, tmp_path)
        assert attempts == ATTEMPTS
    else:
        assert cell.measure(CASE, COLUMN, tmp_path) is GOOD
        # The trace of an earlier attempt is removed.
        assert [path.name for path in tmp_path.iterdir()] == [f"{bad + 1}.jsonl"]
