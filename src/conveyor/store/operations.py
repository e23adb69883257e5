"""
Writes: one pure function per script, each returning a `Call`.

None of them talks to Redis: the runners in `transport/` do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b, sha1
from math import inf
from typing import Any, Literal, NamedTuple, NoReturn

import msgspec

from conveyor.acting import current_actor
from conveyor.errors import ConfigurationError, Duplicate, QueueFull
from conveyor.ids import may_arrive_later, public
from conveyor.payload.records import JobKey, to_json, write_attributes, write_envelope
from conveyor.store.job_filter import UNLIMITED, Walk, WalkStep, read_step
from conveyor.store.keys import QueueKeys
from conveyor.store.max_length import argument_of
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Argument, Call, Command, Script, WrongReply

PUSH, PUSH_PLAIN, WITHDRAW, LEAVE_ROOM = (
    Script("push"), Script("push_plain"), Script("withdraw"), Script("leave_room"),
)  # fmt: skip
TURN, IDLE_TURN, FIND_WORK, LIST_INTAKE = (
    Script("turn"), Script("idle_turn"), Script("find_work"), Script("list_intake"),
)  # fmt: skip
REGISTER, HEARTBEAT, EXTEND, HELD_IDS, REAP = (
    Script("register"), Script("heartbeat"), Script("extend"), Script("held_ids"), Script("reap"),
)  # fmt: skip
CANCEL, REDRIVE, PROMOTE, UPDATE = Script("cancel"), Script("redrive"), Script("promote"), Script("update")
PURGE, REPAIR, DELETE = Script("purge"), Script("repair"), Script("delete")
CONFIGURE, DECLARE_QUEUE = Script("configure"), Script("declare_queue")
AWAIT_RESULT, FORGET, WAKE = Script("await_result"), Script("forget"), Script("wake")

# The plain commands among the steps.
SET, DEL, EXISTS, PTTL = Script("SET"), Script("DEL"), Script("EXISTS"), Script("PTTL")
SADD, SREM, SMEMBERS, SMISMEMBER = Script("SADD"), Script("SREM"), Script("SMEMBERS"), Script("SMISMEMBER")
ZADD, ZREM, ZRANGE, ZCARD = Script("ZADD"), Script("ZREM"), Script("ZRANGE"), Script("ZCARD")

LANE_MS = 7_200_000
"""Milliseconds for which the scripts keep number and reply of the last push of a sequence (key `lane:`)."""
DAY_MS = 86_400_000
"""The same for a sequence whose identity ends in +."""
CANCEL_REMOVED, CANCEL_ASKED, CANCEL_RUNS, CANCEL_NOT_STARTED, CANCEL_UNKNOWN = 1, 2, 3, 4, -2
DELETE_LEASED = -1
"""Codes of cancel.lua, as its header says."""
GAVE_NO_SIGN = "its worker gave no sign until its lease ended"
"""The cause of a crash that no supervisor saw."""
MOST_HELD = 1000
"""Maximum jobs of a queue that one worker may hold; scripts clamp to it."""


class Entry(msgspec.Struct):
    """
    One message to push. `rest` is the envelope after its marks; times in ms.

    `unique` is a key that is held until the job ends, `keys` are those with a policy, in the order of their comparison.
    """

    id: str
    rest: bytes
    priority: int = 0
    delay_ms: int | None = None
    due_at_ms: int | None = None
    expires_ms: int | None = None
    unique: str | None = None
    own_id: bool = False
    front: bool = False
    group: str | None = None
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    deadline: float | None = None
    """Until when its producer waits for room (monotonic); not stored."""
    keys: tuple[JobKey, ...] = ()
    planned_ms: int | None = None
    """The instant that a schedule has planned, at which it is first due whatever `due_at_ms` adds to it."""

    @property
    def placing_key(self) -> str | None:
        """The text of the unique key that picks the partition."""
        return self.keys[-1].text if self.keys and self.unique is None else self.unique

    @property
    def is_plain(self) -> bool:
        """True when it needs only an envelope and an entry at the tail."""
        return (
            self.priority == 0 and self.delay_ms is None and self.due_at_ms is None and self.expires_ms is None
            and self.unique is None and not self.own_id and not self.front
            and self.group is None and not self.limits and not self.tags and not self.keys and self.planned_ms is None
        )  # fmt: skip


def plain_entries(pairs: Sequence[Argument]) -> list[Entry]:
    """Return id, envelope, id, envelope, … as entries."""
    both: Sequence[Any] = pairs
    return [Entry(both[at], both[at + 1]) for at in range(0, len(both), 2)]


class ProducerSequence(msgspec.Struct):
    """
    A producer's identity and its push number: one push in flight, so that a repeat is answered and not carried out again.

    `resends_refused`: the producer pushes a refused call again under the same number, so a refusal is not final. The key of
    a sequence in Redis is called `lane:<identity>`.
    """

    identity: str
    number: int = 0
    resends_refused: bool = False
    key_names: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)  # of the keys of a plain push, by queue

    def next(self) -> int:
        """Return the number of the next push."""
        self.number += 1
        return self.number


class StalePush(Exception):
    """A newer push of this sequence was already answered."""


class InLine(QueueFull):
    """A queue is full, and the producer stands in the line of those that wait for room, `since` then (µs)."""

    def __init__(self, message: str, since: str) -> None:
        super().__init__(message)
        self.since = since


class WithdrawnPush(Exception):
    """A push of this number was withdrawn: it is not stored, and never will be under this number."""


def announce(known: str, *queues: str) -> Call[int]:
    """Return the call that adds *queues* to the set *known* of all queues."""
    return Command(SADD, (known,), queues, int)


def withdraw_names(known: str, *queues: str) -> Call[int]:
    """Return the call that removes *queues* from the set *known* of all queues."""
    return Command(SREM, (known,), queues, int)


def known_names(known: str) -> Call[list[str]]:
    """Return the call that reads the set *known* of all queues; `SOME_EXPIRE` may be among them."""
    return Command(SMEMBERS, (known,), (), _read_ids)


SOME_EXPIRE = "\t"
"""A member of the set of known queues beside their names: some of the queues go when nobody uses them."""


def are_known(known: str, *queues: str) -> Call[list[bool]]:
    """Return the call that tells which of *queues* are in the set *known* of all queues."""
    return Command(SMISMEMBER, (known,), queues, lambda reply: [one == 1 for one in reply])


def declare_queue(keys: QueueKeys) -> Call[bool]:
    """Return the call that records after which time the queue goes when nobody uses it, and how many events it keeps."""
    events = "" if keys.events_kept is None else str(keys.events_kept)
    return Call(DECLARE_QUEUE, (keys.conf, keys.none), (str(keys.expires), events), bool)


def look_at(expiring: str, times: Mapping[str, int]) -> Call[int]:
    """Return the call that notes in the set *expiring* when to look whether queues are gone: *times* by name, in ms."""
    return Command(ZADD, (expiring,), [str(word) for name, at in times.items() for word in (at, name)], int)


def expiring_names(expiring: str, now: int, most: int) -> Call[list[str]]:
    """Return the call that reads *most* names of the set *expiring* that are to be looked at by *now* (ms)."""
    return Command(ZRANGE, (expiring,), ("-inf", str(now), "BYSCORE", "LIMIT", "0", str(most)), _read_ids)


def stop_looking(expiring: str, *queues: str) -> Call[int]:
    """Return the call that takes *queues* out of the set *expiring*."""
    return Command(ZREM, (expiring,), queues, int)


def count_expiring(expiring: str) -> Call[int]:
    """Return the call that counts the set *expiring*."""
    return Command(ZCARD, (expiring,), (), int)


def time_to_live(key: str) -> Call[int]:
    """Return the call that tells how long *key* lives (ms): -1 for ever, -2 when there is none."""
    return Command(PTTL, (key,), (), int)


def exists(*keys: str) -> Call[bool]:
    """Return the call that tells whether one of *keys*, of one slot, exists."""
    return Command(EXISTS, keys, (), bool)


def delete_key(key: str) -> Call[int]:
    """Return the call that deletes one key."""
    return Command(DEL, (key,), (), int)


def wake(key: str) -> Call[int]:
    """Return the call that puts a token into the list *key* to wake a client blocked on it; it expires after a minute."""
    return Call(WAKE, (key,), (), int)


def push_plain(
    keys: QueueKeys, sequence: ProducerSequence, pairs: Sequence[Argument], *, max_length: int = 0
) -> Call[bool]:
    """
    Return the call that stores plain messages: *pairs* is id, envelope, id, envelope, …

    It yields True when the queue was new in Redis.
    """
    if (names := sequence.key_names.get(keys.prefix)) is None:
        names = (keys.lane(sequence.identity), keys.jobs, keys.ready[0], keys.wake, keys.conf, keys.dead)
        sequence.key_names[keys.prefix] = names
    sequence.number += 1
    number = str(sequence.number)
    args = (number, argument_of(max_length) if max_length else "0", str(keys.partitions), *pairs)
    return Call(
        PUSH_PLAIN, names, args, partial(_pushed_plain, keys, number), None if sequence.resends_refused else WITHDRAW
    )


def push(
    keys: QueueKeys, sequence: ProducerSequence, entries: Iterable[Entry], *, max_length: int = 0
) -> Call[list[str]]:
    """
    Return the call that stores *entries* in order, all or none. It yields an id each: an existing job's for a duplicate.

    The ids are `NewQueueIds` when the queue was new in Redis.
    """
    number = str(sequence.next())
    args, ids = push_arguments(number, keys, entries, max_length)
    return Call(
        PUSH, push_keys(keys, sequence.identity), args, _pushed(keys, number, ids),
        None if sequence.resends_refused else WITHDRAW,
    )  # fmt: skip


def push_numbered(
    keys: QueueKeys, identity: str, numbers: range, entries: Iterable[Entry], *, max_length: int = 0
) -> Call[int]:
    """
    Return the call that stores *entries*, which stand for *numbers* in the sequence *identity*, all or none.

    None is stored when some were before. It yields the highest number of the sequence that is stored then, a `NewQueueNumber`
    when the queue was new in Redis. Entries may be numbered one by one and pushed in any portions, however often: each is
    stored once. Raises WithdrawnPush.
    """
    args, _ = push_arguments(f"{numbers[-1]} {numbers[0]}", keys, entries, max_length)
    return Call(PUSH, push_keys(keys, identity), args, partial(_pushed_numbered, keys, numbers[-1]))


def push_arguments(
    number: str, keys: QueueKeys, entries: Iterable[Entry], max_length: int
) -> tuple[list[Argument], list[str | None]]:
    """Return the arguments of a push, and the id of each entry, None for one that the reply will name."""
    args: list[Argument] = [number, argument_of(max_length), str(keys.partitions), "0"]
    ids: list[str | None] = []
    run: list[Argument] = []
    plain_run = True
    for entry in entries:
        plain = entry.is_plain
        if plain is not plain_run and run:
            args += ["p" if plain_run else "s", str(len(run) // (2 if plain_run else 10)), *run]
            run = []
        plain_run = plain
        if plain:
            run += (entry.id, entry.rest)
            ids.append(entry.id)
        else:
            run += _special(entry)
            ids.append(None)
    if run:
        args += ["p" if plain_run else "s", str(len(run) // (2 if plain_run else 10)), *run]
    args[3] = str(len(ids))
    return args, ids


def fence(keys: QueueKeys, identity: str) -> Call[bool]:
    """
    Return the call that closes the sequence *identity* of one push for a day; it yields False if it was used or closed before.

    From then on that push is answered as late, unless it had been accepted; then it still is.
    """
    return Command(SET, (keys.lane(identity),), ("1\nlate", "NX", "PX", str(DAY_MS)), bool)


def _special(entry: Entry) -> tuple[Argument, ...]:
    return (
        entry.id, _marks(entry), entry.rest,
        _optional(entry.delay_ms), _optional(entry.due_at_ms), _optional(entry.expires_ms), str(entry.priority),
        write_attributes(entry.unique, entry.group, entry.limits, entry.tags, entry.keys),
        "1" if entry.own_id else "", "1" if entry.front else "",
    )  # fmt: skip


def _marks(entry: Entry) -> str:
    priority = f"p{entry.priority}" if entry.priority else ""
    return priority if entry.planned_ms is None else f"{priority} d{entry.planned_ms}"


def _optional(number: int | None) -> str:
    return "" if number is None else str(number)


def push_keys(keys: QueueKeys, identity: str) -> tuple[str, ...]:
    return (keys.lane(identity), keys.jobs, keys.due, keys.wake, keys.conf, keys.dead, *keys.ready, keys.none)


def status_of(number: str, reply: bytes) -> list[str]:
    """Return the words of the reply to push *number*, which follow that number. Raises WrongReply."""
    first, *words = reply.decode().split("\n") if isinstance(reply, bytes) else [""]
    if first.partition(" ")[0] != number:  # "<last> <first>" of a push that stands for several
        raise WrongReply(f"push {number} got the reply to another call")
    return words


_NEW_QUEUE = "\t"
"""The last word of the reply to a push that found its queue new in Redis."""


class NewQueueIds(list[str]):
    """The ids of a push that found its queue new in Redis: the queue's name must be made known again."""


