"""The queues of an app: which are declared, with which options, and pushing prepared jobs to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Unpack
from weakref import WeakValueDictionary

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.messaging.declared_limits import (
    DeclaredLimit,
    LoadKeyReader,
    QueueLimits,
    job_reader,
    queue_owner,
    show_limit,
    task_owner,
)
from conveyor.messaging.limit_control import LimitPlace
from conveyor.messaging.limits import Concurrency
from conveyor.messaging.retry import Retry, retry_policy
from conveyor.payload.formats import FormatChoice, FormatCodec, FormatRegistry, codec_for
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability, DurabilityOptions, DurabilityRequest, requested_durability
from conveyor.store.fork_safety import lazy_property
from conveyor.store.max_length import UNBOUNDED, Full, MaxLength
from conveyor.store.operations import Entry
from conveyor.store.script import Argument
from conveyor.units import Duration, positive_ms

if TYPE_CHECKING:
    from conveyor.jobs.task import TaskDefinition
    from conveyor.messaging.limits import Rate
    from conveyor.messaging.partitions import Partitions
    from conveyor.messaging.plain_list import PlainList
    from conveyor.messaging.push_options import PushMiddleware
    from conveyor.messaging.queue import Queue, QueueSelection
    from conveyor.messaging.topic import TopicDirectory
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.keys import QueueKeys

    T = TypeVar("T")
    QueuesOf = Mapping[Queue[T], float] | Iterable[Queue[T]]
    """Queues of one type; a type checker knows that of their messages."""
    QueueNames = Mapping[Queue[Any] | str, float] | Mapping[str, float] | Iterable[Queue[Any] | str]

MOST_SELECTIONS = 64
"""Selections of queues whose shares are remembered, at most."""
UpcastMessage = Callable[[int, Any], Any]
"""From a version and a message of that version to the message as the next version has it."""

SHORTEST_EXPIRY_MS = 10_000
MOST_EVENTS = 1_000_000
"""Events that a queue, or a partition, keeps at most."""


class QueueRegistry:
    """
    The queues and plain lists that an app has declared, by name, and the way of prepared jobs to them.

    A name is declared once: the same declaration returns the same object, another one raises ConfigurationError.
    """

    def __init__(
        self,
        client: Client,
        *,
        lease_ms: int,
        max_payload: int,
        sealing: PayloadPipeline | None,
        formats: FormatRegistry,
        push_middlewares: Sequence[PushMiddleware],
    ) -> None:
        self.client = client
        self._push_middlewares = push_middlewares
        self.lease_ms = lease_ms
        self.max_payload = max_payload
        self.sealing = sealing
        self.formats = formats
        self.part_codec: FormatCodec[Any] = codec_for(
            Any, formats=formats, max_payload=max_payload, what="A partial result", lossy=True
        )
        """Encodes and decodes the values of `context.emit`."""
        self.max_whole = max_payload if sealing is None else sealing.max_whole
        """Bytes that a body may take before it is stored elsewhere."""
        self.definitions: dict[str, TaskDefinition] = {}
        """The tasks that are registered here, by name."""
        self.queues: dict[str, Queue[Any]] = {}
        self.plain_lists: dict[str, PlainList[Any]] = {}
        self.bounded: dict[str, Queue[Any]] = {}
        """Queues with a maximum length, a durability of their own, or partitions: their jobs take no short cut."""
        self.partitioned: dict[str, Partitions] = {}
        self.task_queues: dict[str, str] = {}
        """The queue of each task that is declared here, of another program's tasks too."""
        self._pushed_kinds: dict[str, str] = {}
        """Of queues whose declarations leave it open, the kind that this program has pushed: "" messages, or jobs of that task."""
        self._declared: dict[str, dict[str, object]] = {}
        self.limits: dict[str, QueueLimits] = {}
        """The limits declared in each queue, by the queue itself or by tasks."""
        self.limited: set[str] = set()
        """Queues with limits of their own."""
        self._load_key_readers: dict[tuple[str, str], LoadKeyReader] = {}
        self._selections: dict[object, QueueSelection] = {}
        self._undeclared: WeakValueDictionary[str, Queue[Any]] = WeakValueDictionary()
        self._keys: dict[str, QueueKeys] = {}

    # -- pushing --------------------------------------------------------------------------------------------------

    def keys(self, queue: str) -> QueueKeys:
        """Return the keys of *queue*."""
        keys = self._keys.get(queue)
        if keys is None:
            keys = self._keys[queue] = self.client.keys(queue)
        return keys

    def place(self, queue: str, entry: Entry, turns: dict[str, int] | None = None) -> str:
        """Return where a job of *queue* goes: the queue, or one of its partitions; *turns* as in `Partitions.partition_of`."""
        partitions = self.partitioned.get(queue)
        return queue if partitions is None else partitions.partition_of(entry, turns)

    def place_plain(self, queue: str, turns: dict[str, int]) -> str | None:
        """Return where all plain jobs of a bulk push to *queue* go, None when each has a turn; *turns* as in `place`."""
        partitions = self.partitioned.get(queue)
        return queue if partitions is None else partitions.filled_in_turn(turns)

    def start_push_plain(self, queue: str, pairs: Sequence[Argument]) -> Callable[[], None] | None:
        """Send plain jobs to a queue or partition; return what completes it, None where they are to be pushed as entries."""
        if self.partitioned and (partitions := self.partitioned.get(ids.logical(queue))) is not None:
            short = partitions.max_length is None and self._durability(queue) is None
            return partitions.start_send(queue, pairs) if short else None
        return None if queue in self.bounded else self.client.start_push_plain(self.keys(queue), pairs)

    def push(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]:
        """Push prepared entries whose place is known; return the id of each: its own, or that of a job that existed."""
        target = self.client.push_target(self._durability(queue), durability_request)
        if self.limits and not target.deferred and (limits := self.limits.get(ids.logical(queue))) is not None:
            limits.ensure(self.keys(queue))
        if self.partitioned and not target.deferred and (partitions := self.partitioned.get(ids.logical(queue))):
            self._max_length(ids.logical(queue), entries)
            return partitions.send(queue, entries, target)
        return self.client.push_with_room(target, self.keys(queue), entries, self._max_length(queue, entries))

    async def apush(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]:
        """Awaitable form of `push`."""
        target = self.client.push_target(self._durability(queue), durability_request)
        if self.limits and not target.deferred and (limits := self.limits.get(ids.logical(queue))) is not None:
            await limits.aensure(self.keys(queue))
        if self.partitioned and not target.deferred and (partitions := self.partitioned.get(ids.logical(queue))):
            self._max_length(ids.logical(queue), entries)
            return await partitions.asend(queue, entries, target)
        return await self.client.apush_with_room(target, self.keys(queue), entries, self._max_length(queue, entries))

    def _durability(self, queue: str) -> Durability | None:
        declared = self.bounded.get(ids.logical(queue) if self.partitioned else queue)
        return None if declared is None else declared.durability

    def _max_length(self, queue: str, entries: Sequence[Entry]) -> MaxLength:
        declared = self.bounded.get(queue)
        found = UNBOUNDED if declared is None else declared.max_length or UNBOUNDED
        if found.full != "block" and any(entry.deadline is not None for entry in entries):
            raise no_room_timeout(queue)
        return found

    # -- limits and groups ----------------------------------------------------------------------------------------

    def limits_in(self, queue: str) -> QueueLimits:
        """Return the limits declared in *queue*."""
        limits = self.limits.get(queue)
        if limits is None:
            partitions = self.partitioned.get(queue)
            limits = QueueLimits(self.client, queue, 1 if partitions is None else partitions.count)
            self.limits[queue] = limits
        return limits

    def load_keys(self, task: TaskDefinition, queue: str) -> LoadKeyReader:
        """Return what reads the group and the limits of the jobs of *task* in *queue*. Raises ConfigurationError."""
        reader = self._load_key_readers.get((task.name, queue))
        if reader is None:
            own, partitions = self.limits.get(queue), self.partitioned.get(queue)
            declared = (*task.limits, *(() if own is None else own.of(queue_owner(queue))))
            _refuse_uncounted(task, declared)
            reader = LoadKeyReader(
                declared,
                job_reader(task.signature.argument_reader),
                group_by=task.settings.group_by,
                partitions=1 if partitions is None else partitions.count,
            )
            if task.limits:
                self.limits_in(queue).add(task_owner(task.name), task.limits)
            self._load_key_readers[task.name, queue] = reader
        return reader

    def limits_of(self, task: TaskDefinition, queue: str) -> dict[str, DeclaredLimit]:
        """Return the limits that jobs of *task* have in *queue*, or in a partition of it, by name."""
        limits = self.limits.get(ids.logical(queue))
        own = () if limits is None else limits.of(queue_owner(limits.queue))
        return {one.name: one for one in (*task.limits, *own)}

    def find_limits(self, name: str) -> LimitPlace:
        """Return where the limits of a queue or a task are, and what this program declares there."""
        task = None if name in self.queues else self.definitions.get(name)
        return self._limit_place(name) if task is None else self._limit_place(task.queue, task.name)

    def find_groups(self, queue: str) -> LimitPlace:
        """Return where the groups of a queue are."""
        return self._limit_place(queue)

    def _limit_place(self, queue: str, task: str = "") -> LimitPlace:
        partitions = self.partitioned.get(queue)
        return LimitPlace(queue, task, self.limits.get(queue), 1 if partitions is None else partitions.count)

    def check_limits(self, task: TaskDefinition) -> None:
        """Raise ConfigurationError for a task whose jobs cannot have their limits or their group in its queue."""
        self._load_key_readers.pop((task.name, task.queue), None)
        if (limits := self.limits.get(task.queue)) is not None:
            limits.owners.pop(task_owner(task.name), None)  # those of a function that this one replaces
        if (listed := self.plain_lists.get(task.queue)) is not None or any(
            one.task == task.name for one in self.plain_lists.values()
        ):
            self._refuse_listed(task, listed.name if listed is not None else "")
        if task.loads or task.queue in self.limited:
            self.load_keys(task, task.queue)

    def _refuse_listed(self, task: TaskDefinition, name: str) -> None:
        """Raise ConfigurationError for a task with limits or groups that a plain list feeds."""
        if task.loads:
            raise ConfigurationError(
                f"Task {task.name!r} has limits or group_by, and the plain list {name or 'that feeds it'!r} holds bare "
                "documents, which carry no keys. Feed it by enqueue, or have the list's task enqueue one that has the limits."
            )

    # -- taking from several --------------------------------------------------------------------------------------

    def select(self, queues: QueueNames, call: str) -> QueueSelection:
        """Return the queues that *call* takes from; the same ones are remembered, with what each has had."""
        chosen = {self.source(queue, call): weight for queue, weight in queue_weights(queues, call).items()}
        key = frozenset(chosen.items())
        from conveyor.messaging.queue import QueueSelection

        found = self._selections.pop(key, None) or QueueSelection(chosen)
        self._selections[key] = found  # behind the others: the one that is used least is the first
        if len(self._selections) > MOST_SELECTIONS:
            del self._selections[next(iter(self._selections))]
        return found

    def source(self, queue: Queue[Any] | str, call: str) -> Queue[Any]:
        """Return a queue that *call* takes from as it was declared; one that was not holds any value."""
        if not isinstance(queue, str):
            if queue.client is not self.client:
                raise ConfigurationError(f"{call} takes from queues of one app, and {queue.name!r} belongs to another.")
            return queue
        known = self.queues.get(queue) or self.plain_lists.get(queue) or self._undeclared.get(queue)
        if known is None:
            known = self._undeclared[queue] = self._make_queue(
                ids.queue_name(queue), Any, 1, lease_ms=self.lease_ms, max_payload=self.max_whole, sealing=self.sealing,
                formats=self.formats,
            )  # fmt: skip
        return known

    # -- topics ---------------------------------------------------------------------------------------------------

    @lazy_property
    def topics(self) -> TopicDirectory:
        """The part that all topics share."""
        from conveyor.messaging.topic import TopicDirectory

        return TopicDirectory(self, self._push_middlewares)

    # -- messages or jobs -----------------------------------------------------------------------------------------

    def add_task(self, task: str, queue: str) -> None:
        """Note that the jobs of *task* go to *queue*: it takes no messages."""
        self.task_queues[task] = queue
        self._check_messages(queue)

    def admit_message(self, queue: str) -> None:
        """Raise ConfigurationError (E05) for a message to a queue that is known to hold jobs."""
        task = self._declared_task(queue)
        where = f"app.queue({queue!r})"
        if task is not None:
            raise ConfigurationError(
                f"Queue '{queue}' holds jobs: it is the queue of task '{task}'. A worker runs no messages, so this message was "
                f"not stored. Push it to a queue of its own instead of {where}, or enqueue a job.",
                code="E05",
            )
        if task := self._pushed_kinds.setdefault(queue, ""):
            raise ConfigurationError(
                f"Queue '{queue}' holds jobs: this program has enqueued jobs of task '{task}' in it. A worker runs no messages, "
                f"so this message was not stored. Push it to a queue of its own instead of {where}, or enqueue a job.",
                code="E05",
            )
        if (declared := self.queues.get(queue)) is not None:
            declared.admit = None

    def admit_job(self, queue: str, task: str) -> None:
        """Raise ConfigurationError (E05) for a job of *task* in a queue, not its own, that is known to hold messages."""
        if self._declared_task(queue) is not None:
            return
        declared, listed = self._declared.get(queue, {}), self.plain_lists.get(queue)
        if listed is not None and listed.task is None:
            why = f"app.plain_list({queue!r}) declares it without a task"
        elif listed is None and declared.get("type", Any) is not Any:
            why = f"app.queue({queue!r}, {_option_text(declared['type'])}) declares their type"
        elif declared.get("upcast") is not None or declared.get("format") is not None:
            why = f"app.queue({queue!r}, …) declares how messages are written"
        elif self._pushed_kinds.setdefault(queue, task) == "":
            why = "this program has pushed messages to it"
        else:
            self._check_messages(queue)
            return
        raise ConfigurationError(
            f"Queue '{queue}' holds messages: {why}. A consumer of messages runs no jobs, so this job of '{task}' was not "
            "stored. Enqueue it in a queue of its own, or push a message.",
            code="E05",
        )

    def _declared_task(self, queue: str) -> str | None:
        return next((task for task, its_queue in self.task_queues.items() if its_queue == queue), None)

    def _check_messages(self, queue: str) -> None:
        """Have the next message to *queue* checked: what is known of it has changed."""
        if (declared := self.queues.get(queue)) is not None:
            declared.admit = partial(self.admit_message, queue)

    def places_of(self, known: Iterable[str], task: str, queue: str | None) -> list[QueueKeys]:
        """
        Return where jobs of *task* may be: in *queue* with its partitions, or (None) in any queue of *known* and its own.

        A queue that no program has used yet is one of them, as it is declared here.
        """
        names = [name for name in known if queue is None or queue in {name, ids.logical(name)}]
        own = queue if queue is not None else self.task_queues.get(task)
        if own is not None and not any(own in {name, ids.logical(name)} for name in names):
            partitions = self.partitioned.get(own)
            names += [own] if partitions is None else [keys.queue for keys in partitions.keys]
        return [self.keys(name) for name in names]

    # -- declaring ------------------------------------------------------------------------------------------------

    def declare_queue(
        self,
        name: str,
        type: Any,  # noqa: A002  the contract's name
        *,
        partitions: int,
        lease: Duration | None,
        max_attempts: int | None,
        retry: Retry | None,
        max_crashes: int | None,
        max_length: int | None,
        full: Full,
        limits: Sequence[Rate | Concurrency] | None,
        ageing: Duration | None,
        expires: Duration | None,
        events: int | None,
        version: int,
        upcast: UpcastMessage | None,
        format: FormatChoice | None,  # noqa: A002
        **durability: Unpack[DurabilityOptions],
    ) -> Queue[Any]:
        """Return the queue of that name, made at its first declaration. Raises ConfigurationError."""
        ids.queue_name(name)
        lease_ms = self.lease_ms if lease is None else positive_ms(lease, "lease")
        ageing_ms = 0 if ageing is None else positive_ms(ageing, "ageing")
        expires_ms = _expiry_ms(name, expires, partitions, limits)
        if events is not None:
            check_events_kept(name, events)
        asks, policy = requested_durability(durability), retry_policy(retry, max_attempts, max_crashes)
        options = {
            "kind": "queue", "type": type, "lease_ms": lease_ms, "retry": policy, "max_length": max_length,
            "full": full, "ageing": ageing_ms, "partitions": partitions, "version": version, "upcast": upcast, "durability": asks,
            "format": format, "limits": _limit_list(limits), "expires": expires_ms, "events": events,
        }  # fmt: skip
        if self._is_declared(name, options):
            return self.queues[name]
        queue = self._make_queue(
            name, type, partitions, lease_ms=lease_ms, retry=policy, max_length=max_length, full=full, limits=limits,
            ageing_ms=ageing_ms, durability=asks, expires_ms=expires_ms, events=events,
            max_payload=self.max_whole, sealing=self.sealing,
            version=version, upcast=upcast,
            formats=self.formats.with_writer(format), middlewares=self._push_middlewares,
        )  # fmt: skip
        self._take_limits(queue)
        self.queues[name], self._declared[name] = queue, options
        if expires_ms or (events is not None and name not in self.partitioned):
            self._keys[name] = queue.keys
        self._check_messages(name)
        if max_length is not None or asks is not None or name in self.partitioned or name in self.limited:
            self.bounded[name] = queue
        return queue

    def _take_limits(self, queue: Queue[Any]) -> None:
        """Put the limits of tasks in *queue* beside its own. Raises ConfigurationError."""
        name, own = queue.name, bool(queue.limits.owners)
        tasks = [task for task in self.definitions.values() if task.queue == name]
        if name in self.limits or own:
            for owner, declared in self.limits[name].owners.items() if name in self.limits else ():
                queue.limits.add(owner, declared)
        for task in tasks if own or name in self.partitioned else ():
            declared = (*task.limits, *queue.limits.of(queue_owner(name)))
            _refuse_uncounted(task, declared)
            LoadKeyReader(declared, job_reader(task.signature.argument_reader), group_by=task.settings.group_by)
        if queue.limits.owners:
            self.limits[name] = queue.limits
        self.limited.update([name] if own else [])
        self._load_key_readers.clear()

    def _make_queue(self, name: str, type: Any, partitions: int, **options: Any) -> Queue[Any]:  # noqa: A002
        from conveyor.messaging.queue import Queue

        if partitions == 1 and isinstance(partitions, int) and not isinstance(partitions, bool):
            single: Queue[Any] = Queue(self.client, name, type, **options)
            single.directory = self
            return single
        from conveyor.messaging.partitioned_queue import PartitionedQueue

        queue: PartitionedQueue[Any] = PartitionedQueue(self.client, name, type, partitions=partitions, **options)
        for part in queue.parts:
            part.directory = self
        self.partitioned[name] = queue.partitions
        self._keys.update((keys.queue, keys) for keys in queue.partitions.keys)
        return queue

    def declare_plain_list(
        self,
        name: str,
        type: Any,  # noqa: A002  the contract's name
        *,
        task: str | None,
        lease: Duration | None,
        max_attempts: int,
        sealed: bool,
    ) -> PlainList[Any]:
        """Return the plain list of that name, made at its first declaration. Raises ConfigurationError."""
        if not isinstance(name, str) or not name or not ids.is_utf8(name):
            raise ConfigurationError(f"plain_list takes the name of a Redis list, a text, not {name!r}.")
        if sealed and self.sealing is not None and self.sealing.sealer is not None:
            raise ConfigurationError(
                f"plain_list({name!r}): programs that know nothing of Conveyor cannot seal, and this app takes only "
                "sealed payloads. If every program that can write to that list is trusted, say so: "
                "plain_list(…, sealed=False)."
            )
        if task is not None and (known := self.definitions.get(task)) is not None:
            self._refuse_listed(known, name)
        lease_ms = self.lease_ms if lease is None else positive_ms(lease, "lease")
        options = {
            "kind": "plain list", "type": type, "task": task, "lease_ms": lease_ms, "max_attempts": max_attempts,
        }  # fmt: skip
        if self._is_declared(name, options):
            return self.plain_lists[name]
        from conveyor.messaging.plain_list import PlainList

        plain_list: PlainList[Any] = PlainList(
            self.client, name, type, task=task, lease_ms=lease_ms, max_attempts=max_attempts,
            max_payload=self.max_payload, middlewares=self._push_middlewares,
        )  # fmt: skip
        self.plain_lists[name], self._declared[name] = plain_list, options
        self._keys[name] = plain_list.keys  # on the node where the list itself lies
        return plain_list

    def _is_declared(self, name: str, options: dict[str, object]) -> bool:
        if name not in self._declared:
            return False
        if self._declared[name] != options:
            raise ConfigurationError(
                f"{name!r} is declared twice, with different options: {_difference(self._declared[name], options)}. "
                "Declare it once and import it where it is used."
            )
        return True

    def queue_ageing_ms(self, queue: str) -> int:
        """Return how long a job of *queue* waits before it is raised by one priority, in ms; 0: it is not."""
        declared = self.queues.get(queue)
        return 0 if declared is None else declared.ageing_ms

    def queue_lease_ms(self, queue: str) -> int:
        """Return the lease of *queue* in ms."""
        declared = self.queues.get(queue, self.plain_lists.get(queue))
        return self.lease_ms if declared is None else declared.lease_ms


