"""Gathers what jobs log through `logging`, each line with the job in whose context it was logged."""

from __future__ import annotations

import logging
from collections.abc import Callable

from conveyor.jobs.context import CURRENT, log_of
from conveyor.payload.failures import shorten

LINE_BYTES = 4 * 1024
"""Bytes of one line that are kept; a longer one loses its middle."""
_FORMATTER = logging.Formatter()


class JobLogHandler(logging.Handler):
    """Adds each record that a job logs to the log of that job: the one whose context is current where it is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        """Add *record*; where no other handler would have shown it, do what `logging` does then."""
        source = CURRENT.get()
        if source is not None and (log := log_of(source)) is not None:
            try:
                text = _FORMATTER.format(record)
            except Exception as error:  # the arguments are objects of the job
                text = f"{record.msg!s} (cannot be formatted: {type(error).__name__})"
            log.add([(int(record.created * 1000), record.levelname, record.name, shorten(text, LINE_BYTES))])
        fallback = logging.lastResort
        if fallback is not None and record.levelno >= fallback.level and not _is_handled(record.name):
            fallback.handle(record)


def _is_handled(name: str) -> bool:
    """Tell whether a logger, or one above it, has a handler other than this one."""
    at: logging.Logger | None = logging.getLogger(name)
    while at is not None:
        if any(not isinstance(handler, JobLogHandler) for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


_installed = 0
_HANDLER = JobLogHandler()


def keep_logs() -> Callable[[], None]:
    """Have the lines of jobs gathered from now on; return what ends that. Workers of one process share one handler."""
    global _installed  # noqa: PLW0603
    _installed += 1
    logging.getLogger().addHandler(_HANDLER)

    def end() -> None:
        global _installed  # noqa: PLW0603
        _installed -= 1
        if _installed == 0:
            logging.getLogger().removeHandler(_HANDLER)

    return end
