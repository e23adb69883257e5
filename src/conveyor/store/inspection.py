"""Reads: one pure function per script, each returning a `Call`. None of them changes anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from conveyor.ids import made_at_ms, may_arrive_later
from conveyor.payload.records import AttemptHistory, Envelope, Status, read_envelope, read_leniently
from conveyor.store.job_filter import ANY_JOB, JobFilter, Walk, WalkStep, read_step
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Command, Script

DAMAGED = "(damaged)"
"""The host of a worker whose facts cannot be read."""
BUCKETS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 3_600_000)
"""Upper bounds of the duration histogram in ms. The last field counts what took longer."""
COUNTS, LIST_JOBS, GET_JOB, WHY = Script("counts"), Script("list_jobs"), Script("get_job"), Script("why")
LRANGE = Script("LRANGE")
FIND_JOBS, ZCARD = Script("find_jobs"), Script("ZCARD")
WORKERS, AUDIT, UNPLACED = Script("workers"), Script("audit"), Script("unplaced")
QUEUE_CAUSES, WATCH_JOBS = Script("queue_causes"), Script("watch_jobs")
COUNT_QUEUES, READ_STATS = Script("count_queues"), Script("read_stats")
READ_TOTALS, EXAMINE_QUEUES = Script("read_totals"), Script("examine_queues")


class QueueCounts(msgspec.Struct, frozen=True, gc=False):  # ten thousand at once: no cycle to look for
    """
    The counts of a queue.

    `oldest_age`: seconds since the oldest ready job could have started, None when none is ready. `outbox`: jobs that its
    jobs spawned and that are not delivered to their queues yet. `unplaced`: jobs that have a record and are in no place.
    `blocked`: producers that wait for room. `dropped`: jobs that were dropped for newer ones (full="drop-oldest"). `workers`:
    those whose leases hold. `silent`: those whose leases have ended, since they died or hang.
    """

    ready: int
    scheduled: int
    waiting: int
    leased: int
    dead: int
    oldest_age: float | None
    paused: bool
    workers: int
    max_length: int | None = None
    outbox: int = 0
    unplaced: int = 0
    blocked: int = 0
    dropped: int = 0
    silent: int = 0

    def __len__(self) -> int:
        return self.ready + self.scheduled + self.waiting


NOTHING = QueueCounts(0, 0, 0, 0, 0, None, False, 0)
"""The counts of a queue that holds nothing."""


def total(parts: Sequence[QueueCounts]) -> QueueCounts:
    """Return the sum of *parts*, the partitions of a queue; of workers the maximum, as each serves them all."""
    if len(parts) == 1:
        return parts[0]
    ages = [part.oldest_age for part in parts if part.oldest_age is not None]
    limits = [part.max_length for part in parts if part.max_length is not None]
    return QueueCounts(
        sum(part.ready for part in parts), sum(part.scheduled for part in parts), sum(part.waiting for part in parts),
        sum(part.leased for part in parts), sum(part.dead for part in parts), max(ages, default=None),
        any(part.paused for part in parts), max(part.workers for part in parts), sum(limits) if limits else None,
        sum(part.outbox for part in parts), sum(part.unplaced for part in parts), sum(part.blocked for part in parts),
        sum(part.dropped for part in parts), max(part.silent for part in parts),
    )  # fmt: skip


class JobRow(msgspec.Struct, frozen=True):
    """
    One job: `extra` is its due instant or its death in ms, or the worker that has leased it.

    Of a leased job `leased_ms` is since when, 0 where an earlier version leased it, and `about` what its worker stored of itself.
    """

    id: str
    status: Status
    envelope: Envelope
    state: AttemptHistory
    extra: str
    leased_ms: int = 0
    about: dict[str, Any] = msgspec.field(default_factory=dict)
    raw: bytes = b""
    """Its envelope as it is stored, where one job was read."""


LOOKED_AT = 10_000
"""Entries at either end of a list among which a job is looked for."""


class WaitFacts(msgspec.Struct, frozen=True):
    """
    The facts from which follows why a job waits; `job` is as `get_job` yields it, without its body. Times in ms.

    `may_know`: one of the workers may know its task. `seen`: when one that did was last seen, by `seen_name`; 0: never. `ahead`:
    how many are leased before it, at least so many unless `exact`. `ended`: how many attempts ended in the last `window` ms.
    `task_held`: until when its task is held. `group`: the key of its group, `behind` the job there that it waits for, at
    `behind_place`, due at `behind_due` (-1: not scheduled). `limit`: the one that is full, with what conf says of it, slots or
    starts in use, groups before this one, and when it opens (-1: when a job ends).
    """

    job: tuple[str, JobRow | None, bytes]
    now: int
    paused: bool = False
    workers: int = 0
    consumers: int = 0
    may_know: bool = True
    seen: int = 0
    seen_name: str = ""
    ahead: int = 0
    exact: bool = True
    total: int = 0
    ended: int = 0
    window: int = 0
    task_paused: bool = False
    task_held: int = 0
    group: str = ""
    group_paused: bool = False
    behind: str = ""
    behind_place: str = ""
    behind_due: int = -1
    limit: str = ""
    limit_text: str = ""
    limit_used: int = 0
    limit_ahead: int = 0
    limit_opens: int = -1
    skills: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(build, labels) of the workers that serve the queue, each once."""
    lease_ended: int = 0
    """When the lease of the worker that has it ended; 0: it holds."""


