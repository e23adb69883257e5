"""The log of a worker: lines on standard error through `logging`, under the name ``conveyor.worker``."""

from __future__ import annotations

import json
import logging
import os
import signal
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from conveyor.ids import clean_lines
from conveyor.jobs.context import CURRENT, Context
from conveyor.payload.failures import REPEAT_AFTER
from conveyor.units import iso_timestamp

LOG = logging.getLogger("conveyor.worker")
FORMATS = ("text", "json")
FORMAT_VARIABLE = "CONVEYOR_LOG_FORMAT"
"""The variable of the environment by which all processes of a worker know the format."""
_SIGNAL_HINTS = {
    "SIGKILL": " (the kernel does that when memory runs out)",
    "SIGSEGV": " (a fault in native code)",
    "SIGABRT": " (native code gave up)",
}
_logged_at: dict[str, float] = {}


def log_repeated_error(text: str, *arguments: Any) -> None:
    """Log an error of something that is retried every second: the same words once a minute."""
    words, now = text % arguments, monotonic()
    if now - _logged_at.get(words, -REPEAT_AFTER) < REPEAT_AFTER:
        return
    if len(_logged_at) >= 100:
        _logged_at.clear()
    _logged_at[words] = now
    LOG.error("%s", words)


class SafeFormatter(logging.Formatter):
    """A formatter that escapes control characters: a traceback may hold text from a payload, which could steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of *record* with control characters escaped; a line of `context.logger` names its job."""
        text = super().format(record)
        if record.name == "conveyor.job":
            facts = vars(record)
            about = f" [{facts.get('task')} {facts.get('job_id')} attempt {facts.get('attempt')}]"
            first, line, rest = text.partition("\n")
            text = f"{first}{about}{line}{rest}"
        return clean_lines(text).replace("\x1b", "\\x1b")


class JsonFormatter(logging.Formatter):
    """A formatter that writes a record as one line of JSON, with the job that runs where it was logged."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = iso_timestamp(datetime.fromtimestamp(record.created, UTC))
        line: dict[str, Any] = {
            "at": at, "level": record.levelname, "logger": record.name, "message": record.getMessage(), "pid": record.process,
        }  # fmt: skip
        facts = vars(record)
        source = CURRENT.get()
        if "job_id" in facts:
            line |= {name: facts.get(name) for name in _JOB}
        elif source is not None:
            context = source if isinstance(source, Context) else source.open()
            line |= {name: getattr(context, name) for name in _JOB}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


_JOB = ("job_id", "task", "queue", "attempt")


def configure_log(*, verbose: bool = False) -> None:
    """
    Log INFO and above (DEBUG with *verbose*) to standard error, unless the program has configured logging.

    The format is that of `FORMAT_VARIABLE`.
    """
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        text = SafeFormatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
        handler.setFormatter(JsonFormatter() if os.environ.get(FORMAT_VARIABLE) == "json" else text)
        handler.addFilter(_is_for_the_terminal)
        # INFO of the loggers of a program is kept with the job that logs it, and not shown.
        logging.basicConfig(handlers=[handler], level=logging.INFO)
    logger = logging.getLogger("conveyor")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "conveyor"


def describe_end(code: int) -> str:
    """Return in words how a process ended; *code* is its exit code, or minus the number of a signal."""
    if code >= 0:
        # A shell or a container tells so that what it ran was killed.
        meaning = f" (128 + {code - 128}: {_signal_name(code - 128)})" if 128 < code <= 128 + signal.SIGRTMIN else ""
        return f"exited with code {code}{meaning}"
    return f"was killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    """Return the name of a signal, with who sends it where that helps."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name}{_SIGNAL_HINTS.get(name, '')}"