def no_room_timeout(queue: str) -> ConfigurationError:
    """Return the error for an enqueue that is to wait for room where nothing waits."""
    return ConfigurationError(
        f"options(room_timeout=…) is how long an enqueue waits for room, and queue '{queue}' does not wait: declare it with "
        f"app.queue({queue!r}, max_length=…, full='block'). Nothing was enqueued."
    )


def queue_weights(queues: QueueNames, call: str) -> dict[Queue[Any] | str, float]:
    """Return the weight of each queue: 1 where only names are given. Raises ConfigurationError."""
    try:
        if isinstance(queues, Mapping):
            weights: dict[Any, float] = dict(queues)
        else:
            weights = {} if isinstance(queues, str) else dict.fromkeys(queues, 1.0)
    except TypeError:
        weights = {}
    numbers = [one for one in weights.values() if isinstance(one, int | float) and not isinstance(one, bool)]
    if not weights or not all(hasattr(one, "keys") or isinstance(one, str) for one in weights):
        raise ConfigurationError(f"{call} takes a list of queues, such as ['mail', 'orders'], not {queues!r}.")
    if len(numbers) < len(weights) or not all(0 < one < math.inf for one in numbers):
        raise ConfigurationError(
            f"{call} takes queues with weights above 0, such as {{'mail': 3, 'orders': 1}}, not {queues!r}."
        )
    return weights