class JobPage(msgspec.Struct, frozen=True):
    """One page of jobs, and the number of `entries` that it covers: the next page begins behind them. 0: there are no more."""

    rows: list[JobRow]
    entries: int


class FinishedJob(msgspec.Struct, frozen=True):
    """One of the recently finished jobs: `at` in ms since the epoch, `ran_ms` the duration of its last attempt."""

    id: str
    task: str
    status: str
    at: int
    ran_ms: int


class WorkerRow(msgspec.Struct, frozen=True, gc=False):  # a process has one in each of its queues
    """
    One worker of a queue: its identity, the end of its lease (ms), its facts, and the number of its jobs.

    `lease_ms` is the length of its lease, 0 where it is not known, and `now` the server's time (ms).
    """

    worker: str
    end: int
    about: dict[str, Any]
    held: int
    lease_ms: int = 0
    now: int = 0


def counts(keys: QueueKeys) -> Call[QueueCounts]:
    """Return the call that counts the jobs of a queue by state."""
    names = [keys.jobs, keys.due, keys.dead, keys.workers, keys.conf, *keys.ready, keys.outbox]
    if keys.foreign is not None:
        names += [keys.foreign, keys.intake]
    return Call(COUNTS, names, (), _read_counts)


def _read_counts(reply: list[Any]) -> QueueCounts:
    now, *numbers, oldest, marks = reply
    return _queue_counts(numbers, _age(now, oldest, marks) if oldest else None)


def _queue_counts(numbers: Sequence[int], age: float | None) -> QueueCounts:
    (
        ready, scheduled, leased, dead, workers, paused, limit, foreign, outbox, unplaced, waiting, blocked, dropped, silent,
    ) = numbers  # fmt: skip
    age = age if ready + foreign + waiting > 0 else None  # the oldest entry may be that of a cancelled job
    return QueueCounts(
        ready + foreign, scheduled, waiting, leased, dead, age, paused == 1, workers, None if limit < 0 else limit, outbox,
        unplaced, blocked, dropped, silent,
    )  # fmt: skip


def _age(now: int, oldest: bytes, marks: bytes) -> float:
    """Return since when (seconds) the job with the id *oldest* could have started, by the server's clock."""
    due = read_envelope(marks + b"\n\n").due_ms if marks else None
    since = max(made_at_ms(oldest.decode()) or 0, due or 0)
    return max(0.0, (now - since) / 1000) if since else 0.0


class QueueTotals(NamedTuple):
    """
    The counters of a queue since they were begun, and whether it has schedules, and limits that code declares.

    `has_many`: it has too many counters for one step, so they are read by `read_totals_page`.
    """

    counters: Mapping[str, int]
    has_schedules: bool
    has_limits: bool
    has_many: bool


_NO_TOTALS = QueueTotals({}, has_schedules=False, has_limits=False, has_many=False)


