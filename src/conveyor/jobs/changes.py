"""
Changing a job that waits, and running one again that has ended.

The new arguments are checked, and the group and the limits that follow from them are read, before anything is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError, PayloadError, ResultExpired, UnknownTask
from conveyor.jobs.job_options import check_priority
from conveyor.messaging.push_options import Outgoing
from conveyor.payload.pipeline import PLAIN, PayloadPipeline
from conveyor.payload.records import (
    Envelope,
    EnvelopeOptions,
    Outcome,
    RunRecord,
    write_attributes,
    write_envelope,
)
from conveyor.payload.sealed_records import stored_arguments
from conveyor.payload.versions import OldPayload, sealed_name, upcast_body
from conveyor.store import operations
from conveyor.store.operations import UpdateAnswer
from conveyor.store.script import Call
from conveyor.units import Duration, instant_ms, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.uniqueness import TaskUniqueness
    from conveyor.payload.signature import TaskSignature
    from conveyor.store.inspection import JobRow
    from conveyor.store.keys import QueueKeys


class KnownTask(Protocol):
    """The part of a task that changing its jobs uses."""

    name: str
    core: Any
    settings: Any
    loads: bool
    outgoing: Outgoing
    signature: TaskSignature
    uniqueness: TaskUniqueness | None

    def enqueue(self, outgoing: Outgoing, request: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    async def aenqueue(
        self, outgoing: Outgoing, request: None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class ChangingCore(Protocol):
    """The part of an app's inside that changing a job uses."""

    @property
    def definitions(self) -> Mapping[str, Any]: ...
    @property
    def sealing(self) -> PayloadPipeline | None: ...


def open_arguments(
    task: KnownTask,
    envelope: Envelope,
    queue: str,
    id: str,  # noqa: A002
    sealing: PayloadPipeline | None,
) -> tuple[bytes, str | None]:
    """
    Return the encoded arguments of a job in this program's version of its task, and the name of its large body if it has one.

    *sealing* None: they are stored bare. Raises PayloadError, BlobUnavailable.
    """
    body, blob = envelope.body, None
    if sealing is not None:
        name = sealed_name(task.name, envelope.extra.version)
        reference = sealing.reference(body, queue=queue, task=name, id=id)
        blob = None if reference is None else reference.name
        body = sealing.unwrap(body, queue=queue, task=name, id=id, limit=task.signature.max_payload)
    version, current = envelope.extra.version, task.settings.version
    if version < current and task.settings.upcast is not None:
        signature = task.signature
        old = OldPayload(f"The payload of {task.name}()", signature.max_payload, signature.formats, call=True)
        body = upcast_body(body, version, current, task.settings.upcast, old)
    return body, blob


