"""Why a job waits: the cause that the lease meets first, as a value with a sentence."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal

import msgspec
from msgspec.structs import replace

from conveyor.ids import clean, public
from conveyor.payload.records import Failure, Status
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store.inspection import JobRow, QueueFacts, WaitFacts
from conveyor.units import instant, instant_or_none, span

Cause = Literal[
    "queue-paused", "task-paused", "group-paused", "unknown-task", "label", "build", "no-worker", "limit", "group", "scheduled",
    "position", "buffer", "parent", "rerun", "running", "ended",
]  # fmt: skip


CRASHED = "crashed"
"""The type of the error of an attempt that ended its worker."""


class Why(msgspec.Struct, frozen=True):
    """
    The cause of a job's waiting; `str` of it is a sentence.

    `kind` is the first cause that a lease meets, in this order: `queue-paused`, `task-paused` and `group-paused` · `unknown-task`:
    no worker of the queue knows the task · `label`: none has the labels that it requires · `build`: none is of the build that it is
    pinned to · `no-worker`: nothing serves the queue · `limit`: one is full · `group`: another job of
    its group comes first · `scheduled` · `position`: others are before it. Besides: `buffer`: it is still in this program ·
    `parent`: the job that spawned it has not ended · `rerun`: it runs once more when the job that has its unique key has ended ·
    `running` and `ended`: it does not wait. `also` holds the further causes, in the same order.

    `name`: of the queue, task, label, build, limit, group or worker that the cause is about; `key`: of a limit by a key.
    `opens_at`: when it is over by itself. `ahead` of `total` jobs are leased before it, at a limit groups; at least so many
    where `exact` is false. `used` of `most` slots or starts of the limit are in use. `behind`: the job of the group that comes
    first, whose status is `behind_status`. `estimate`: seconds until its turn at the
    present rate, None where nothing ended lately. `seen`, `seen_name`: when a worker that knew the task was last seen; of a job
    that runs, when the lease of its worker ended, None while it holds. `since`: since when it runs. `error`: of its last attempt.
    """

    kind: Cause
    status: Status
    queue: str
    task: str = ""
    name: str = ""
    key: str = ""
    opens_at: datetime | None = None
    ahead: int | None = None
    exact: bool = True
    total: int | None = None
    estimate: float | None = None
    used: int | None = None
    most: int | None = None
    per: float | None = None
    """Of a rate: its seconds."""
    behind: str = ""
    behind_status: str = ""
    seen: datetime | None = None
    seen_name: str = ""
    since: datetime | None = None
    error: str = ""
    attempt: int = 0
    """Of a dead job: its attempts."""
    at: datetime | None = None
    """When this was read, by the server's clock."""
    also: tuple[Why, ...] = ()

    def __str__(self) -> str:
        return clean(_SENTENCES[self.kind](self))


def explain(status: Status, queue: str, facts: WaitFacts, decoder: RecordDecoder) -> Why:
    """Return why a job waits whose facts are known; of one that has left its queue that it does not."""
    row = facts.job[1]
    base = Why("ended", status, queue, task=row.envelope.task if row else "", at=instant(facts.now))
    if row is None:
        return replace(base, kind="parent") if status == "waiting" else base
    if status == "dead":
        return replace(base, error=_last_error(row, queue, decoder), attempt=row.state.starts)
    if status == "leased":
        host, pid = row.about.get("host"), row.about.get("pid")
        serving = facts.workers if base.task else facts.consumers
        return replace(
            base, kind="running", name=f"{host}:{pid}" if pid else row.extra, since=instant_or_none(row.leased_ms),
            seen=instant_or_none(facts.lease_ended),
            also=(replace(base, kind="no-worker", name=queue),) if facts.lease_ended and not serving else (),
        )  # fmt: skip
    if status == "waiting" and row.extra == row.envelope.after:
        return replace(base, kind="rerun", name=public(queue, row.extra))
    first, *rest = _causes(base, row, facts, decoder)
    return replace(first, also=tuple(rest))