def read_totals(queues: Sequence[str]) -> Call[list[QueueTotals]]:
    """
    Return the call that reads the counters of queues since they were begun, by their keys `jobs`.

    About a hundred at one server, and in a cluster one. Many counters make it read fewer, at least one.
    """

    def decode(reply: list[Any]) -> list[QueueTotals]:
        totals = [_NO_TOTALS] * reply[0]
        for at in range(1, len(reply), 4):
            counters = _counters(reply[at + 1])
            for name, number in _counters(reply[at + 2]).items():
                counters[name] = counters.get(name, 0) + number
            totals[reply[at] - 1] = QueueTotals(counters, *map(bool, reply[at + 3]))
        return totals

    return Call(READ_TOTALS, queues, (), decode)


def _counters(fields: list[bytes]) -> dict[str, int]:
    return {fields[at].decode(errors="replace"): int(fields[at + 1]) for at in range(0, len(fields), 2)}


class TotalsPage(NamedTuple):
    """Some counters of a queue, and where the next are (cursor 0: there are none). Pages of one minute belong together."""

    cursor: int
    counters: Mapping[str, int]
    minute: bytes


def read_totals_page(queue: str, of: Literal["total", "last"], cursor: int) -> Call[TotalsPage]:
    """Return the call that reads about a thousand counters of one queue: of the minutes that are over, or of the last one."""

    def decode(reply: list[Any]) -> TotalsPage:
        return TotalsPage(int(reply[0]), _counters(reply[1]), reply[2])

    return Call(READ_TOTALS, (queue,), (of, str(cursor)), decode)


class QueueMarks(NamedTuple):
    """The marks of a queue by which it is looked at more closely."""

    is_being_repartitioned: bool
    has_schedules: bool


def examine_queues(queues: Sequence[str]) -> Call[list[QueueMarks]]:
    """Return the call that reads the marks of queues of one server, by their keys `conf`."""
    return Call(EXAMINE_QUEUES, queues, (), lambda reply: [QueueMarks(*map(bool, one)) for one in reply])


class Ended(NamedTuple):
    """The attempts that ended in one minute: done, failed (the job is dead) and to be tried again; -1 each: not known."""

    done: int
    failed: int
    retried: int


class LeftLately(NamedTuple):
    """
    The jobs of a queue or partition that workers ended, with any outcome: in the last whole minute, and in the one that goes on.

    -1: not known. `at_ms`: when that was read, by the server's clock.
    """

    at_ms: int
    before: int
    current: int

    def since(self, earlier: LeftLately) -> int | None:
        """Return how many were ended since *earlier*; None where the counters do not tell: most are of other minutes."""
        minutes = self.at_ms // 60_000 - earlier.at_ms // 60_000
        if -1 in {self.before, self.current, earlier.current} or minutes not in {0, 1}:
            return None
        found = self.current - earlier.current + (self.before if minutes else 0)
        return found if found >= 0 else None  # the queue was deleted meanwhile


class CountedPart(NamedTuple):
    """
    The counts of a queue or partition, what ended there in each of the last minutes, and its workers where they are listed.

    `left`: what left it, where minutes were asked for.
    """

    counts: QueueCounts
    ended: Sequence[Ended] = ()
    workers: Sequence[WorkerRow] = ()
    left: LeftLately | None = None


def count_queues(queues: Sequence[str], minutes: int, *, workers: bool = False) -> Call[list[CountedPart]]:
    """
    Return the call that counts queues of one server, by their keys `jobs`, a hundred at most.

    Each with what ended in the last whole *minutes*, what left it, and with its *workers*. Entries of plain lists are left out.
    Many workers or counters make it count fewer, at least one.
    """

    def decode(reply: list[Any]) -> list[CountedPart]:
        now, counts, oldest, ended, listed, gone = reply
        rows = _worker_rows(listed, now)
        ages = {oldest[at] - 1: _age(now, oldest[at + 1], oldest[at + 2]) for at in range(0, len(oldest), 3)}
        lately = [_read_ended(*one) for one in _THREE_NUMBERS.iter_unpack(ended)]
        left = [LeftLately(now, *one) for one in _TWO_NUMBERS.iter_unpack(gone)]
        return [
            CountedPart(
                _queue_counts(numbers, ages.get(at)),
                lately[at * minutes : (at + 1) * minutes] if minutes else (),
                rows.get(at, ()),
                left[at] if minutes else None,
            )
            for at, numbers in enumerate(_COUNTS.iter_unpack(counts))
        ]

    return Call(COUNT_QUEUES, queues, (str(minutes), "1" if workers else ""), decode)