class NewQueueNumber(int):
    """The number of a push that found its queue new in Redis, as `NewQueueIds`."""


def _pushed_plain(keys: QueueKeys, number: str, reply: bytes) -> bool:
    if reply == (number + "\nok").encode():
        return False
    status = status_of(number, reply)
    if status != ["ok", _NEW_QUEUE]:
        refused(keys, status)
    return True


def _pushed(keys: QueueKeys, number: str, ids: list[str | None]) -> Any:
    def decode(reply: bytes) -> list[str]:
        status, *special = status_of(number, reply)
        if status != "ok":
            refused(keys, [status, *special])
        return accepted_ids(special, ids)

    return decode


def accepted_ids(special: Sequence[str], ids: Sequence[str | None]) -> list[str]:
    """Return the id of each entry of a push that was accepted: those of *ids*, and where it is None the next of the reply."""
    answers = iter(special)
    whole = [id_ if id_ is not None else _accepted(next(answers)) for id_ in ids]
    return NewQueueIds(whole) if special[-1:] == [_NEW_QUEUE] else whole


def _pushed_numbered(keys: QueueKeys, number: int, reply: bytes) -> int:
    status, *rest = status_of(str(number), reply)
    if status == "withdrawn":
        raise WithdrawnPush
    if status not in {"ok", "late"}:
        refused(keys, [status, *rest])
    if status == "late":
        return int(rest[0])
    return NewQueueNumber(number) if rest[-1:] == [_NEW_QUEUE] else number