def _expiry_ms(name: str, expires: Duration | None, partitions: object, limits: object) -> int:
    """Return in ms after which time a queue goes that nobody uses, 0: it stays. Raises ConfigurationError."""
    if expires is None:
        return 0
    if (expires_ms := positive_ms(expires, "expires")) < SHORTEST_EXPIRY_MS:
        raise ConfigurationError(
            f"queue({name!r}): expires={expires!r} is too short, since a consumer that waits says so every 5 seconds. Give 10 "
            "seconds or more."
        )
    if partitions != 1:
        raise ConfigurationError(f"queue({name!r}): expires= is for a queue in one piece. Leave partitions= out.")
    if limits:
        raise ConfigurationError(
            f"queue({name!r}): expires= and limits= exclude each other, since the limits would be forgotten with the queue."
        )
    return expires_ms


def check_events_kept(name: str, events: object) -> None:
    """Raise ConfigurationError for a number of events that a queue cannot keep."""
    if not isinstance(events, int) or isinstance(events, bool) or not 0 <= events <= MOST_EVENTS:
        raise ConfigurationError(
            f"queue({name!r}): events= is how many events the queue keeps, 0 to {MOST_EVENTS:,}, not {events!r:.50}."
        )


def _limit_list(limits: object) -> tuple[object, ...]:
    """Return the limits of a queue as its declaration is compared; what is no list is refused where it is made."""
    return tuple(limits) if isinstance(limits, list | tuple) else (limits,) if limits is not None else ()


def _difference(one: dict[str, object], other: dict[str, object]) -> str:
    """Return the options in which two declarations differ, as each has them."""
    differing = [name for name in one if one[name] != other.get(name)]
    return " and ".join(
        ", ".join(f"{name}={_option_text(options.get(name))}" for name in differing) for options in (one, other)
    )


def _option_text(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("typing.")


def _refuse_uncounted(task: TaskDefinition, declared: Iterable[DeclaredLimit]) -> None:
    """Raise ConfigurationError for limits of what runs, which never see a job that is acknowledged before it runs."""
    for one in declared if task.settings.ack == "early" else ():
        if isinstance(one.limit, Concurrency):
            raise ConfigurationError(
                f"{show_limit(one.limit)} of {one.owner} counts jobs that run, and those of task {task.name!r}, which has "
                "ack='early', have ended before they run: any number could run at a time. "
                "Declare ack='late', or a Rate, which counts starts."
            )
