"""Filters of jobs, and the walks through a queue that scripts make in bounded steps (lib/walk.lua)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.ids import tag_text
from conveyor.payload.records import Status

LIVE: tuple[Status, ...] = ("leased", "ready", "waiting", "scheduled", "dead")
"""The states in which Redis keeps a job whole."""
UNLIMITED = 1_000_000_000
"""More jobs than one step of a walk finds."""


class JobFilter(msgspec.Struct, frozen=True):
    """
    A choice of jobs.

    *task*: of this task. *error*: whose last error, as "class: message", holds this text, in whatever case. *since*, *older*: whose
    state began not before, or not after: they died, ended, or were leased then, else were enqueued then. A job whose id its caller
    chose does not tell when it was enqueued, and has no such time. *tag*: with this tag. Raises ConfigurationError for an instant
    without a time zone, and for a text that no tag has.
    """

    task: str | None = None
    error: str | None = None
    since: datetime | None = None
    older: datetime | None = None
    tag: str | None = None

    def __post_init__(self) -> None:
        for name, at in (("since", self.since), ("older", self.older)):
            if at is not None and (not isinstance(at, datetime) or at.utcoffset() is None):
                raise ConfigurationError(f"{name}= needs a time zone: use datetime.now(UTC) or tzinfo=ZoneInfo(…)")
        if self.tag is not None:
            tag_text(self.tag)
        for name, text in (("task", self.task), ("error", self.error)):
            if text is not None and (not isinstance(text, str) or not text):
                raise ConfigurationError(f"{name}= takes a text that is not empty, not {text!r}.")

    @property
    def needs_heads(self) -> bool:
        """Whether more than the task counts, so that heads of jobs are read to choose among them."""
        return self.error is not None or self.since is not None or self.older is not None

    @property
    def is_empty(self) -> bool:
        """Whether it chooses every job."""
        return self == JobFilter()

    def accepts(self, since: datetime | None, error: str | None) -> bool:
        """Tell whether a job of the wanted task is wanted: *since* when its state lasts, and its last error."""
        if not self.accepts_error(error):
            return False
        if self.since is None and self.older is None:
            return True
        if since is None:
            return False
        return (self.since is None or since >= self.since) and (self.older is None or since <= self.older)

    def accepts_error(self, error: str | None) -> bool:
        """Tell whether a job with this last error is wanted as far as that counts."""
        return self.error is None or (error is not None and self.error.casefold() in error.casefold())


ANY_JOB = JobFilter()


class Walk(msgspec.Struct, frozen=True):
    """
    A walk through the jobs of one queue or partition that *wanted* accepts and that are in one of *states* (none given: any).

    Each step begins where the *cursor* of the last one stands, and finds at most *most* jobs. *ids*: these alone, in one step.
    *ignores_error*: the error is not looked at, because what reads the reply looks at it.
    """

    wanted: JobFilter = ANY_JOB
    states: Collection[str] = ()
    cursor: str = ""
    most: int = UNLIMITED
    ids: Sequence[str] = ()
    ignores_error: bool = False

    @property
    def way(self) -> str:
        """The index that is walked through: the tag's where there is one, so that nothing else is looked at."""
        if self.ids:
            return "ids"
        if self.wanted.tag is not None:
            return "tag"
        [state] = self.states if len(self.states) == 1 else ["all"]
        return state if state in {"dead", "scheduled", "leased"} else "all"

    def arguments(self) -> tuple[str, ...]:
        """Return the arguments as lib/walk.lua reads them."""
        return (self.way, self.cursor, str(self.most), *self.filter(), *self.ids)

    def filter(self) -> tuple[str, ...]:
        """Return the part of the arguments that chooses."""
        wanted = self.wanted
        error = "" if wanted.error is None or self.ignores_error else wanted.error.casefold()
        since, older = _ms(wanted.since), _ms(wanted.older)
        return (wanted.tag or "", wanted.task or "", error, since, older, " ".join(self.states))


class WalkStep(msgspec.Struct, frozen=True):
    """
    The reply to one step: the time in ms by the server's clock, whether it was the last one, and how many jobs it looked at.

    *unsure*: ids of jobs that Redis cannot choose, since their errors have letters that it cannot compare in whatever case.
    """

    now: int
    ended: bool
    cursor: str
    looked: int
    unsure: tuple[str, ...] = ()


def read_step(reply: list[Any]) -> WalkStep:
    """Read the head of a reply."""
    return WalkStep(
        int(reply[0]), reply[1] == 1, reply[2].decode(), int(reply[3]), tuple(one.decode() for one in reply[4])
    )


def _ms(at: datetime | None) -> str:
    return "" if at is None else str(round(at.timestamp() * 1000))
