"""Exit codes for the results of one or several jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qkilld.model.constants import ExitCode, Result
from qkilld.model.errors import BY_BUS_NAME

INTERRUPTED: Final = 128 + 2
"""The exit code that a shell reports if SIGINT has ended a program."""

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
"""The exit codes, from the worst to the best. If there are several targets, the worst code is used.
A guest that may still be running is worse than one that was killed."""

RESULT_EXIT_CODES: Final[dict[str, ExitCode]] = {
    Result.EXITED: ExitCode.OK,
    Result.SIGNALLED: ExitCode.OK,
    Result.KILLED: ExitCode.KILLED,
    Result.SURVIVED: ExitCode.SURVIVED,
    Result.CANCELLED: ExitCode.SURVIVED,
    Result.FAILED: ExitCode.FAILURE,
}


def exit_code_of(result: str, error_name: str = "") -> ExitCode:
    """Return the exit code for a job's result. A result that only a newer daemon knows counts as
    failure.

    `error_name`: `error-name` in the receipt, which decides the exit code of a failed job.
    """
    if result == Result.FAILED and (error := BY_BUS_NAME.get(error_name)) is not None:
        return error.exit_code
    return RESULT_EXIT_CODES.get(result, ExitCode.FAILURE)


def worst(codes: Sequence[int]) -> int:
    return min(codes, key=WORST_FIRST.index, default=ExitCode.OK)