def _causes(base: Why, row: JobRow, facts: WaitFacts, decoder: RecordDecoder) -> Iterator[Why]:
    """Yield all causes of the waiting of a job that is ready or scheduled, in the order of the lease."""
    serving = facts.workers if base.task else facts.consumers
    seen = replace(base, seen=instant_or_none(facts.seen), seen_name=facts.seen_name)
    if facts.paused:
        yield replace(base, kind="queue-paused", name=base.queue)
    if facts.task_paused:
        yield replace(base, kind="task-paused", name=base.task)
    if facts.group_paused:
        yield replace(base, kind="group-paused", name=facts.group)
    if base.task and facts.workers and not facts.may_know:
        yield replace(seen, kind="unknown-task", name=base.task)
    if facts.workers:
        for kind, name in missing_skills(row.envelope.extra.pin, row.envelope.extra.requires, facts.skills):
            yield replace(base, kind=kind, name=name)
    if not serving:
        yield replace(seen, kind="no-worker", name=base.queue)
    yield from _limit_causes(base, facts)
    if row.status == "scheduled":
        yield replace(
            base,
            kind="scheduled",
            name=base.queue,
            opens_at=instant(int(row.extra)),
            error=_error(row, base.queue, decoder),
        )
        return
    estimate = None
    if facts.ended and facts.window and facts.exact:
        estimate = round((facts.ahead + 1) * facts.window / facts.ended / 1000, 1)
    yield replace(
        base, kind="position", name=base.queue, ahead=facts.ahead, exact=facts.exact, total=facts.total, estimate=estimate,
        error=_error(row, base.queue, decoder),
    )  # fmt: skip


def missing_skills(
    build: str, labels: Sequence[str], skills: Sequence[tuple[str, Sequence[str]]]
) -> Iterator[tuple[Cause, str]]:
    """Yield what keeps a job from all workers with these *skills* (build and labels of each): ("label", …) and ("build", …)."""
    if labels and not any(set(labels) <= set(has) for _, has in skills):
        alone = [one for one in labels if not any(one in has for _, has in skills)]
        yield "label", ", ".join(alone or labels)
    if build and not any(build == of for of, _ in skills):
        yield "build", build


def _limit_causes(base: Why, facts: WaitFacts) -> Iterator[Why]:
    """Yield what holds up a job whose limits and group are shut: a limit, and the job of its group that comes first."""
    if facts.task_held:
        yield replace(base, kind="limit", name=base.task, opens_at=instant(facts.task_held))
    if facts.limit:
        name, _, key = facts.limit.partition(":")
        kind, *numbers = facts.limit_text.split(" ")
        rate = kind == "r" and len(numbers) > 1
        yield replace(
            base, kind="limit", name=name, key=key, ahead=facts.limit_ahead, used=facts.limit_used,
            most=int(numbers[0]) if numbers else None, per=int(numbers[1]) / 1000 if rate else None,
            opens_at=instant(facts.limit_opens) if facts.limit_opens >= 0 else None,
        )  # fmt: skip
    if facts.behind:
        yield replace(
            base, kind="group", name=facts.group, behind=public(base.queue, facts.behind), behind_status=facts.behind_place,
            opens_at=instant(facts.behind_due) if facts.behind_due >= 0 else None,
        )  # fmt: skip


def _error(row: JobRow, queue: str, decoder: RecordDecoder) -> str:
    """Return in which attempt a job failed last, and how; "" of one that did not."""
    failures = row.state.failures_list()
    if not failures:
        return ""
    last = decoder.failure(failures[-1], queue, row.id)
    verb = "crashed" if last.type == CRASHED else "failed"
    return f"attempt {last.attempt} {verb}: {_told(last)}"


def _last_error(row: JobRow, queue: str, decoder: RecordDecoder) -> str:
    failures = row.state.failures_list()
    return _told(decoder.failure(failures[-1], queue, row.id)) if failures else ""


def _told(failure: Failure) -> str:
    """Return an error in a line: its class without the module, and its text; of a crash the text alone, which says it all."""
    text = " ".join(failure.message.split())
    kind = "" if failure.type == CRASHED else failure.type.rpartition(".")[2]
    return text if not kind else f"{kind}: {text}" if text else kind


