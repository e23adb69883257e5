"""Exit codes of commands, and the exit code for each error."""

from __future__ import annotations

import builtins
from enum import IntEnum

from conveyor import errors


class ExitCode(IntEnum):
    """The exit codes; docs/reference/cli.md explains them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    IMPORT = 4
    NOT_FOUND = 5
    REFUSED = 6
    JOB_FAILED = 7
    UNHEALTHY = 8
    TIMED_OUT = 124
    INTERRUPTED = 130


_BY_CODE = {
    "E08": ExitCode.IMPORT,
    "E09": ExitCode.IMPORT,
    "E10": ExitCode.REFUSED,
    "E17": ExitCode.REFUSED,
    "E35": ExitCode.REFUSED,
}
_BY_CLASS: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (errors.StoreUnavailable, ExitCode.UNREACHABLE),
    (errors.ConfigurationError, ExitCode.USAGE),
    (errors.PayloadError, ExitCode.USAGE),
    (errors.UnknownTask, ExitCode.NOT_FOUND),
    (errors.JobNotFound, ExitCode.NOT_FOUND),
    (errors.QueueNotFound, ExitCode.NOT_FOUND),
    (errors.ScheduleNotFound, ExitCode.NOT_FOUND),
    (errors.WorkerNotFound, ExitCode.NOT_FOUND),
    (errors.ResultExpired, ExitCode.NOT_FOUND),
    (errors.QueueFull, ExitCode.REFUSED),
    (errors.DurabilityNotReached, ExitCode.REFUSED),
    (errors.Duplicate, ExitCode.REFUSED),
    (errors.RateLimited, ExitCode.REFUSED),
    (errors.JobFailed, ExitCode.JOB_FAILED),
    (errors.JobCancelled, ExitCode.JOB_FAILED),
    (builtins.TimeoutError, ExitCode.TIMED_OUT),
)


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code of a command that raised *error*."""
    if isinstance(error, errors.ConveyorError) and error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next((code for kind, code in _BY_CLASS if isinstance(error, kind)), ExitCode.FAILED)