class ExistingId(str):
    """
    The id of a job that existed before: the push that named it made no job of its own, unless it is to run once more.

    `conflict` says what the push has done: kept, replaced or rerun.
    """

    __slots__ = ("conflict",)
    conflict: Literal["kept", "replaced", "rerun"]

    def __new__(cls, id: str, conflict: str = "") -> ExistingId:  # noqa: A002
        made = super().__new__(cls, id)
        made.conflict = conflict or "kept"  # type: ignore[assignment]
        return made


def _accepted(answer: str) -> str:
    if not answer.startswith("\t"):
        return answer
    id_, _, conflict = answer[1:].partition("\t")
    return ExistingId(id_, conflict)


def refused(keys: QueueKeys, words: Sequence[str]) -> NoReturn:
    """Raise the error of a push that was refused with *words*: the status, and what follows."""
    status, *rest = words
    queue = keys.queue
    if status in {"full", "wait"}:
        part = ", its part of the whole queue's max_length" if keys.partitions > 1 else ""
        message = (
            f"Queue '{queue}' holds {rest[0]} jobs and takes at most {rest[1]}{part}. Nothing was enqueued. "
            "Add workers, raise max_length, or try again later."
        )
        raise QueueFull(message) if status == "full" else InLine(message, rest[2])
    if status == "duplicate":
        raise Duplicate(public(queue, rest[0]), rest[1])
    if status == "schema":
        raise ConfigurationError(
            f"Queue '{queue}' was written by another version (layout {rest[0]}; this one knows 1 and 2). Upgrade this program."
        )
    if status == "partitions":
        raise PartitionCountMismatch(keys, rest[0])
    raise StalePush