def _clock(at: datetime | None, now: datetime | None) -> str:
    """Return an instant with its distance from *now*."""
    if at is None or now is None:
        return "a time that is not known"
    seconds = (at - now).total_seconds()
    distance = f"in {span(seconds)}" if seconds > 0 else f"{span(-seconds)} ago"
    return f"{at:%Y-%m-%d %H:%M:%S} UTC ({distance})"


def _last_known(why: Why) -> str:
    if why.seen is None:
        return ""
    by = f" by {why.seen_name}" if why.seen_name else ""
    return f" The task {why.task!r} was last known{by}, seen at {_clock(why.seen, why.at)}."


def _unknown_task(why: Why) -> str:
    known = _last_known(why).strip() or "None of its last workers did."
    return f"No worker of queue {why.queue!r} knows the task {why.task!r}. {known}"


def _no_worker(why: Why) -> str:
    what = "worker" if why.task else "consumer"
    return f"No {what} serves queue {why.queue!r}.{_last_known(why)}"


def _scheduled(why: Why) -> str:
    after = f" ({why.error})" if why.error else ""
    return f"It is {'tried again' if after else 'scheduled for'} {'at ' if after else ''}{_clock(why.opens_at, why.at)}{after}."


def _position(why: Why) -> str:
    assert why.ahead is not None
    if not why.exact and not why.ahead:
        return f"It is one of {why.total:,} in queue {why.queue!r}."
    if not why.exact:
        return f"At least {why.ahead:,} of {why.total:,} jobs in queue {why.queue!r} are before it."
    rate = "" if why.estimate is None else f" At the present rate that is about {span(why.estimate)}."
    after = f" {_closed(why.error[0].upper() + why.error[1:])}" if why.error else ""
    return f"It is number {why.ahead + 1:,} of {why.total:,} in queue {why.queue!r}.{rate}{after}"


def _limit(why: Why) -> str:
    ahead = "" if not why.ahead else f"; at least {why.ahead:,} {'is' if why.ahead == 1 else 'are'} ahead"
    opens = "" if why.opens_at is None else f", opens at {_clock(why.opens_at, why.at)}"
    if why.most is None:
        return f"{_limit_name(why)} is held{opens.replace(', opens at', ' until')}{ahead}."
    of = f" in {span(why.per)}" if why.per else ""
    return f"{_limit_name(why)} is full ({why.used:,} of {why.most:,}{of}){opens}{ahead}."


def _limit_name(why: Why) -> str:
    if why.most is None and why.name == why.task:
        return f"Task {why.name!r}"
    if not why.name:
        return f"Group {why.key!r}"
    return f"Limit {why.name!r}{f' of {why.key!r}' if why.key else ''}"


def _group(why: Why) -> str:
    states = {"leased": "which is leased", "waiting": "which waits, too"}
    state = states.get(why.behind_status, "which comes first")
    if why.opens_at is not None:
        state = f"which is tried again at {_clock(why.opens_at, why.at)}"
    return f"It waits in group {why.name!r} behind job {why.behind}, {state}."


def _running(why: Why) -> str:
    since = f", since {_clock(why.since, why.at)}" if why.since else ""
    if why.seen is not None:
        return (
            f"{why.name} has it{since}, and has died or hangs: its lease ended at {_clock(why.seen, why.at)}. "
            f"Another worker of queue {why.queue!r} starts it again."
        )
    return f"It does not wait: {why.name} has it{since}."


def _ended(why: Why) -> str:
    if why.status != "dead":
        return "It was cancelled." if why.status == "cancelled" else "It ended well."
    attempts = "1 attempt" if why.attempt == 1 else f"{why.attempt:,} attempts"
    after = f" after {attempts}" if why.attempt else ""
    return _closed(f"It failed for good{after}{f': {why.error}' if why.error else ''}")


def _closed(sentence: str) -> str:
    """Return a sentence that may end in the text of an error, with a full stop where it has no end of its own."""
    return sentence if sentence.endswith((".", "?", "!", "…")) else f"{sentence}."


