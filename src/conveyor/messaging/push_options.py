"""
The options of a push: checked before anything is stored, and turned into entries together with encoded bodies.

A queue with sealing wraps each body when its entry is made, since a body is sealed together with its id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from itertools import repeat
from time import monotonic
from typing import Any, ClassVar, NamedTuple, Protocol, TypedDict, TypeVar

import msgspec

from conveyor import ids as ident
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.key_text import group_key
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import EnvelopeOptions, write_envelope
from conveyor.payload.versions import sealed_name
from conveyor.store.client.durability import DurabilityRequest, durability_request
from conveyor.store.operations import Entry
from conveyor.units import LATEST_MS, LONGEST_MS, Duration, instant_ms, milliseconds

T = TypeVar("T")
logger = logging.getLogger("conveyor.app")
MAX_HEADERS = 8 * 1024
"""Bytes that the headers of one message may take."""


@dataclass(slots=True)
class Outgoing:
    """
    A job or a message that is about to be stored, as a middleware's `push` sees it.

    A job has a `task`, `args` and `kwargs`. A message has a `body`, and `task` is empty; one that is published has a `topic`,
    and `queue` is empty. All but `task`, `topic` and `version` may be changed, of a message `queue` neither, nor what only a
    job has: `timeout_ms`, `keep_ms`, `attempts`. `headers` reach the job as `context.headers`, a consumer as
    `message.headers`, and `tags` likewise. Times in ms. `id` is the caller's own, None when one will be made. None elsewhere:
    as the task, or the queue, has it. `room_timeout_ms`: how long its producer waits for room in a full queue. `origin`: the id of
    the job that this one runs again. `batch`: a mapping that all of one call share (``enqueue_many``, ``push_many``), for what a
    middleware keeps of them; None for one alone.
    """

    task: str
    queue: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    delay_ms: int | None = None
    at_ms: int | None = None
    expires_ms: int | None = None
    unique: str | None = None
    id: str | None = None
    front: bool = False
    timeout_ms: int | None = None
    keep_ms: int | None = None
    attempts: int | None = None
    version: int = 1
    body: Any = None
    tags: tuple[str, ...] = ()
    room_timeout_ms: int | None = None
    topic: str = ""
    group: str | None = None
    origin: str = ""
    batch: dict[Any, Any] | None = None


PushEnd = Callable[[BaseException | None], None]
"""Called when what was pushed is stored, or with the error that the call raises."""


class LoadKeys(NamedTuple):
    """The group key and the limits of one job or message, as its envelope holds them."""

    group: str | None
    limits: tuple[str, ...]


class OutgoingReader(Protocol):
    """Reads the keys of a message on its way out."""

    def read(self, outgoing: Outgoing, /) -> LoadKeys:
        """Return the keys; raises PayloadError."""
        ...


class PushMiddleware(Protocol):
    """Code around pushes."""

    def push(self, outgoing: Outgoing, /) -> PushEnd | None:
        """Look at a job or a message that is about to be stored, or change it; return what is called afterwards, if anything is."""
        ...


@dataclass(slots=True)
class _PushScope:
    batch: dict[Any, Any] | None
    ends: list[PushEnd] = field(default_factory=list)

    def close(self, error: BaseException | None) -> None:
        for end in reversed(self.ends):
            try:
                end(error)
            except Exception:
                logger.exception("the end of a push failed in a middleware")


_SCOPE: ContextVar[_PushScope | None] = ContextVar("conveyor.push", default=None)


_NO_SCOPE = nullcontext()


def push_scope(middlewares: Sequence[PushMiddleware], *, many: bool = False) -> AbstractContextManager[None]:
    """Return the block in which all of one call is pushed: *middlewares* are told its end. Without any it does nothing."""
    return _scoped(many=many) if middlewares else _NO_SCOPE


@contextmanager
def _scoped(*, many: bool) -> Iterator[None]:
    scope = _PushScope({} if many else None)
    token = _SCOPE.set(scope)
    try:
        yield
    except BaseException as error:
        scope.close(error)
        raise
    else:
        scope.close(None)
    finally:
        _SCOPE.reset(token)


def apply_middlewares(middlewares: Iterable[PushMiddleware], outgoing: Outgoing) -> None:
    """Have each middleware look at *outgoing*. Outside of a `push_scope` its push ends at once, as that of a spawned job does."""
    scope = _SCOPE.get()
    outgoing.batch = None if scope is None else scope.batch
    for middleware in middlewares:
        if (end := middleware.push(outgoing)) is not None:
            if scope is None:
                end(None)
            else:
                scope.ends.append(end)


@dataclass(frozen=True, slots=True)
class PreparedPush:
    """The checked options of a push; `head` is the part of the envelope before the body. Times in ms."""

    head: bytes
    priority: int = 0
    delay_ms: int | None = None
    due_at_ms: int | None = None
    expires_ms: int | None = None
    front: bool = False
    id: str | None = None
    unique: str | None = None
    durability_request: DurabilityRequest | None = field(default=None, compare=False)
    """The confirmation asked of the store; not stored."""
    group: str | None = None
    limits: tuple[str, ...] = ()
    """As `Entry.limits`."""
    deadline: float | None = field(default=None, compare=False)
    """Until when the push waits for room in a full queue (monotonic); not stored."""
    extra: EnvelopeOptions | None = field(default=None, compare=False)
    """The headers and the version that stand in `head`."""
    tags: tuple[str, ...] = ()
    wraps: ClassVar[bool] = False
    """True when an entry needs its body wrapped."""

    is_plain: bool = field(init=False, repr=False, compare=False)
    """True when a message needs nothing but its envelope, appended at the tail."""

    def __post_init__(self) -> None:
        plain = (
            not self.wraps and not self.tags and self._placing() == (0, None, None, None, False, None, None, None, ())
        )
        object.__setattr__(self, "is_plain", plain)

    def _placing(self) -> tuple[object, ...]:
        return (
            self.priority, self.delay_ms, self.due_at_ms, self.expires_ms, self.front, self.id, self.unique, self.group,
            self.limits,
        )  # fmt: skip

    def entry(self, fresh_id: str, envelope: bytes) -> Entry:
        """Return the entry for *envelope* (head and body), with *fresh_id* unless the caller gave an id."""
        return Entry(
            fresh_id if self.id is None else self.id,
            envelope,
            priority=self.priority,
            delay_ms=self.delay_ms,
            due_at_ms=self.due_at_ms,
            expires_ms=self.expires_ms,
            unique=self.unique,
            own_id=self.id is not None,
            front=self.front,
            tags=self.tags,
            deadline=self.deadline,
            group=self.group,
            limits=self.limits,
        )


class TopicManyOptions(TypedDict, total=False):
    """The options of `publish_many`."""

    delay: Duration
    at: datetime | None
    priority: int
    group: str | None
    expires: Duration | None
    headers: Mapping[str, str] | None
    front: bool
    tags: Iterable[str] | None
    fsync: bool | None
    wait_replicas: int | None
    wait_timeout: Duration | None


class TopicOptions(TopicManyOptions, total=False):
    """The options of `publish`."""

    id: str | None
    unique: str | None


class PushManyOptions(TopicManyOptions, total=False):
    """The options of `push_many`."""

    timeout: Duration | None


class PushOptions(PushManyOptions, TopicOptions, total=False):
    """The options of `push`."""


PLAIN_PUSH = PreparedPush(write_envelope("", b""))
"""A push without options."""


def prepare_push(
    *,
    id: str | None = None,  # noqa: A002
    delay: Duration = 0,
    at: datetime | None = None,
    priority: int = 0,
    group: str | None = None,
    unique: str | None = None,
    expires: Duration | None = None,
    headers: Mapping[str, str] | None = None,
    tags: Iterable[str] | None = None,
    fsync: bool | None = None,
    wait_replicas: int | None = None,
    wait_timeout: Duration | None = None,
    front: bool = False,
    timeout: Duration | None = None,
    version: int = 1,
) -> PreparedPush:
    """Check the options of a push and return them. Raises ConfigurationError, PayloadError."""
    delay_ms = milliseconds(delay, name="delay")
    if at is not None and delay_ms:
        raise ConfigurationError("Give delay or at, not both. Nothing was stored.")
    _check_priority(priority)
    if front and (delay_ms or at is not None):
        raise ConfigurationError(
            "front=True is for a message that is ready now, without delay or at. Nothing was stored."
        )
    expires_ms = None if expires is None else milliseconds(expires, name="expires")
    if expires_ms == 0:
        raise ConfigurationError("expires must be longer than 0: such a message would never run. Nothing was stored.")
    extra = _extra(headers, version)
    return PreparedPush(
        write_envelope("", b"", extra),
        extra=extra,
        priority=priority,
        delay_ms=delay_ms or None,
        due_at_ms=None if at is None else instant_ms(at),
        expires_ms=expires_ms,
        front=bool(front),
        id=None if id is None else ident.own_id(id),
        unique=None if unique is None else ident.unique_key(unique),
        tags=ident.tag_texts(tags),
        group=None if group is None else group_key(group),
        durability_request=durability_request(fsync, wait_replicas, wait_timeout),
        deadline=None if timeout is None else monotonic() + milliseconds(timeout, name="timeout") / 1000,
    )


def pass_through(
    middlewares: Iterable[PushMiddleware],
    queue: str,
    value: Any,
    options: PreparedPush,
    load_keys: OutgoingReader | None = None,
    *,
    topic: str = "",
) -> tuple[Any, PreparedPush]:
    """
    Return a message and its options as *middlewares* leave them, with the group and the limits that *load_keys* reads then.

    Raises ConfigurationError, PayloadError.
    """
    extra = options.extra or EnvelopeOptions()
    outgoing = Outgoing(
        "", queue, headers=dict(extra.headers), priority=options.priority, delay_ms=options.delay_ms,
        at_ms=options.due_at_ms, expires_ms=options.expires_ms, unique=options.unique, id=options.id, front=options.front,
        version=extra.version, body=value, tags=options.tags, group=options.group, topic=topic,
    )  # fmt: skip
    apply_middlewares(middlewares, outgoing)
    for name, fixed in (
        ("task", ""), ("queue", queue), ("version", extra.version), ("args", ()), ("kwargs", {}), ("timeout_ms", None),
        ("keep_ms", None), ("attempts", None), ("room_timeout_ms", None), ("topic", topic),
    ):  # fmt: skip
        if (given := getattr(outgoing, name)) != fixed:
            raise ConfigurationError(
                f"A middleware has set outgoing.{name} to {given!r}, and a message of queue {queue!r} has {fixed!r} there. "
                'Of a message, whose `task` is "", it may change the body, the headers and when it is due. '
                "Nothing was stored."
            )
    check_times(outgoing)
    _check_priority(outgoing.priority)
    extra_left = _extra(outgoing.headers, extra.version)
    group = None if outgoing.group is None else group_key(outgoing.group)
    limits = options.limits if load_keys is None else load_keys.read(outgoing).limits
    changed = replace(
        options, head=write_envelope("", b"", extra_left), extra=extra_left, priority=outgoing.priority,
        delay_ms=outgoing.delay_ms or None, due_at_ms=outgoing.at_ms, expires_ms=outgoing.expires_ms,
        front=bool(outgoing.front), id=None if outgoing.id is None else ident.own_id(outgoing.id),
        unique=None if outgoing.unique is None else ident.unique_key(outgoing.unique), tags=ident.tag_texts(outgoing.tags),
        group=group, limits=limits,
    )  # fmt: skip
    return outgoing.body, changed


def for_topic(options: PreparedPush, topic: str) -> PreparedPush:
    """Return *options* for a message that was published to *topic*, which the envelope names."""
    extra = msgspec.structs.replace(options.extra or EnvelopeOptions(), topic=topic)
    return replace(options, head=write_envelope("", b"", extra), extra=extra)


def check_times(outgoing: Outgoing) -> None:
    """Raise ConfigurationError for times of a job or a message that a middleware has left impossible."""
    for name in ("delay_ms", "at_ms", "expires_ms"):
        ms = getattr(outgoing, name)
        least, most = int(name == "expires_ms"), LATEST_MS if name == "at_ms" else LONGEST_MS
        if ms is not None and (not isinstance(ms, int) or isinstance(ms, bool) or not least <= ms <= most):
            raise ConfigurationError(
                f"outgoing.{name} is a whole number of milliseconds from {least} to {most:,}, not {ms!r}. Nothing was stored."
            )
    later = [name for name in ("delay_ms", "at_ms") if getattr(outgoing, name)] + ["front"] * bool(outgoing.front)
    if len(later) > 1:
        raise ConfigurationError(f"outgoing has {' and '.join(later)}, of which one is possible. Nothing was stored.")


def _check_priority(priority: object) -> None:
    if not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority <= 9:
        raise ConfigurationError(f"priority must be a whole number from 0 to 9, not {priority!r}. Nothing was stored.")


def _extra(headers: Mapping[str, str] | None, version: int) -> EnvelopeOptions | None:
    if not headers:
        if headers is None or isinstance(headers, Mapping):
            return None if version == 1 else EnvelopeOptions(version=version)
        raise PayloadError(f"headers must be a dict of text, not {type(headers).__name__}. Nothing was stored.")
    if not isinstance(headers, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in headers.items()
    ):
        raise PayloadError("headers must be a dict whose keys and values are text. Nothing was stored.")
    extra = EnvelopeOptions(headers=dict(headers), version=version)
    try:
        size = len(write_envelope("", b"", extra))
    except UnicodeEncodeError:
        raise PayloadError(
            "headers hold text that is not Unicode (a lone surrogate). Nothing was stored.", code="E04"
        ) from None
    if size > MAX_HEADERS:
        raise PayloadError(
            f"headers take {size:,} bytes, and the limit is {MAX_HEADERS:,}. Nothing was stored.", code="E21"
        )
    return extra


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedPush(PreparedPush):
    """The options of a push to a queue with sealing. Never plain, since each body is bound to its id."""

    sealing: PayloadPipeline
    queue: str
    version: int
    wraps: ClassVar[bool] = True

    def is_large(self, body: bytes) -> bool:
        """Tell whether *body* goes to the blob store."""
        return self.sealing.is_large(body, b"payload")

    def entry(self, fresh_id: str, envelope: bytes) -> Entry:
        """Return the entry for *envelope*, with its body wrapped."""
        id_ = fresh_id if self.id is None else self.id
        task = sealed_name("", self.version)
        body = self.sealing.wrap(envelope[len(self.head) :], queue=self.queue, task=task, id=id_)
        return PreparedPush.entry(self, fresh_id, self.head + body)


def each_of(values: Iterable[T]) -> Iterator[T]:
    """Return the messages of one call one by one. Raises ConfigurationError for what holds none."""
    if not isinstance(values, Iterable):
        raise ConfigurationError(
            f"push_many and publish_many take several messages, such as a list, not {values!r:.100}."
        )
    return iter(values)


def with_sealing(options: PreparedPush, sealing: PayloadPipeline | None, queue: str, version: int) -> PreparedPush:
    """Return *options* for a queue with that sealing (None: no sealing)."""
    if sealing is None:
        return options
    given = {field.name: getattr(options, field.name) for field in fields(PreparedPush) if field.init}
    return SealedPush(**given, sealing=sealing, queue=queue, version=version)


def make_entries(
    options: PreparedPush, own: Sequence[PreparedPush], ids: Sequence[str], envelopes: Sequence[bytes]
) -> list[Entry]:
    """Return the entries for *envelopes*, each with its *own* options where there are any."""
    each = own or repeat(options, len(ids))
    return [one.entry(id_, envelope) for one, id_, envelope in zip(each, ids, envelopes, strict=True)]


async def amake_entries(
    options: PreparedPush, own: Sequence[PreparedPush], ids: Sequence[str], envelopes: Sequence[bytes]
) -> list[Entry]:
    """Return the entries for *envelopes*; bodies for the blob store are written on a thread."""
    if isinstance(options, SealedPush) and any(options.is_large(envelope) for envelope in envelopes):
        return await asyncio.to_thread(make_entries, options, own, ids, envelopes)
    return make_entries(options, own, ids, envelopes)