class Settlement(msgspec.Struct):
    """The end or continuation of one leased job; `kind` is a letter of turn.lua's header, `attributes` those of its envelope."""

    kind: str
    id: str
    ms: int = 0
    record: bytes = b""
    state: bytes = b""
    attributes: str = ""
    own_id: bool = False

    @property
    def stays(self) -> bool:
        """True for what leaves the job leased to its worker; S, G and E do too, and are always sent right before an end of it."""
        return self.kind in {"M", "K", "T"}


class TurnReport(msgspec.Struct):
    """The part of a turn that a worker sends: settlements, counters of this minute, entries for the recently finished jobs."""

    done: list[str] = msgspec.field(default_factory=list)
    others: list[Settlement] = msgspec.field(default_factory=list)
    stats: dict[str, int] = msgspec.field(default_factory=dict)
    recent: list[bytes] = msgspec.field(default_factory=list)
    spawned: bool = False  # some settlements put entries into the outbox
    frees: int = 0  # those that may let another job of a group or at a limit start
    seconds: float = 0.0  # for which these ran
    results: dict[str, tuple[int, bytes]] = msgspec.field(default_factory=dict)
    """Of jobs in `done`: for how long (ms) which record is kept; (0, b"") of a value that is not kept."""
    attributes: dict[str, str] = msgspec.field(default_factory=dict)
    """The attributes of those in `done` that have any."""

    def __bool__(self) -> bool:
        return bool(self.done or self.others)

    def add_done(self, id: str, attributes: str) -> None:  # noqa: A002
        """Add a job that is simply done and has no id of its own, with the attributes of its envelope."""
        self.done.append(id)
        if attributes:
            self.attributes[id] = attributes

    def releases(self) -> tuple[dict[str, str], dict[str, str]]:
        """
        Return what jobs in `done` give back, by their ids: unique keys, and attributes that have keys or tags.

        The first are of jobs without a result that have one key until their end, and no other attribute.
        """
        keys, others, results = dict[str, str](), dict[str, str](), self.results
        for id_, attributes in self.attributes.items():
            if attributes[1:2] == "u" and attributes.find("\t", 2) < 0 and id_ not in results:
                keys[id_] = attributes[2:]
            elif "\tu" in attributes or "\tk" in attributes or "\tt" in attributes:
                others[id_] = attributes
        return keys, others

    def put_back(self, refused: TurnReport) -> None:
        """Add the content of a turn that the server *refused* with nothing done; it comes before what ended later."""
        self.done[:0], self.others[:0], self.recent[:0] = refused.done, refused.others, refused.recent
        for name, count in refused.stats.items():
            self.stats[name] = self.stats.get(name, 0) + count
        self.spawned = self.spawned or refused.spawned
        self.frees += refused.frees
        self.seconds += refused.seconds
        self.results.update(refused.results)
        self.attributes.update(refused.attributes)


class TurnReply(msgspec.Struct):
    """
    The reply to a turn. Times in ms by the server's clock; `next_due` is None when nothing is scheduled.

    `missing` are jobs that were ready but whose record the server has lost; each is reported once.
    """

    now: int
    held: int
    next_due: int | None
    more: bool
    lost: list[str]
    ids: list[str]
    envelopes: list[bytes]
    states: list[bytes | None]
    overdue: list[tuple[str, int]]
    cancelled: list[str]
    paused: bool
    missing: list[str] = msgspec.field(default_factory=list)
    outbox: bool = False  # it was checked, and is not empty
    schedules: list[str] = msgspec.field(default_factory=list)  # whose instant has come: this worker is to carry it out
    expires: bool = False  # the queue goes when nobody uses it
    has_series: bool = False  # several jobs of a group that runs one at a time may be among them


class WorkerUnregistered(Exception):
    """The worker was reaped, or Redis has lost its registration: its leases are gone."""


class StaleTurn(Exception):
    """A newer turn of this worker was already carried out."""