_COUNTS, _TWO_NUMBERS, _THREE_NUMBERS, _FIVE_NUMBERS = Struct("<14q"), Struct("<2q"), Struct("<3q"), Struct("<5q")


def _read_ended(done: int, failed: int, retried: int) -> Ended:
    """Return what ended, from counters of which each retry counts as a failure too."""
    return Ended(done, max(0, failed - retried) if failed >= 0 else -1, retried)


class StatsPage(NamedTuple):
    """Sums by kind of each minute or hour, and of each task over all of them; and the first number that was not read."""

    next: int
    times: dict[int, dict[str, int]]
    tasks: dict[str, dict[str, int]]


def read_stats(
    keys: QueueKeys, unit: Literal["minutes", "hours"], first: int, last: int, task: str | None = None
) -> Call[StatsPage]:
    """Return the call that reads what ended in the minutes or hours *first* to *last* since the epoch, as far as it comes."""

    def decode(reply: list[Any]) -> StatsPage:
        page = StatsPage(reply[0], {}, {})
        for name, sums in reply[1:]:
            found = {sums[i].decode(): int(sums[i + 1]) for i in range(0, len(sums), 2)}
            if isinstance(name, int):
                page.times[name] = found
            else:
                name = name.decode(errors="replace")
                page.tasks[name] = found
        return page

    return Call(READ_STATS, (keys.jobs, keys.none), (unit, str(first), str(last), task or ""), decode)


Reading = Literal["", "heads", "short"]
"""The part of jobs that is read: all, none of their bodies, or the first 2 KiB of these."""


def list_jobs(
    keys: QueueKeys, status: str, offset: int, count: int, wanted: JobFilter = ANY_JOB, *, reads: Reading = "",
    ignores_error: bool = False,
) -> Call[JobPage]:  # fmt: skip
    """
    Return the call that reads one page of the jobs in a state: ready, scheduled, waiting, leased, dead (newest first), dead-oldest.

    *wanted*: only these, whatever its tag; the others among *count* entries count as looked at. *ignores_error*: as in `Walk`.
    *reads*: all of the jobs, or "heads": without their bodies, and of their errors only the last, without its traceback; "short":
    with the beginning of their bodies. Large jobs make a page shorter.
    """
    wanted = replace(wanted, tag=None)
    args = (
        status,
        str(offset),
        str(count),
        reads,
        *Walk(wanted, ignores_error=ignores_error).filter(),
    )
    return Call(LIST_JOBS, _list_keys(keys), args, lambda reply: JobPage(_read_rows(status, reply), reply[0]))


def whole_jobs(keys: QueueKeys, heads: Sequence[JobRow], reads: Reading = "") -> Call[JobPage]:
    """
    Return the call that reads a page of the jobs of which *heads* are known; those that are gone by then are left out.

    *reads*: as in `list_jobs`.
    """
    known = {row.id: row for row in heads}

    def decode(reply: list[Any]) -> JobPage:
        rows = [replace(known[row.id], envelope=row.envelope, state=row.state) for row in _read_rows("ready", reply)]
        return JobPage(rows, reply[0])

    return Call(LIST_JOBS, _list_keys(keys), ("ids", "0", "500", reads, *Walk().filter(), *known), decode)


class FoundJobs(NamedTuple):
    """One step of a walk, and the heads of the jobs that it found."""

    step: WalkStep
    rows: list[JobRow]


def find_jobs(keys: QueueKeys, walk: Walk) -> Call[FoundJobs]:
    """Return the call that reads the heads of the jobs that one step of *walk* finds."""

    def decode(reply: list[Any]) -> FoundJobs:
        facts: dict[str, dict[str, Any]] = {}
        rows = []
        for at in range(5, len(reply), 5):
            id_, envelope, state, place, extra = reply[at : at + 5]
            rows.append(_read_row(id_.decode(), place.decode(), envelope, state, extra.split(b"\t", 2), facts))
        return FoundJobs(read_step(reply), rows)

    return Call(FIND_JOBS, (keys.jobs, keys.none), ("heads", *walk.arguments()), decode)