_SENTENCES: dict[str, Callable[[Why], str]] = {
    "queue-paused": lambda why: f"Queue {why.queue!r} is paused. Resume it:  conveyor queue resume {why.queue}",
    "task-paused": lambda why: f"Task {why.name!r} is paused. Resume it:  conveyor queue resume --task {why.name}",
    "group-paused": lambda why: (
        f"Group {why.name!r} is paused. Resume it:  conveyor queue resume {why.queue} --group {shlex.quote(why.name)}"
    ),
    "unknown-task": _unknown_task,
    "label": lambda why: (
        f"It requires a worker with the label {why.name!r}, and none serves queue {why.queue!r}.  Start one:  "
        f"conveyor worker … {' '.join(f'--label {one}' for one in why.name.split(', '))}"
    ),
    "build": lambda why: (
        f"It is pinned to build {why.name!r}, and no worker of it serves queue {why.queue!r}.  Release such jobs:  "
        f"conveyor queue release {why.queue} --build {why.name}"
    ),
    "no-worker": _no_worker,
    "limit": _limit,
    "group": _group,
    "scheduled": _scheduled,
    "position": _position,
    "buffer": lambda _: "It waits in the buffer of this program until Redis answers.",
    "parent": lambda _: "It waits until the job that spawned it has ended.",
    "rerun": lambda why: f"It waits until job {why.name}, which has its unique key, has ended; then it runs once more.",
    "running": _running,
    "ended": _ended,
}


class QueueCause(msgspec.Struct, frozen=True):
    """
    A cause for which jobs of a queue wait; `str` of it is a sentence.

    `kind`, `name`, `opens_at`, `seen` and `seen_name` as in `Why`. `jobs`: how many wait for it, at a limit those of a thousand
    groups; where `looked` is not None, of so many that were looked at. Of `group`, which is told once: `groups`, so many have a job
    that is leased or tried again, of a thousand; `name`, the group in which most wait, and `largest`, so many.
    """

    kind: Cause
    queue: str
    name: str = ""
    jobs: int = 0
    looked: int | None = None
    opens_at: datetime | None = None
    seen: datetime | None = None
    seen_name: str = ""
    at: datetime | None = None
    groups: int = 0
    largest: int = 0

    def __str__(self) -> str:
        return clean(_QUEUE_SENTENCES[self.kind](self))


def with_openings(causes: Sequence[QueueCause], opens: Mapping[str, datetime | None]) -> list[QueueCause]:
    """Return causes of which each full limit knows when it opens; *opens* by the name of a limit, ``name:key`` of a key."""
    return [replace(one, opens_at=opens.get(one.name)) if one.kind == "limit" else one for one in causes]


def queue_causes(queue: str, waiting: int, parts: Sequence[QueueFacts]) -> list[QueueCause]:
    """Return why jobs of a queue wait, of which *waiting* are not scheduled; *parts* are the facts of its partitions."""
    if not parts:
        return []
    now, found = instant(max(one.now for one in parts)), list[QueueCause]()
    scheduled, looked = sum(one.scheduled for one in parts), sum(one.looked for one in parts)
    messages = sum(one.messages for one in parts)
    held_up = waiting + scheduled
    if any(one.paused for one in parts):
        found.append(QueueCause("queue-paused", queue, queue, held_up, at=now))
    for kind, name, jobs in _held_up(parts):
        found.append(QueueCause(kind, queue, name, jobs, at=now))
    busy = [one.busy_groups for one in parts if one.busy_groups[1]]
    if busy:
        _, _, name, largest = max(busy, key=lambda one: one[3])
        jobs, groups = sum(one[0] for one in busy), sum(one[1] for one in busy)
        found.append(QueueCause("group", queue, name, jobs, at=now, groups=groups, largest=largest))
    tasks: dict[str, tuple[int, int, str]] = {}
    for task, jobs, seen, name in (each for one in parts for each in one.unknown):
        before = tasks.get(task, (0, 0, ""))
        tasks[task] = (before[0] + jobs, *max(before[1:], (seen, name)))
    for task, (jobs, seen, name) in tasks.items():
        found.append(QueueCause("unknown-task", queue, task, jobs, looked, None, instant_or_none(seen), name, now))
    requirements = Counter[tuple[Cause, str]]()
    skills = [skill for one in parts for skill in one.skills]
    for build, labels, jobs in (need for one in parts for need in one.needs):
        requirements.update(dict.fromkeys(missing_skills(build, labels, skills) if skills else (), jobs))
    for (kind, name), jobs in requirements.items():
        found.append(QueueCause(kind, queue, name, jobs, looked, at=now))
    for what, serving, needed in (
        ("worker", max(one.workers for one in parts), looked > messages),
        ("consumer", max(one.consumers for one in parts), messages > 0),
    ):
        if held_up and needed and not serving:
            found.append(QueueCause("no-worker", queue, what, held_up, at=now))
    due = [one.first_due for one in parts if one.first_due >= 0]
    if due:
        found.append(QueueCause("scheduled", queue, queue, scheduled, opens_at=instant(min(due)), at=now))
    return found