class JobChange:
    """The changes that `job.update` was asked for, checked as far as it goes without the job. Raises ConfigurationError."""

    def __init__(
        self, core: ChangingCore, delay: Duration | None, at: datetime | None, priority: int | None,
        args: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        if delay is not None and at is not None:
            raise ConfigurationError("update(delay=…, at=…): give one of them. Nothing was changed.")
        if delay is None and at is None and priority is None and args is None:
            raise ConfigurationError("update() takes what is to change: delay, at, priority or args.")
        if args is not None and not (isinstance(args, Mapping) and all(isinstance(name, str) for name in args)):
            raise ConfigurationError('update(args=…) takes arguments by name: {"tenant": "b"}. Nothing was changed.')
        self._core = core
        self._delay_ms = None if delay is None else milliseconds(delay, name="delay")
        self._due_at_ms = None if at is None else instant_ms(at)
        self._priority = None if priority is None else check_priority(priority)
        self._arguments = dict(args or {})
        self.replaced_blob: str | None = None
        """The name of the large body that the job had, when it has another one now."""

    def call(self, keys: QueueKeys, row: JobRow) -> Call[UpdateAnswer]:
        """Return the call that changes the job, as it was read; raises PayloadError, ConfigurationError and UnknownTask."""
        envelope = row.envelope
        if keys.foreign is not None:
            raise ConfigurationError(
                f"Job {row.id} is an entry of the plain list {keys.queue!r}, which other programs write. Nothing was changed."
            )
        attributes, rest = envelope.attributes, row.raw[row.raw.index(b"\n") :]
        if self._arguments:
            attributes, rest = self._with_arguments(keys, row)
        return operations.update(
            keys, row.id, row.raw, delay_ms=self._delay_ms, due_at_ms=self._due_at_ms,
            priority=envelope.priority if self._priority is None else self._priority, attributes=attributes, rest=rest,
        )  # fmt: skip

    def _with_arguments(self, keys: QueueKeys, row: JobRow) -> tuple[str, bytes]:
        """Return the attributes and the envelope behind its first line with the new arguments."""
        envelope, id_ = row.envelope, row.id
        task = cast("KnownTask | None", self._core.definitions.get(envelope.task))
        if not envelope.task:
            raise ConfigurationError(f"{id_} is a message, which has no arguments by name. Nothing was changed.")
        if task is None:
            raise UnknownTask(
                f"This program does not know the task {envelope.task!r}, so it cannot check arguments. Import the module that "
                "defines it. Nothing was changed."
            )
        if envelope.extra.version > task.settings.version:
            raise ConfigurationError(
                f"Job {id_} has version {envelope.extra.version} of {task.name}, and this program knows {task.settings.version}. "
                "Nothing was changed."
            )
        sealing = self._core.sealing or PLAIN
        try:
            body, blob = open_arguments(task, envelope, keys.queue, id_, sealing)
            before = task.signature.changed(body, {})
            after = task.signature.changed(body, self._arguments)
            encoded = task.signature.encode(*after)
            attributes = _attributes(task, keys, envelope, before, after)
        except PayloadError as error:
            raise of_change(error) from None
        self.replaced_blob = blob
        name = sealed_name(task.name, task.settings.version)
        stored = sealing.wrap(encoded, queue=keys.queue, task=name, id=id_)
        extra = msgspec.structs.replace(envelope.extra, version=task.settings.version)
        return attributes, write_envelope(task.name, stored, extra)


CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


def _attributes(
    task: KnownTask, keys: QueueKeys, envelope: Envelope, before: CallArguments, after: CallArguments
) -> str:
    """Return the attributes with the group and the limits of the new arguments. Raises ConfigurationError for a unique key."""
    unique = task.uniqueness
    if unique is not None:
        derived = [key.text for key in unique.keys(None, *before)] == [key.text for key in envelope.keys]
        named = None if derived else ""  # the caller gave a key in the place of that of the arguments
    if unique is not None and unique.keys(named, *before) != unique.keys(named, *after):
        raise ConfigurationError(
            f"The new arguments have another unique key of {task.name} than the old ones, and a job keeps its key. Cancel it and "
            "enqueue the task again. Nothing was changed."
        )
    core = task.core
    queue = ids.logical(keys.queue)
    if not task.loads and queue not in core.limited:
        return envelope.attributes
    reader = core.load_keys(task, queue)
    loads = [reader.read(Outgoing(task.name, queue, args, kwargs)) for args, kwargs in (before, after)]
    if loads[0] == loads[1]:
        return envelope.attributes
    if keys.partitions > 1:
        raise ConfigurationError(
            f"The new arguments have another group or limit of {task.name}, and queue {queue!r} is spread over partitions by them. "
            "Cancel the job and enqueue the task again. Nothing was changed."
        )
    # A group that was given with the job itself stays.
    group = envelope.group if envelope.group != loads[0].group else loads[1].group
    kept = [one for one in envelope.attributes.split("\t")[1:] if one[:1] not in {"g", "l"}]
    return "".join("\t" + one for one in kept) + write_attributes(None, group, loads[1].limits)


class Again(NamedTuple):
    """The call that runs a job again: its task, its options and its arguments."""

    task: KnownTask
    outgoing: Outgoing
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def run_again(
    core: ChangingCore,
    queue: str,
    id: str,  # noqa: A002
    row: JobRow | None,
    outcome: Outcome | None,
) -> Again:
    """
    Return the call that runs a job again: a dead letter as *row*, another one that ended as *outcome* (None: nothing is kept).

    Raises ConfigurationError for a job that has not ended, UnknownTask, ResultExpired when its arguments are not kept, and
    PayloadError when they cannot be read.
    """
    origin = ids.public(queue, id)
    if row is not None and row.status != "dead":
        raise ConfigurationError(
            f"Job {origin} is {row.status}: only a job that has ended runs again. Nothing was enqueued."
        )
    run = outcome.run if outcome is not None else None
    envelope = row.envelope if row is not None else None if run is None else _envelope_of(run)
    if envelope is None or (row is None and not envelope.body):
        raise ResultExpired(
            f"The arguments of job {origin} are not kept: those of a job that ended well are kept with its result, up to 2 KiB, "
            "and those of a cancelled one are not. Nothing was enqueued."
        )
    task = cast("KnownTask | None", core.definitions.get(envelope.task))
    if not envelope.task:
        raise ConfigurationError(f"{origin} is a message. Put it back with redrive(). Nothing was enqueued.")
    if task is None:
        raise UnknownTask(
            f"This program does not know the task {envelope.task!r}. Import the module that defines it. Nothing was enqueued."
        )
    body, _ = open_arguments(task, envelope, queue, id, core.sealing or PLAIN)
    extra = envelope.extra
    outgoing = replace(
        task.outgoing, queue=ids.logical(queue), headers=dict(extra.headers), priority=envelope.priority, tags=tuple(envelope.tags),
        timeout_ms=extra.timeout_ms, keep_ms=extra.keep_ms, attempts=extra.attempts, group=envelope.group, origin=origin,
        unique=envelope.unique if task.uniqueness is None else None,
    )  # fmt: skip
    return Again(task, outgoing, *task.signature.changed(body, {}))


def _envelope_of(run: RunRecord) -> Envelope:
    """Return what is kept of the envelope of a job that ended well."""
    extra = EnvelopeOptions(headers=run.headers, version=run.version)
    return Envelope(run.task, stored_arguments(run), attributes=write_attributes(tags=run.tags), extra=extra)


def of_change(error: PayloadError) -> PayloadError:
    """Return an error of arguments as one of a change, after which all is as it was."""
    return PayloadError(re.sub("Nothing was (enqueued|stored)", "Nothing was changed", str(error)), code=error.code)
