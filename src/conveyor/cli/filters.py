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
    from conveyor.admin.job_query import JobQuery

STATES = ("leased", "ready", "waiting", "scheduled", "dead", "done")
_CLOCK = re.compile(r"\d{1,2}:\d{2}|\d{2}:\d{2}:\d{2}")
_WHEN = "a duration (2h, 1d), a local time (02:14) or an ISO 8601 instant"


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--tag``, ``--task``, ``--error``, ``--since``, ``--older``; the command gets a `JobQuery` as *query*, or None."""

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
        queue: str | None = None,
        state: str | None = None,
        tag: str | None,
        task: str | None,
        error: str | None,
        since: str | None,
        older: str | None,
        **options: Any,
    ) -> Any:
        given = (queue, state, tag, task, error, since, older)
        return function(*args, query=None if given == (None,) * 7 else _query(*given), **options)

    return command


def selection_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--queue``, ``--state`` and those of `filter_options`; they are in the `JobQuery` too."""
    function = filter_options(function)
    function = click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")(function)
    return click.option(
        "--queue", "queue", metavar="QUEUE", shell_complete=complete_queues, help="Only jobs of this queue."
    )(function)


def _query(
    queue: str | None, state: str | None, tag: str | None, task: str | None, error: str | None, since: str | None,
    older: str | None,
) -> JobQuery:  # fmt: skip
    from conveyor.admin.job_query import JobQuery
    from conveyor.store.job_filter import JobFilter

    if error is not None and not error:
        raise ConfigurationError("--error needs a text: '' would choose every job.")
    wanted = JobFilter(task, error, instant("--since", since), instant("--older", older), tag)
    parts = {
        "task": task, "tag": tag, "error": error and json.dumps(error),
        "since": wanted.since and iso_timestamp(wanted.since), "older": wanted.older and iso_timestamp(wanted.older),
    }  # fmt: skip
    text = " ".join(f"{name}:{value}" for name, value in parts.items() if value)
    return JobQuery(text, queue, () if state is None else (state,), wanted)


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