TURN_EPOCH_MS = 1_735_689_600_000
"""The beginning of 2025, from which the numbers of turns count; 8192 times such a number is exact in a double until 2059."""


def next_turn_number(last: int, now_ms: int) -> int:
    """Return the number of a worker's next turn: the instant *now_ms* of the server, always above *last*."""
    return max(last + 1, now_ms - TURN_EPOCH_MS)


def turn(
    keys: QueueKeys, worker: str, number: int, want: int, lease_ms: int, report: TurnReport, *, flags: str = ""
) -> Call[TurnReply]:
    """Return the call that settles *report* and leases up to *want* more jobs; *number* and `flags` as in turn.lua."""
    args: list[Argument] = [worker, str(number), str(want), str(lease_ms), flags]
    owned, released = report.releases() if report.attributes else ({}, {})
    if report.results:
        _add_results(args, report, owned)
    else:
        done = report.done
        if owned:
            done = list(owned) if len(owned) == len(done) else [*(id_ for id_ in done if id_ not in owned), *owned]
        args += (str(len(done)), *done, "0")
    lead = keys.unique_lead
    args += (str(len(owned)), *[lead + key for key in owned.values()], str(len(released)))
    for id_, attributes in released.items():
        args += (id_, attributes)
    args.append(str(len(report.others)))
    for one in report.others:
        args += (one.kind, one.id, str(one.ms), one.record, one.state, one.attributes, "1" if one.own_id else "")
    args.append(str(len(report.stats)))
    for counter, increment in report.stats.items():
        args += (counter, str(increment))
    args += (str(len(report.recent)), *report.recent)
    return Call(TURN, _turn_keys(keys, worker), args, partial(_read_turn, number))


def numbered_turn(call: Call[TurnReply], number: int) -> Call[TurnReply]:
    """Return the *call* of a turn with another *number*."""
    return Call(TURN, call.keys, [call.args[0], str(number), *call.args[2:]], partial(_read_turn, number))


def ageing_flag(ageing_ms: int) -> str:
    """Return the flag of a turn that raises what has waited so long; "" for 0."""
    return f"a{ageing_ms}" if ageing_ms else ""


def _add_results(args: list[Argument], report: TurnReport, last: Collection[str]) -> None:
    """
    Append the number and ids of what is done, and then the results by their time to live.

    The ids with a result come first, and those of *last* at the end.
    """
    groups: dict[int, tuple[list[str], list[bytes]]] = {}
    for id_, (keep_ms, record) in report.results.items():
        ids, records = groups.setdefault(keep_ms, ([], []))
        ids.append(id_)
        records.append(record)
    others = [id_ for id_ in report.done if id_ not in report.results]
    if len(report.results) + len(others) < len(report.done):  # an id is there twice, and the first has the result
        twice = Counter(report.done)
        others += [id_ for id_ in report.results for _ in range(twice[id_] - 1)]
    if last:
        others = [*(id_ for id_ in others if id_ not in last), *last]
    args.append(str(len(report.results) + len(others)))
    for ids, _ in groups.values():
        args += ids
    args += others
    args.append(str(len(groups)))
    for keep_ms, (_, records) in groups.items():
        args += (str(keep_ms), str(len(records)), *records)


@lru_cache(maxsize=256)  # the same at each turn of a worker
def _turn_keys(keys: QueueKeys, worker: str) -> tuple[str, ...]:
    return (
        keys.jobs, keys.state, keys.leased(worker), keys.workers, keys.due, keys.wake, keys.conf, keys.dead, keys.recent,
        keys.waiters, *keys.ready, keys.none,
    )  # fmt: skip


def _read_turn(number: int, reply: list[Any]) -> TurnReply:
    answered = reply[0] if isinstance(reply, list) and reply else None
    if answered == 0:
        raise WorkerUnregistered("Redis does not know this worker")
    if answered == -1:
        raise StaleTurn("a newer turn was carried out")
    if answered != number:
        raise WrongReply(f"turn {number} got the reply to another call")
    _, now, held, next_due, more, lost, ids, envelopes, states, overdue, cancelled, paused, missing, outbox, ticks = (
        reply
    )
    return TurnReply(
        now, held, next_due if next_due >= 0 else None, more & 1 == 1, [id_.decode() for id_ in lost],
        [id_.decode() for id_ in ids], envelopes, states,
        [(overdue[i].decode(), int(float(overdue[i + 1]))) for i in range(0, len(overdue), 2)] if overdue else [],
        [id_.decode() for id_ in cancelled], paused & 1 == 1, [id_.decode() for id_ in missing], outbox == 1,
        [name.decode() for name in ticks], paused & 2 == 2, more & 2 == 2,
    )  # fmt: skip