def count_found(keys: QueueKeys, walk: Walk) -> Call[tuple[WalkStep, dict[str, int]]]:
    """Return the call that counts the jobs that one step of *walk* finds, by their state."""

    def decode(reply: list[Any]) -> tuple[WalkStep, dict[str, int]]:
        return read_step(reply), {reply[at].decode(): int(reply[at + 1]) for at in range(5, len(reply), 2)}

    return Call(FIND_JOBS, (keys.jobs, keys.none), ("count", *walk.arguments()), decode)


def count_tagged(keys: QueueKeys, tag: str) -> Call[int]:
    """Return the call that counts the jobs with a tag, in whatever state."""
    return Command(ZCARD, (keys.tag(tag),), (), int)


def finished(keys: QueueKeys, offset: int, count: int) -> Call[list[FinishedJob]]:
    """Return the call that reads the recently finished jobs, newest first."""
    return Call(
        LIST_JOBS,
        _list_keys(keys),
        ("done", str(offset), str(count), "", *Walk().filter()),
        lambda reply: [_read_finished(entry) for entry in reply[4::4]],
    )


def _list_keys(keys: QueueKeys) -> tuple[str, ...]:
    return (keys.jobs, keys.state, keys.due, keys.dead, keys.workers, keys.recent, *keys.ready)


def _read_rows(status: str, reply: list[Any]) -> list[JobRow]:
    kind: Status = "dead" if status == "dead-oldest" else status  # type: ignore[assignment]
    facts: dict[str, dict[str, Any]] = {}  # of each worker, which only the first of its jobs brings
    return [
        _read_row(reply[i].decode(), kind, reply[i + 1], reply[i + 2], reply[i + 3].split(b"\t", 2), facts)
        for i in range(1, len(reply), 4)
    ]


def _read_row(
    id: str,  # noqa: A002
    status: Status,
    envelope: bytes,
    state: bytes,
    extra: list[bytes],
    facts: dict[str, dict[str, Any]],
) -> JobRow:
    record, history, _ = read_leniently(envelope, state)
    if status != "leased" or len(extra) < 3:
        return JobRow(id, status, record, history, extra[0].decode())
    worker, since, about = extra[0].decode(errors="replace"), extra[1], extra[2]
    if about or worker not in facts:
        facts[worker] = _read_about(about)
    return JobRow(id, status, record, history, worker, int(since or 0), facts[worker])


def write_finished(id: str, task: str, status: str, at: int, ran_ms: int) -> bytes:  # noqa: A002
    """Return an entry for the list of recently finished jobs."""
    return f"{id}\t{task}\t{status}\t{at}\t{ran_ms}".encode()


def _read_finished(entry: bytes) -> FinishedJob:
    id_, task, status, at, ran = entry.decode().split("\t")
    return FinishedJob(id_, task, status, int(at), int(ran))


def get_job(keys: QueueKeys, id: str) -> Call[tuple[str, JobRow | None, bytes]]:  # noqa: A002
    """Return the call that says all about a job: (place, row, outcome record or mark); places as in get_job.lua."""
    return Call(GET_JOB, _job_keys(keys, id), (id,), _read_job(id))


def watch_jobs(keys: QueueKeys, wanted: Sequence[str], channel: str) -> Call[list[tuple[str, JobRow | None, bytes]]]:
    """Return the call that reads several jobs, as `get_job`, and registers *channel* for the changes of those that live."""
    args = [channel]
    for id_ in wanted:
        args += (id_, "1" if may_arrive_later(id_) else "")
    names = (keys.jobs, keys.state, keys.due, keys.dead, keys.workers, keys.waiters, keys.none)
    return Call(
        WATCH_JOBS, names, args,
        lambda reply: [_read_job(id_)(place) for id_, place in zip(wanted, reply, strict=True)],
    )  # fmt: skip