def _held_up(parts: Sequence[QueueFacts]) -> Iterator[tuple[Cause, str, int]]:
    """Yield the paused tasks, the paused groups and the full limits of all partitions, with what waits for them."""
    paused, shut, full = Counter[str](), Counter[str](), Counter[str]()
    for one in parts:
        paused.update(dict(one.paused_tasks))
        shut.update(dict(one.paused_groups))
        full.update({name: jobs for name, jobs, _ in one.limits})
    for task, jobs in paused.items():
        yield "task-paused", task, jobs
    for group, jobs in shut.most_common():
        yield "group-paused", group, jobs
    for name, jobs in full.most_common():
        yield "limit", name, jobs


def _wait(cause: QueueCause) -> str:
    return f"{cause.jobs:,} {'job waits' if cause.jobs == 1 else 'jobs wait'}"


def _need(cause: QueueCause) -> str:
    return (
        f"{cause.jobs:,} of the {cause.looked:,} jobs that were looked at {'needs' if cause.jobs == 1 else 'need'} it"
    )


def _unknown_tasks(cause: QueueCause) -> str:
    need = _need(cause)
    seen = f", last seen at {_clock(cause.seen, cause.at)} on {cause.seen_name or 'a worker'}" if cause.seen else ""
    return f"No worker knows the task {cause.name!r}{seen}: {need}."


def _busy_groups(cause: QueueCause) -> str:
    if cause.groups == 1:
        return f"{_wait(cause)} in group {cause.name!r} behind a job that is leased or tried again."
    return (
        f"{_wait(cause)} in {cause.groups:,} groups behind jobs that are leased or tried again, "
        f"{cause.largest:,} of them in group {cause.name!r}."
    )


_QUEUE_SENTENCES: dict[str, Callable[[QueueCause], str]] = {
    "task-paused": lambda cause: f"Task {cause.name!r} is paused{f': {_wait(cause)}' if cause.jobs else ''}.",
    "group-paused": lambda cause: f"Group {cause.name!r} is paused: {_wait(cause)}.",
    "limit": lambda cause: (
        f"Limit {cause.name!r} is full: {_wait(cause)}"
        f"{'' if cause.opens_at is None else f', opens at {_clock(cause.opens_at, cause.at)}'}."
    ),
    "group": _busy_groups,
    "queue-paused": lambda cause: f"It is paused: {_wait(cause)}.",
    "unknown-task": _unknown_tasks,
    "label": lambda cause: f"No worker has the label {cause.name!r}: {_need(cause)}.",
    "build": lambda cause: (
        f"No worker is of build {cause.name!r}: {_need(cause)}.  Release them:  "
        f"conveyor queue release {cause.queue} --build {cause.name}"
    ),
    "no-worker": lambda cause: f"No {cause.name} serves it: {_wait(cause)}.",
    "scheduled": lambda cause: (
        f"{cause.jobs:,} {'job is' if cause.jobs == 1 else 'jobs are'} scheduled, the first for {_clock(cause.opens_at, cause.at)}."
    ),
}