def register(
    keys: QueueKeys, worker: str, lease_ms: int, about: bytes, *, tasks: Collection[str] = (), for_work: bool = False
) -> Call[Registration]:
    """
    Return the call that registers *worker*; *for_work*: only where there is work, else nothing is written.

    *tasks*: the names of those that it runs. *about* holds their `task_set`.

    It tries all that the steps of a worker need, and raises ConfigurationError (E17) for what this user may not do.
    """
    names: tuple[str, ...] = (keys.leased(worker), keys.workers, keys.conf, keys.none)
    if for_work:
        names += (keys.due, keys.dead, *keys.ready)
        names += () if keys.foreign is None else (keys.foreign, keys.intake)
    # 65 bytes and more make the hash a hashtable: as a listpack of 500 a lease costs 12 times as much (design).
    return Call(
        REGISTER, names,
        (
            worker, str(lease_ms), about.ljust(65), str(keys.partitions), keys.reply_channel(worker),
            task_set(tasks) if tasks else "", "\n".join(sorted(tasks)),
        ), partial(_registered, keys),
    )  # fmt: skip


def task_set(names: Collection[str]) -> str:
    """Return a digest of the names of tasks, by which a registration refers to them."""
    return blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


class Registration(NamedTuple):
    """
    The reply to a registration: the server's time in ms, and whether the queue was new in Redis.

    `idle`: there is no work, so nothing was registered; `next_due` is then when the next job is due (ms; None: none is).
    """

    now: int
    new_queue: bool
    idle: bool = False
    next_due: int | None = None


def _registered(keys: QueueKeys, reply: list[Any]) -> Registration:
    if reply[0] == -4:
        return Registration(int(reply[1]), False, True, reply[2] if reply[2] >= 0 else None)
    if reply[0] == -3:
        raise _missing_right(keys, reply[1].decode())
    if reply[0] == -2:
        raise PartitionCountMismatch(keys, reply[1].decode())
    if reply[0] == -1:
        raise ConfigurationError(
            f"The queue was written by another version (layout {reply[1].decode()}; this one knows 1 and 2). Upgrade this worker."
        )
    return Registration(int(reply[0]), reply[1] == 1)


def _missing_right(keys: QueueKeys, command: str) -> ConfigurationError:
    rule, what = f"+{command.lower()}", f"send {command}"
    if command == "PUBLISH":
        channels = keys.reply_channel("*")
        rule, what = f"{rule} &{channels}", f"publish to the channels {channels}"
    return ConfigurationError(
        f"A worker of queue '{keys.queue}' must be able to {what}, and Redis refuses it to this user. Nothing was leased. Allow "
        f"it with: ACL SETUSER name {rule}   All that is needed: conveyor acl worker",
        code="E17",
    )


def heartbeat(keys: QueueKeys, worker: str, lease_ms: int) -> Call[bool]:
    """Return the call that renews all leases of *worker*; it yields False when the worker was reaped."""
    return Call(HEARTBEAT, (keys.leased(worker), keys.workers), (worker, str(lease_ms)), bool)


class IdleReply(msgspec.Struct):
    """
    The reply to an idle turn; times in ms by the server's clock. One of each list for each queue.

    `needs_turn` tells that there is something to do; `next_due` is None when nothing is scheduled.
    """

    now: int
    needs_turn: list[bool]
    next_due: list[int | None]


def idle_turn(members: Sequence[tuple[QueueKeys, str, int, bool]]) -> Call[IdleReply]:
    """
    Return the call that renews a worker that holds nothing in many queues of one slot, and finds those that need a turn.

    *members* is (keys, identity, lease in ms, whether Redis is asked what the identity holds) for each queue.
    """
    names: list[str] = []
    args: list[Argument] = []
    for keys, worker, lease_ms, compares in members:
        names += (keys.workers, keys.leased(worker), keys.upkeep, keys.due, keys.dead, keys.outbox, *keys.ready)
        args += (worker, str(lease_ms), "c" if compares else "")
    return Call(IDLE_TURN, names, args, _read_idle_turn)


def _read_idle_turn(reply: list[int]) -> IdleReply:
    now, *answers = reply
    return IdleReply(now, [one == -2 for one in answers], [one if one >= 0 else None for one in answers])


def find_work(members: Sequence[tuple[QueueKeys, int]]) -> Call[list[float | None]]:
    """
    Return the call that finds those of many queues at one server in which a turn would find something.

    *members* is (keys, lease in ms) for each queue. It yields for each in how many seconds its first job is due: infinity
    when none is scheduled, None where a turn would find something.
    """
    names: list[str] = []
    for keys, _ in members:
        listed = (keys.none, keys.none) if keys.foreign is None else (keys.foreign, keys.intake)
        names += (keys.workers, keys.conf, keys.none, keys.due, keys.dead, *keys.ready, *listed)
    return Call(FIND_WORK, names, [str(lease_ms) for _, lease_ms in members], _read_found_work)


def _read_found_work(reply: list[int]) -> list[float | None]:
    return [None if one == -2 else inf if one == -1 else one / 1000 for one in reply]