def why(keys: QueueKeys, id: str) -> Call[WaitFacts]:  # noqa: A002
    """Return the call that reads why a job waits."""

    def decode(reply: list[Any]) -> WaitFacts:
        job = _read_job(id)(reply[0])
        if len(reply) == 2:
            return WaitFacts(job, int(reply[1]))
        if len(reply) == 5:
            now, ended, workers, consumers = map(int, reply[1:])
            return WaitFacts(job, now, workers=workers, consumers=consumers, lease_ended=ended)
        now, paused, workers, consumers, known, seen, where, task, group, limit, skills = reply[1:]
        ahead, exact, total, ended, window = where
        used, before, opens = map(int, limit[2:])
        return WaitFacts(
            job, int(now), paused == 1, workers, consumers, known == 1, *_read_seen(seen),
            ahead, exact == 1, total, ended, window, task[0] == 1, int(task[1]), group[0].decode(), group[1] == 1,
            group[2].decode(), group[3].decode(), int(group[4]), limit[0].decode(), limit[1].decode(), used, before, opens,
            _read_skills(skills),
        )  # fmt: skip

    return Call(WHY, (*_job_keys(keys, id), keys.conf, *keys.ready), (id, str(LOOKED_AT)), decode)


class QueueFacts(msgspec.Struct, frozen=True):
    """
    The facts from which follows why the jobs of a queue wait. Times in ms.

    `unknown`: (task, jobs, when a worker that knew it was last seen, its name) of tasks that no worker knows, among the first jobs,
    of which `looked` were looked at; `messages` of them name no task. `first_due`: of `scheduled` jobs, -1 without one.
    `paused_tasks`: (task, jobs that wait for it). `paused_groups`: (key, jobs that wait in its groups).
    `limits`: (limit, jobs that wait there, what conf says of it).
    """

    now: int
    paused: bool
    workers: int
    consumers: int
    scheduled: int
    first_due: int
    unknown: tuple[tuple[str, int, int, str], ...]
    looked: int
    messages: int
    paused_tasks: tuple[tuple[str, int], ...] = ()
    limits: tuple[tuple[str, int, str], ...] = ()
    paused_groups: tuple[tuple[str, int], ...] = ()
    needs: tuple[tuple[str, tuple[str, ...], int], ...] = ()
    """(build, labels, jobs) that jobs which were looked at require of a worker."""
    skills: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """As in `WaitFacts`."""
    busy_groups: tuple[int, int, str, int] = (0, 0, "", 0)
    """Of groups that run one job at a time and have one: jobs that wait in them, groups, the key of the largest, jobs in that."""


def queue_causes(keys: QueueKeys, count: int = 100) -> Call[QueueFacts]:
    """Return the call that reads why the jobs of a queue wait, of the first *count* that are ready and that are scheduled."""

    def decode(reply: list[Any]) -> QueueFacts:
        (
            (now, is_paused, workers, consumers, scheduled, first_due),
            unknown,
            looked,
            messages,
            paused,
            needed,
            skills,
            limits,
            groups,
            busy,
        ) = reply
        tasks = tuple((one[0].decode(), one[1], *_read_seen(one[2])) for one in unknown)
        return QueueFacts(
            now, is_paused == 1, workers, consumers, scheduled, first_due, tasks, looked, messages,
            tuple((one[0].decode(), one[1]) for one in paused),
            tuple((one[0].decode(), one[1], one[2].decode()) for one in limits),
            tuple((one[0].decode(), one[1]) for one in groups),
            tuple((*_read_skills([one[0]])[0], one[1]) for one in needed), _read_skills(skills),
            (busy[0], busy[1], busy[2].decode(), busy[3]),
        )  # fmt: skip

    return Call(QUEUE_CAUSES, (keys.jobs, keys.due, keys.workers, keys.conf, *keys.ready), (str(count),), decode)


