"""A job on its way out: its options, checked, and the entry that it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.messaging.push_options import MAX_HEADERS, Outgoing
from conveyor.payload.codec import show
from conveyor.payload.key_text import group_key
from conveyor.payload.records import EnvelopeOptions, JobKey, to_json, write_envelope
from conveyor.payload.versions import sealed_name
from conveyor.store.operations import Entry
from conveyor.units import Duration, instant_ms, milliseconds, positive_ms

if TYPE_CHECKING:
    from conveyor.jobs.uniqueness import TaskUniqueness
    from conveyor.payload.pipeline import PayloadPipeline


def with_options(
    outgoing: Outgoing,
    *,
    delay: Duration | None,
    at: datetime | None,
    priority: int | None,
    id: str | None,  # noqa: A002  the contract's name
    queue: str | None,
    unique: str | None,
    expires: Duration | None,
    headers: Mapping[str, str] | None,
    timeout: Duration | None,
    keep_result: Duration | None,
    retry: int | None,
    front: bool,
    tags: Iterable[str] | None,
    room_timeout: Duration | None,
    group: str | None,
) -> Outgoing:
    """Return a task's *outgoing* with the options of `.options(…)`, checked; raises ConfigurationError."""
    if delay is not None and at is not None:
        raise ConfigurationError("options(delay=…, at=…): give one of them.")
    if front and (delay is not None or at is not None):
        raise ConfigurationError("options(front=True) is for a job that is ready now, without delay or at.")
    if unique is not None and not isinstance(unique, str):
        raise ConfigurationError(f"options(unique=…) takes the key itself, a text, not {unique!r}.")
    return Outgoing(
        task=outgoing.task,
        version=outgoing.version,
        delay_ms=None if delay is None else milliseconds(delay, name="delay"),
        at_ms=None if at is None else instant_ms(at),
        priority=outgoing.priority if priority is None else check_priority(priority),
        id=None if id is None else ids.own_id(id),
        queue=outgoing.queue if queue is None else ids.queue_name(queue),
        unique=None if unique is None else ids.unique_key(unique),
        expires_ms=outgoing.expires_ms if expires is None else positive_ms(expires, "expires"),
        headers=check_headers(headers or {}),
        timeout_ms=None if timeout is None else positive_ms(timeout, "timeout"),
        keep_ms=None if keep_result is None else milliseconds(keep_result, name="keep_result"),
        attempts=None if retry is None else check_attempts(retry),
        front=front,
        tags=outgoing.tags if tags is None else ids.tag_texts([*outgoing.tags, *ids.tag_texts(tags)]),
        room_timeout_ms=None if room_timeout is None else milliseconds(room_timeout, name="room_timeout"),
        group=None if group is None else group_key(group),
    )


def entry_of(
    outgoing: Outgoing, body: bytes, sealing: PayloadPipeline | None, uniqueness: TaskUniqueness | None,
    limits: tuple[str, ...] = (), *, deferred: bool, needs: EnvelopeOptions | None = None,
) -> Entry:  # fmt: skip
    """
    Return the entry that is pushed; *body* are the encoded arguments, which *sealing* wraps; *uniqueness* is the task's,
    *limits* as in an entry, *needs* what the job requires of a worker.

    A *deferred* job gets an id as a spawned one has: Redis may hear of it later than a caller that waits for it.
    """
    keys: tuple[JobKey, ...] = ()
    delay_ms, unique = outgoing.delay_ms, outgoing.unique
    if uniqueness is not None:
        keys = uniqueness.keys(outgoing.unique, tuple(outgoing.args), outgoing.kwargs)
        delay_ms, unique = uniqueness.delay(outgoing), None
        if uniqueness.raises and deferred:
            uniqueness.refuse_deferred(outgoing.task)
    extra = needs
    options = (outgoing.timeout_ms, outgoing.keep_ms, outgoing.attempts)
    if outgoing.headers or outgoing.version != 1 or options != (None, None, None) or outgoing.origin:
        extra = msgspec.structs.replace(
            needs or EnvelopeOptions(), headers=check_headers(outgoing.headers), timeout_ms=options[0], keep_ms=options[1],
            attempts=options[2], version=outgoing.version, origin=outgoing.origin,
        )  # fmt: skip
    own = deferred or outgoing.id is not None
    if outgoing.id is not None:
        id_ = ids.given_id(outgoing.id)
    else:
        id_ = ids.new_spawned_id() if deferred else ids.new_id()
    if sealing is not None:
        name = sealed_name(outgoing.task, outgoing.version)
        body = sealing.wrap(body, queue=outgoing.queue, task=name, id=id_)
    return Entry(
        id_,
        write_envelope(outgoing.task, body, extra),
        priority=check_priority(outgoing.priority),
        delay_ms=delay_ms,
        due_at_ms=outgoing.at_ms,
        expires_ms=outgoing.expires_ms,
        unique=unique,
        own_id=own,
        front=outgoing.front,
        tags=ids.tag_texts(outgoing.tags),
        deadline=None if outgoing.room_timeout_ms is None else monotonic() + outgoing.room_timeout_ms / 1000,
        group=outgoing.group,
        limits=limits,
        keys=keys,
    )


def check_priority(priority: object) -> int:
    """Return a priority of 0-9; raises ConfigurationError."""
    if not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority <= 9:
        raise ConfigurationError(f"priority must be a whole number from 0 to 9 (higher goes first), not {priority!r}.")
    return priority


def check_attempts(attempts: object) -> int:
    """Return a number of attempts; raises ConfigurationError."""
    if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
        raise ConfigurationError(
            f"options(retry=…) takes a number of attempts of at least 1, not {attempts!r}. A whole policy belongs to "
            "the task: @app.task(retry=Retry(…))."
        )
    return attempts


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers of texts; raises PayloadError for others (E04) and for more than 8 KiB of them (E21)."""
    if not isinstance(headers, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in headers.items()
    ):
        raise PayloadError(f"headers must map texts to texts, not {show(headers)}. Nothing was enqueued.", code="E04")
    checked = dict(headers)
    try:
        size = len(to_json(checked)) if checked else 0
    except UnicodeEncodeError:
        raise PayloadError(
            "headers hold text that is not Unicode (a lone surrogate). Nothing was enqueued.", code="E04"
        ) from None
    if size > MAX_HEADERS:
        raise PayloadError(
            f"headers take {size:,} bytes, and the limit is {MAX_HEADERS:,}. Nothing was enqueued.", code="E21"
        )
    return checked