def reap(
    keys: QueueKeys, worker: str, *, end: int | None = None, crashed: bool = True,
    blame: tuple[Sequence[str], Sequence[str]] | None = None, cause: str = "", ago: float = 0.0,
) -> Call[int]:  # fmt: skip
    """
    Return the call that removes the registration of *worker* and returns its jobs; it yields their number, -1 when refused.

    *end* is the end of its lease that was seen twice; None when its death is certain. `crashed=False` charges no crash. Each
    job counts a start, because it may have begun, and no run goes uncounted. *blame* is (ids that ended the worker, ids that
    may have ended it): only these are charged, the second ones only with a possible crash. None: all jobs are charged. Each
    crash leaves an error in the history of its job: *cause* in words ("": no error), so many seconds *ago*.
    """
    names = (
        keys.leased(worker), keys.workers, keys.jobs, keys.state, keys.wake, keys.waiters, *keys.ready, keys.none, keys.due,
        keys.conf,
    )  # fmt: skip
    if not crashed:
        return Call(REAP, names, (worker, _optional(end), "leave"), int)
    how, ids = ("crash", ("", "")) if blame is None else ("blame", tuple("\n".join(ids) for ids in blame))
    return Call(REAP, names, (worker, _optional(end), how, *ids, cause, str(round(ago * 1000))), int)


def extend(keys: QueueKeys, worker: str, id: str, new_worker: str, ms: int, about: bytes) -> Call[bool]:  # noqa: A002
    """Return the call that moves one leased id to an identity of its own; it yields False when the lease is lost."""
    names = (keys.leased(worker), keys.leased(new_worker), keys.workers)
    return Call(EXTEND, names, (id, new_worker, str(ms), about.ljust(65)), bool)


def held_ids(keys: QueueKeys, worker: str) -> Call[list[str]]:
    """Return the call that lists what *worker* holds according to Redis, the oldest first."""
    return Call(HELD_IDS, (keys.leased(worker),), (), _read_ids)


def _read_ids(reply: list[bytes]) -> list[str]:
    return [id_.decode() for id_ in reply]


def cancel(keys: QueueKeys, id: str, *, delete: bool = False) -> Call[int]:  # noqa: A002
    """Return the call that cancels or deletes a job; it yields the code that the header of cancel.lua names."""
    return cancel_some(keys, Walk(ids=(id,)), delete=delete).then(lambda cancelled: cancelled.codes[0][1])


class Cancelled(NamedTuple):
    """One step of cancelling: of each job that was found the code that the header of cancel.lua names."""

    step: WalkStep
    codes: list[tuple[str, int]]


def cancel_some(keys: QueueKeys, walk: Walk, *, delete: bool = False) -> Call[Cancelled]:
    """Return the call that cancels or deletes the jobs that one step of *walk* finds."""
    names = (
        keys.jobs, keys.state, keys.due, keys.dead, keys.workers, keys.conf, keys.waiters, keys.none, keys.wake,
    )  # fmt: skip
    return Call(CANCEL, names, ("delete" if delete else "cancel", current_actor(), *walk.arguments()), _read_cancelled)


def _read_cancelled(reply: list[Any]) -> Cancelled:
    return Cancelled(read_step(reply), [(reply[at].decode(), reply[at + 1]) for at in range(5, len(reply), 2)])


class Redriven(int):
    """
    The number of dead letters put back, and their `ids`.

    `kept` are the others that were found, each with the job that holds its unique key now.
    """

    ids: Sequence[str] = ()
    kept: tuple[tuple[str, str], ...] = ()
    step: WalkStep


def redrive(keys: QueueKeys, *, limit: int = UNLIMITED, ids: Sequence[str] = ()) -> Call[Redriven]:
    """Return the call that puts back some dead letters: of the oldest at most *limit*, or those of *ids*."""
    return redrive_some(keys, Walk(states=("dead",), most=limit, ids=ids))


def redrive_some(keys: QueueKeys, walk: Walk) -> Call[Redriven]:
    """Return the call that puts back the dead letters that one step of *walk* finds."""
    names = (keys.dead, keys.jobs, keys.state, keys.wake, *keys.ready, keys.none, keys.conf)
    return Call(REDRIVE, names, (current_actor(), *walk.arguments()), _read_redriven)


def _read_redriven(reply: list[Any]) -> Redriven:
    moved, kept = _read_ids(reply[5]), _read_ids(reply[6])
    redriven = Redriven(len(moved))
    redriven.step, redriven.ids, redriven.kept = read_step(reply), moved, tuple(zip(kept[::2], kept[1::2], strict=True))
    return redriven


class Promoted(NamedTuple):
    """One step of promoting: the ids of the jobs that are ready now."""

    step: WalkStep
    ids: list[str]


def promote(keys: QueueKeys, id: str) -> Call[bool]:  # noqa: A002
    """Return the call that makes a scheduled job ready now; it yields False when it is not scheduled."""
    return promote_some(keys, Walk(ids=(id,))).then(lambda promoted: bool(promoted.ids))


def promote_some(keys: QueueKeys, walk: Walk) -> Call[Promoted]:
    """Return the call that makes the scheduled jobs ready that one step of *walk* finds."""
    names = (keys.due, keys.jobs, keys.wake, *keys.ready, keys.conf, keys.none)
    args = (current_actor(), *walk.arguments())
    return Call(PROMOTE, names, args, lambda reply: Promoted(read_step(reply), _read_ids(reply[5:])))


UpdateAnswer = Literal[1, 0, -1]
"""The answers of update.lua: changed, it does not wait, or it is another by now."""