def _read_skills(found: list[bytes]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read builds and labels; those of a damaged registration are none."""
    skills = []
    for one in found:
        build, _, labels = one.decode(errors="replace").partition("\t")
        try:
            skills.append((build, tuple(msgspec.json.decode(labels, type=list[str]))))
        except msgspec.MsgspecError:
            skills.append((build, ()))
    return tuple(skills)


def _read_seen(data: bytes) -> tuple[int, str]:
    """Read when a worker was last seen (ms; 0: never), and its name."""
    at, _, name = data.decode(errors="replace").partition(" ")
    return int(at or 0), name


def _job_keys(keys: QueueKeys, id: str) -> tuple[str, ...]:  # noqa: A002
    return (keys.jobs, keys.state, keys.due, keys.dead, keys.workers, keys.result(id), keys.result_window(id))


def _read_job(id: str) -> Callable[[list[bytes]], tuple[str, JobRow | None, bytes]]:  # noqa: A002
    def decode(reply: list[bytes]) -> tuple[str, JobRow | None, bytes]:
        place = reply[0].decode()
        if not reply[1]:
            return place, None, reply[3]
        row = _read_row(id, place, reply[1], reply[2], reply[3:], {})  # type: ignore[arg-type]
        return place, replace(row, raw=reply[1]), b""

    return decode


def read_logs(keys: QueueKeys, id: str, first: int = 0) -> Call[list[bytes]]:  # noqa: A002
    """Return the call that reads what is kept of the lines of a job: portions, as they were stored, from the *first* on."""
    return Command(LRANGE, (keys.logs(id),), (str(first), "-1"), _read_portions)


def _read_portions(reply: list[bytes]) -> list[bytes]:
    return reply


def workers(keys: QueueKeys) -> Call[list[WorkerRow]]:
    """Return the call that lists the workers of a queue."""
    return workers_of([keys.workers]).then(lambda page: page.rows.get(0, []))


class WorkersPage(NamedTuple):
    """The workers of those of some queues that have any, by the number of the queue; and how many queues were read."""

    read: int
    rows: dict[int, list[WorkerRow]]


def workers_of(queues: Sequence[str]) -> Call[WorkersPage]:
    """Return the call that lists the workers of queues of one server, by their keys `workers`; many workers make it read fewer."""

    def decode(reply: list[Any]) -> WorkersPage:
        now, read, listed = reply
        return WorkersPage(read, _worker_rows(listed, now))

    return Call(WORKERS, queues, (), decode)


def _worker_rows(reply: list[Any], now: int) -> dict[int, list[WorkerRow]]:
    """Return the workers that a script lists by the number of their queue, from 0 on."""
    facts, workers, numbers = reply
    about, rows = [_read_about(one) for one in facts], dict[int, list[WorkerRow]]()
    for worker, (number, end, told, held, lease_ms) in zip(workers, _FIVE_NUMBERS.iter_unpack(numbers), strict=True):
        row = WorkerRow(worker.decode(errors="replace"), end, about[told - 1], held, lease_ms, now)
        rows.setdefault(number - 1, []).append(row)
    return rows


def _read_about(data: bytes) -> dict[str, Any]:
    """Return the facts that a worker stored of itself; of damaged ones only what `WorkerInfo` shows."""
    try:
        facts = msgspec.json.decode(data or b"{}")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        return {"host": DAMAGED}
    if not isinstance(facts.get("host", ""), str) or not isinstance(facts.get("pid"), int | None):
        return {**facts, "host": DAMAGED, "pid": None}
    return facts


def unplaced(keys: QueueKeys, where: str, cursor: str, count: int = 1000) -> Call[tuple[str, list[str]]]:
    """
    Return the call that reads one page of ids; it yields the next cursor ("0": the end) and the ids.

    *where*: "jobs" for those that are neither scheduled, dead nor leased, or the priority of a ready list.
    """
    names = (keys.jobs, keys.due, keys.dead, keys.workers, *keys.ready)
    return Call(
        UNPLACED,
        names,
        (where, cursor, str(count)),
        lambda reply: (reply[0].decode(), [one.decode() for one in reply[1:]]),
    )


def audit(
    keys: QueueKeys,
    *,
    most: int = 200_000,
    tags: Sequence[str] = (),
    unique: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> Call[list[tuple[str, str]]]:
    """
    Return the call that checks that every live id is in exactly one place, and found by its tags; it yields (problem, id).

    *tags*: those that have a key. A tag is looked at without, if a live job has it. *unique*: the unique keys that are held
    and do not expire; of those of live jobs it is checked without that they hold them. *beside*: keys ``stream:<id>`` and
    ``logs:<id>``; those of live jobs are looked at without.
    """
    names = (keys.jobs, keys.state, keys.due, keys.dead, keys.workers, keys.conf, *keys.ready)
    return Call(
        AUDIT,
        names,
        (str(most), *tags, *(f"\t{key}" for key in unique), *(f"\t\t{name}" for name in beside)),
        lambda reply: [(reply[i].decode(), reply[i + 1].decode()) for i in range(0, len(reply), 2)],
    )
