"""The options that choose jobs: by queue, state, tag, task, last error and time."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.completion import complete_queues, complete_tasks
from conveyor.errors import ConfigurationError
from conveyor.units import iso_timestamp, milliseconds

if TYPE_CHECKING:
    from conveyor.store.job_filter import JobFilter

STATES = ("leased", "ready", "waiting", "scheduled", "dead", "done")
_CLOCK = re.compile(r"\d{1,2}:\d{2}|\d{2}:\d{2}:\d{2}")
_WHEN = "a duration (2h, 1d), a local time (02:14) or an ISO 8601 instant"


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--tag``, ``--task``, ``--error``, ``--since``, ``--older``; the command gets a `JobFilter` as *wanted*, or None."""

    @click.option("--tag", metavar="TAG", help="Only jobs that have this tag.")
    @click.option("--task", metavar="TASK", shell_complete=complete_tasks, help="Only jobs of this task.")
    @click.option("--error", metavar="TEXT", help="Only jobs whose last error (class: message) holds this text.")
    @click.option(
        "--since",
        metavar="WHEN",
        help="Only jobs whose present state began at this time or later: 2h (ago), 02:14.",
    )
    @click.option(
        "--older", metavar="WHEN", help="Only jobs whose present state began before this time: 1d (ago), 02:14."
    )
    @functools.wraps(function)
    def command(
        *args: Any,
        tag: str | None,
        task: str | None,
        error: str | None,
        since: str | None,
        older: str | None,
        **options: Any,
    ) -> Any:
        wanted = None
        if any(one is not None for one in (tag, task, error, since, older)):
            wanted = _filter(tag, task, error, since, older)
        return function(*args, wanted=wanted, **options)

    return command


def selection_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--queue``, ``--state`` and those of `filter_options`; the command gets also *queue* and *state*."""
    function = filter_options(function)
    function = click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")(function)
    return click.option(
        "--queue", "queue", metavar="QUEUE", shell_complete=complete_queues, help="Only jobs of this queue."
    )(function)


def _filter(tag: str | None, task: str | None, error: str | None, since: str | None, older: str | None) -> JobFilter:
    from conveyor.store.job_filter import JobFilter

    if error is not None and not error:
        raise ConfigurationError("--error needs a text: '' would choose every job.")
    return JobFilter(task, error, instant("--since", since), instant("--older", older), tag)


def instant(name: str, text: str | None) -> datetime | None:
    """
    Return the instant that *text* names.

    It is a duration (so long ago), a local time (of the last 24 hours), or an ISO 8601 instant, local without a zone.
    """
    if text is None:
        return None
    now = datetime.now(UTC)
    try:
        if _CLOCK.fullmatch(text):
            at = datetime.combine(now.astimezone().date(), time.fromisoformat(text.zfill(5))).astimezone()
            return at if at <= now else at - timedelta(days=1)
        if "-" in text:
            return datetime.fromisoformat(text).astimezone()
        return now - timedelta(milliseconds=milliseconds(text, name=name))
    except (ValueError, OverflowError, ConfigurationError):
        raise ConfigurationError(f"{name} {text!r} is not {_WHEN}.") from None


def filter_text(state: str | None, wanted: JobFilter) -> str:
    """Return what options chose jobs by, as the filter language has it."""
    parts = {
        "state": state, "task": wanted.task, "tag": wanted.tag, "error": None if wanted.error is None else json.dumps(wanted.error),
        "since": None if wanted.since is None else iso_timestamp(wanted.since),
        "older": None if wanted.older is None else iso_timestamp(wanted.older),
    }  # fmt: skip
    return " ".join(f"{name}:{text}" for name, text in parts.items() if text)
