"""Exit codes: of a job's result, and of several targets made one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qkilld.model.words import ExitCode, Result

INTERRUPTED: Final = 128 + 2
"""What a shell makes of a program that SIGINT ended."""

WORST_FIRST: Final = (
    INTERRUPTED,
    ExitCode.FAILURE,
    ExitCode.SURVIVED,
    ExitCode.NOT_PERMITTED,
    ExitCode.NOT_QEMU,
    ExitCode.NOT_FOUND,
    ExitCode.USAGE,
    ExitCode.KILLED,
    ExitCode.UNSAFE,
    ExitCode.OK,
)
"""Of several targets the first of these counts: whatever may still be running comes before what is
gone at a price."""

RESULT_EXIT_CODES: Final[dict[str, ExitCode]] = {
    Result.EXITED: ExitCode.OK,
    Result.SIGNALLED: ExitCode.OK,
    Result.KILLED: ExitCode.KILLED,
    Result.SURVIVED: ExitCode.SURVIVED,
    Result.CANCELLED: ExitCode.SURVIVED,
    Result.FAILED: ExitCode.FAILURE,
}


def exit_code_of(result: str) -> ExitCode:
    """Of a job's result. One that only a newer daemon knows says nothing good."""
    return RESULT_EXIT_CODES.get(result, ExitCode.FAILURE)


def worst(codes: Sequence[int]) -> int:
    """The exit code that stands for all."""
    return min(codes, key=WORST_FIRST.index, default=ExitCode.OK)
