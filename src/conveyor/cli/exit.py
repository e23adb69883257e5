"""Exit codes, and which error ends with which."""

from __future__ import annotations

import builtins
from enum import IntEnum

from conveyor import errors


class Exit(IntEnum):
    """What the shell is told; docs/reference/cli.md lists them."""

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


_BY_CODE = {"E08": Exit.IMPORT, "E09": Exit.IMPORT, "E10": Exit.REFUSED, "E17": Exit.REFUSED, "E35": Exit.REFUSED}
_BY_CLASS: tuple[tuple[type[BaseException], Exit], ...] = (
    (errors.StoreUnavailable, Exit.UNREACHABLE),
    (errors.ConfigurationError, Exit.USAGE),
    (errors.PayloadError, Exit.USAGE),
    (errors.UnknownTask, Exit.NOT_FOUND),
    (errors.JobNotFound, Exit.NOT_FOUND),
    (errors.QueueNotFound, Exit.NOT_FOUND),
    (errors.ResultExpired, Exit.NOT_FOUND),
    (errors.QueueFull, Exit.REFUSED),
    (errors.DurabilityNotReached, Exit.REFUSED),
    (errors.Duplicate, Exit.REFUSED),
    (errors.RateLimited, Exit.REFUSED),
    (errors.JobFailed, Exit.JOB_FAILED),
    (errors.JobCancelled, Exit.JOB_FAILED),
    (builtins.TimeoutError, Exit.TIMED_OUT),
)


def exit_code(error: BaseException) -> Exit:
    """Return how a command ends that raised *error*."""
    if isinstance(error, errors.ConveyorError) and error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next((code for kind, code in _BY_CLASS if isinstance(error, kind)), Exit.FAILED)
