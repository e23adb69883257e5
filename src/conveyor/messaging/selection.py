"""Actions on all jobs that a filter chooses: walks in which Redis chooses and acts, in bounded steps."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from conveyor.errors import ConfigurationError
from conveyor.ids import public
from conveyor.messaging.maintenance import note_kept
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.inspection import JobRow
from conveyor.store.job_filter import UNLIMITED, JobFilter, Walk, WalkStep
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call
from conveyor.units import Duration, instant, milliseconds

R = TypeVar("R")
ActionName = Literal["cancel", "delete", "redrive", "promote"]
ACTED_ON: dict[ActionName, tuple[str, ...]] = {
    "cancel": ("ready", "waiting", "scheduled", "leased"), "delete": ("ready", "waiting", "scheduled", "dead"),
    "redrive": ("dead",), "promote": ("scheduled",),
}  # fmt: skip
"""The states of the jobs that an action is for."""
_RATE = re.compile(r"(\d{1,9})/(\d*[a-z]+)")
_IDS_AT_A_TIME = 100
_PACE_STEP = 0.1
"""Seconds between two steps at a rate, unless one job takes longer."""


class Acted(NamedTuple):
    """The end of an action on one job that was chosen. `id` is the public one; `detail` is for people."""

    id: str
    outcome: Literal["retried", "cancelled", "asked", "deleted", "refused"]
    detail: str = ""


Sleep: TypeAlias = Callable[[float], bool | None]
"""Waits for so many seconds, such as `time.sleep`, or `threading.Event.wait`, which returns True once it is set."""


class Pace:
    """A rate at which an action goes on: jobs and duration as in ``"100/s"``, None for no limit. Raises ConfigurationError."""

    def __init__(self, rate: str | None) -> None:
        self._seconds = 0.0 if rate is None else _seconds_each(rate)
        self.most = UNLIMITED if rate is None else max(1, round(_PACE_STEP / self._seconds))
        """Jobs of one step."""
        self._next = 0.0

    def pause(self) -> float:
        """Return the seconds until the next step may be made."""
        return max(0.0, self._next - time.monotonic())

    def note(self, acted: Iterable[Acted]) -> int:
        """Note what a step has done; return on how many jobs it has acted."""
        count = sum(one.outcome != "refused" for one in acted)
        self._next = max(self._next, time.monotonic()) + count * self._seconds
        return count


def _seconds_each(rate: object) -> float:
    match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is not None and int(match[1]):
        per = match[2] if match[2][0].isdigit() else f"1{match[2]}"
        if ms := milliseconds(per, name="rate"):
            return ms / 1000 / int(match[1])
    raise ConfigurationError(
        f'rate takes jobs and a duration, such as "100/s" or "5/m", not {rate!r}. Nothing was done.'
    )


class JobWalk(msgspec.Struct, Generic[R]):
    """
    A walk through the jobs of one queue or partition that *wanted* accepts, in one of *states*.

    `next_call` returns its steps one by one; each yields what was found. *read_error* reads the last error of a job where Redis
    cannot compare it: of those jobs the heads are read first, and then the step is made for the ids that are wanted. *sealed*:
    that is so of every job.
    """

    keys: QueueKeys
    wanted: JobFilter
    states: Collection[str]
    step: Callable[[QueueKeys, Walk], Call[tuple[WalkStep, list[R]]]]
    read_error: Callable[[JobRow], str | None]
    sealed: bool = False
    cursor: str = ""
    ended: bool = False
    looked: int = 0
    """Jobs that were looked at."""
    unsure: tuple[str, ...] = ()
    """Ids of which the error is to be read."""
    pending: tuple[str, ...] = ()
    """Ids that were found, and wait for their step."""

    def next_call(self, most: int = UNLIMITED) -> Call[list[R]] | None:
        """Return the next step, for at most *most* jobs; None at the end."""
        if self.pending:
            ids = self.pending[: min(most, _IDS_AT_A_TIME)]
            self.pending = self.pending[len(ids) :]
            return self.step(self.keys, Walk(ids=ids)).then(lambda found: found[1])
        if self.unsure:
            ids = self.unsure[:_IDS_AT_A_TIME]
            self.unsure = self.unsure[len(ids) :]
            return inspection.find_jobs(self.keys, Walk(ids=ids)).then(lambda found: self._sift(found.rows))
        if self.ended:
            return None
        ignores = self.sealed and self.wanted.error is not None
        walk = Walk(self.wanted, self.states, self.cursor, most, ignores_error=ignores)
        if ignores:
            return inspection.find_jobs(self.keys, walk).then(
                lambda found: self._went(found.step, self._sift(found.rows))
            )
        return self.step(self.keys, walk).then(lambda found: self._went(found[0], found[1]))

    def _went(self, step: WalkStep, found: list[R]) -> list[R]:
        self.cursor, self.ended, self.unsure = step.cursor, step.ended, step.unsure
        self.looked += step.looked
        if "dead" in self.states and self.wanted.older is None and self.wanted.tag is None:
            # Those that die while it goes on stay: a dead letter that was put back is not put back twice.
            self.wanted = replace(self.wanted, older=instant(step.now))
        return found

    def _sift(self, rows: Iterable[JobRow]) -> list[R]:
        self.pending = tuple(row.id for row in rows if self.wanted.accepts_error(self.read_error(row)))
        return []


def acted_states(action: ActionName, states: Collection[str]) -> Collection[str]:
    """Return the states whose jobs *action* is carried out on: *states*, none: all that it is for. Raises ConfigurationError."""
    if action not in tuple(ACTED_ON):
        raise ConfigurationError(f"action must be one of {', '.join(ACTED_ON)}, not {action!r}. Nothing was done.")
    possible = ACTED_ON[action]
    for state in states:
        if state not in possible:
            raise ConfigurationError(
                f"Jobs that are {state} cannot be chosen here. Possible: {', '.join(possible)}. Nothing was done."
            )
    return states or possible


class Walks(msgspec.Struct, frozen=True):
    """Makes walks for one filter. *decoder* opens errors, *sealed* tells whether they are."""

    wanted: JobFilter
    decoder: RecordDecoder
    sealed: bool

    def acting(self, keys: QueueKeys, action: ActionName, states: Collection[str]) -> JobWalk[Acted]:
        """Return the walk that carries out *action* on the jobs in *states*, as `acted_states` returns them."""
        steps = {"cancel": _cancel, "delete": _delete, "redrive": _redrive, "promote": _promote}
        return self._walk(keys, states, steps[action])

    def finding(self, keys: QueueKeys, states: Collection[str]) -> JobWalk[JobRow]:
        """Return the walk that reads the heads of the jobs in *states* (none: in any)."""
        return self._walk(
            keys,
            states,
            lambda keys, walk: inspection.find_jobs(keys, walk).then(lambda found: (found.step, found.rows)),
        )

    def counting(self, keys: QueueKeys, states: Collection[str]) -> JobWalk[dict[str, int]]:
        """Return the walk that counts the jobs in *states* (none: in any), by state."""
        return self._walk(
            keys, states,
            lambda keys, walk: inspection.count_found(keys, walk).then(lambda found: (found[0], [found[1]])),
        )  # fmt: skip

    def _walk(
        self,
        keys: QueueKeys,
        states: Collection[str],
        step: Callable[[QueueKeys, Walk], Call[tuple[WalkStep, list[R]]]],
    ) -> JobWalk[R]:
        return JobWalk(
            keys, self.wanted, states, step, lambda row: last_error(row, keys.queue, self.decoder), self.sealed
        )


def steps_of(client: Client, walk: JobWalk[R]) -> Iterator[list[R]]:
    """Yield what each step of *walk* finds."""
    while (call := walk.next_call()) is not None:
        yield client.run(call)


async def asteps_of(client: Client, walk: JobWalk[R]) -> AsyncIterator[list[R]]:
    """Awaitable form of `steps_of`."""
    while (call := walk.next_call()) is not None:
        yield await client.arun(call)


def act(
    client: Client, walks: Iterable[JobWalk[Acted]], pace: Pace, limit: int | None = None, sleep: Sleep | None = None
) -> Iterator[list[Acted]]:
    """
    Carry out *walks* one after the other, on at most *limit* jobs; yield what became of the jobs of each step.

    *sleep*: waits for so many seconds between two steps, None: `time.sleep`; no further step is made once it returns True.
    """
    left = UNLIMITED if limit is None else limit
    for walk in walks:
        while left and (call := walk.next_call(min(pace.most, left))) is not None:
            if (sleep or time.sleep)(pace.pause()):
                return
            acted = client.run(call)
            left -= min(left, pace.note(acted))
            yield acted
        if not left:
            return


async def aact(
    client: Client, walks: Iterable[JobWalk[Acted]], pace: Pace, limit: int | None = None
) -> AsyncIterator[list[Acted]]:
    """Awaitable form of `act`."""
    left = UNLIMITED if limit is None else limit
    for walk in walks:
        while left and (call := walk.next_call(min(pace.most, left))) is not None:
            await asyncio.sleep(pace.pause())
            acted = await client.arun(call)
            left -= min(left, pace.note(acted))
            yield acted
        if not left:
            return


def last_error(row: JobRow, queue: str, decoder: RecordDecoder) -> str | None:
    """Return the last error of a job as "class: message", opened with the keys of *decoder*; None without one."""
    failures = row.state.failures_list()
    if not failures:
        return None
    failure = decoder.failure(failures[-1], queue, row.id)
    return f"{failure.type}: {failure.message}"


def _cancel(keys: QueueKeys, walk: Walk) -> Call[tuple[WalkStep, list[Acted]]]:
    def acted(id_: str, code: int) -> Acted:
        if code == operations.CANCEL_REMOVED:
            return Acted(public(keys.queue, id_), "cancelled")
        if code in {operations.CANCEL_ASKED, operations.CANCEL_RUNS}:
            return Acted(
                public(keys.queue, id_), "asked", "a worker holds it, and was asked not to start it or to stop it"
            )
        return Acted(public(keys.queue, id_), "refused", "it has ended")

    call = operations.cancel_some(keys, walk)
    return call.then(lambda reply: (reply.step, [acted(id_, code) for id_, code in reply.codes]))


def _delete(keys: QueueKeys, walk: Walk) -> Call[tuple[WalkStep, list[Acted]]]:
    def acted(id_: str, code: int) -> Acted:
        if code == operations.CANCEL_REMOVED:
            return Acted(public(keys.queue, id_), "deleted")
        why = "a worker has leased it; cancel it first" if code == operations.DELETE_LEASED else "it has ended"
        return Acted(public(keys.queue, id_), "refused", why)

    call = operations.cancel_some(keys, walk, delete=True)
    return call.then(lambda reply: (reply.step, [acted(id_, code) for id_, code in reply.codes]))


def _redrive(keys: QueueKeys, walk: Walk) -> Call[tuple[WalkStep, list[Acted]]]:
    def acted(moved: operations.Redriven) -> tuple[WalkStep, list[Acted]]:
        note_kept(keys, moved)
        detail = f"back in {keys.queue} with a new budget of attempts"
        done = [Acted(public(keys.queue, id_), "retried", detail) for id_ in moved.ids]
        return moved.step, done + [
            Acted(
                public(keys.queue, id_), "refused",
                f"job {public(keys.queue, holder)} holds its unique key now; retry it when that has ended",
            )
            for id_, holder in moved.kept
        ]  # fmt: skip

    return operations.redrive_some(keys, walk).then(acted)


def _promote(keys: QueueKeys, walk: Walk) -> Call[tuple[WalkStep, list[Acted]]]:
    detail = "starts now, not when it was due"
    return operations.promote_some(keys, walk).then(
        lambda reply: (reply.step, [Acted(public(keys.queue, id_), "retried", detail) for id_ in reply.ids])
    )


def since_instant(name: str, at: datetime | Duration | None) -> datetime | None:
    """Return the instant of an option: a datetime, or a duration, which is so long ago. Raises ConfigurationError."""
    if at is None or isinstance(at, datetime):
        return at
    return datetime.now(UTC) - timedelta(milliseconds=milliseconds(at, name=name))