def update(
    keys: QueueKeys, id: str, envelope: bytes, *, priority: int, attributes: str, rest: bytes, delay_ms: int | None = None,  # noqa: A002
    due_at_ms: int | None = None,
) -> Call[UpdateAnswer]:  # fmt: skip
    """
    Return the call that changes a job that waits, if it is stored as *envelope* says still.

    *rest* is its new envelope behind the first line. Without *delay_ms* and *due_at_ms* it is due when it was.
    """
    names = (keys.jobs, keys.due, keys.wake, *keys.ready, keys.conf, keys.none, keys.workers, keys.dead)
    digest = sha1(envelope, usedforsecurity=False).hexdigest()
    times = ("" if one is None else str(one) for one in (delay_ms, due_at_ms))
    args = (id, digest, *times, str(priority), attributes, rest, current_actor())
    return Call(UPDATE, names, args, int)  # type: ignore[arg-type]


def purge(keys: QueueKeys, place: str, limit: int) -> Call[tuple[int, int]]:
    """Return the call that removes one batch from `ready`, `due`, `dead` or `rerun`; it yields (entries taken, jobs removed)."""
    names = (
        keys.jobs, keys.state, keys.due, keys.dead, keys.conf, keys.waiters, *keys.ready, keys.none, keys.wake,
    )  # fmt: skip
    return Call(PURGE, names, (place, str(limit), current_actor()), lambda reply: (int(reply[0]), int(reply[1])))


class Remains(NamedTuple):
    """The counts of what keeps a queue or partition from being deleted; `unplaced` are jobs in no place."""

    ready: int = 0
    scheduled: int = 0
    leased: int = 0
    dead: int = 0
    outbox: int = 0
    unplaced: int = 0
    workers: int = 0
    schedules: int = 0


def delete(
    keys: QueueKeys, how: Literal["check", "forget", "delete"], token: str = "", beside: Sequence[str] = ()
) -> Call[Remains | None]:
    """
    Return the call that deletes a queue or partition that holds nothing and that nothing serves, and the keys *beside* it.

    It yields what is in the way, None for another number of partitions. *token* is that of the change that has shut it;
    "check" deletes nothing, "forget" only a queue that expired.
    """
    names = (
        keys.jobs, keys.due, keys.dead, keys.workers, keys.conf, *keys.ready, keys.outbox, keys.state, keys.recent, keys.waiters,
        keys.wake, keys.upkeep, keys.none,
    )  # fmt: skip
    names += () if keys.foreign is None else (keys.intake, keys.foreign)
    return Call(
        DELETE, names, (how, token, *beside), lambda reply: None if reply[0] == -1 else Remains(*map(int, reply[1:]))
    )


def leave_room(prefix: str, entry: str) -> Call[bool]:
    """Return the call that takes the *entry* of a producer out of the line of the queue whose keys begin with *prefix*."""
    names = tuple(prefix + name for name in ("room", "conf", "jobs", "dead", "none"))
    return Call(LEAVE_ROOM, names, (entry,), bool)


def repair(keys: QueueKeys, ids: Sequence[str]) -> Call[tuple[int, int]]:
    """
    Return the call that puts those of *ids* back that are in no place, newest first.

    It yields how many, and how many records of cancelled jobs were removed.
    """
    names = (
        keys.jobs, keys.state, keys.due, keys.dead, keys.workers, keys.conf, keys.wake, *keys.ready, keys.none,
    )  # fmt: skip
    return Call(REPAIR, names, tuple(ids), lambda reply: (int(reply[0]), int(reply[1])))


def configure(keys: QueueKeys, setting: str, value: str) -> Call[bool]:
    """Return the call that changes a setting stored with the queue; an empty value removes it."""
    return Call(CONFIGURE, (keys.conf, keys.wake), (setting, value), bool)


def list_intake(keys: QueueKeys, limit: int, stem: str, task: str = "") -> Call[int]:
    """Return the call that moves raw entries of a plain list into the queue; it yields how many."""
    assert keys.foreign is not None
    names = (keys.jobs, keys.ready[0], keys.foreign, keys.intake, keys.wake)
    return Call(LIST_INTAKE, names, (str(limit), stem, write_envelope(task, b"")), int)


def await_result(keys: QueueKeys, id: str, channel: str) -> Call[tuple[str, bytes]]:  # noqa: A002
    """Return the call that reads an outcome or registers *channel* as waiting; it yields await_result.lua's (word, bytes)."""
    names = (keys.jobs, keys.state, keys.dead, keys.waiters, keys.result(id), keys.result_window(id))
    return Call(
        AWAIT_RESULT,
        names,
        (id, channel, "1" if may_arrive_later(id) else ""),
        lambda reply: (reply[0].decode(), reply[1] if len(reply) > 1 else b""),
    )


def forget(keys: QueueKeys, id: str, channel: str) -> Call[int]:  # noqa: A002
    """Return the call that stops waiting for an outcome."""
    return Call(FORGET, (keys.waiters,), (id, channel), int)


def about(**facts: Any) -> bytes:
    """Return facts about a worker as they are stored."""
    return to_json(facts)
