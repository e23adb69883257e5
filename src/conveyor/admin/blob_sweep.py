"""
Removal of large bodies that no job needs any more.

Their job was cancelled, expired or purged, or was never pushed. What refers to a body is read in the order in which jobs
travel: database outboxes, outboxes of queues, queues. So a job that is delivered meanwhile is met at one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from conveyor.errors import ConfigurationError, PayloadError, StoreUnavailable
from conveyor.messaging import outbox
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import read_leniently
from conveyor.payload.versions import sealed_name
from conveyor.store.client.queue_scan import node_clients, queues_at
from conveyor.store.keys import database_outboxes
from conveyor.store.transport import replies
from conveyor.store.transport.cluster import Cluster
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor
    from conveyor.store.client.queue_scan import ServerClient

PAGE_SIZE = 500
MIN_AGE_MS = 3_600_000
"""Minimum age. A body is written before its job is pushed, so a younger one may belong to a job that is yet to come."""


def sweep(app: Conveyor, older: Duration = "1d", *, dry_run: bool = False) -> int:
    """
    Remove the app's large bodies that are *older* and belong to no job; return how many.

    Dead letters are jobs: their bodies are kept until they are purged. *older* is at least an hour. It must exceed the
    running time of jobs that spawn others, and the time for which a `Buffer` holds jobs back while Redis is away:
    their bodies are written before they are pushed. The store must belong to this namespace of this Redis alone.

    Reads the keys of the whole server, every job, and every row of the app's `Outbox` objects, which must have been
    made in this program. Removes nothing, and raises, unless all of it was read: PayloadError when a job refers to a
    body and the app's keys cannot open the reference; StoreUnavailable when a server does not answer, or changed
    meanwhile; the driver's error when a database does not answer; ConfigurationError for an app without a store, for an
    outbox that this program cannot read, and for one that delivers to this namespace and is unknown here.
    """
    sealing = app.sealing
    if sealing is None or sealing.store is None:
        raise ConfigurationError("sweep() needs an app with a store: Conveyor(large=FileStore(…)).")
    age_ms = milliseconds(older, name="older")
    if age_ms < MIN_AGE_MS:
        raise ConfigurationError(
            f"sweep(older={older!r}) must be at least an hour, because bodies are written before jobs."
        )
    # Before jobs are read, so that bodies of newer jobs are not among them.
    old_blobs = list(sealing.store.old(age_ms / 1000))
    referenced = _referenced_blobs(app, sealing)
    unneeded = [name for name in old_blobs if name not in referenced]
    for name in unneeded if not dry_run else ():
        sealing.store.delete(name)
    return len(unneeded)


def _referenced_blobs(app: Conveyor, sealing: PayloadPipeline) -> set[str]:
    names: set[str] = set()
    for queue, id_, data in _all_jobs(app):
        envelope, _, _ = read_leniently(data, None)
        try:
            name = sealed_name(envelope.task, envelope.extra.version)
            reference = sealing.reference(envelope.body, queue=queue, task=name, id=id_)
        except PayloadError as error:
            raise PayloadError(
                f"Job {queue}:{id_} refers to a large body that cannot be identified. Nothing was removed. {error}",
                code=error.code,
            ) from None
        if reference is not None:
            names.add(reference.name)
    return names


def _all_jobs(app: Conveyor) -> Iterator[tuple[str, str, bytes]]:
    """Yield queue, id and envelope of every job."""
    buffer = app.client.buffer
    if buffer is not None and len(buffer):
        raise StoreUnavailable(
            "Jobs wait in this program's buffer. Nothing was removed. Call sweep() when it is empty."
        )
    yield from _jobs_of_databases(app)
    with node_clients(app.client) as nodes:
        servers = [_server_run(node) for node in nodes]
        try:
            for node in nodes:
                yield from _jobs_of_outboxes(node)
            yield from _jobs_of_queues(nodes)
        except ConfigurationError as error:
            if error.code != "E33" or not isinstance(app.client.address, Cluster):
                raise
            raise _changed() from error  # the node has given the keys away
        if [_server_run(node) for node in nodes] != servers:
            raise _changed()


def _jobs_of_databases(app: Conveyor) -> Iterator[tuple[str, str, bytes]]:
    from conveyor.jobs.core import core_of  # only a sweep needs the inside of an app

    outboxes = core_of(app).outboxes
    key = database_outboxes(app.namespace)
    recorded: Any = app.client.execute("SMEMBERS", key, key=key)
    unknown = {name.decode() for name in recorded} - {one.table for one in outboxes}
    if unknown:
        raise ConfigurationError(
            f"The database outbox {', '.join(sorted(unknown))} delivers to namespace {app.namespace!r}, and this program "
            "does not know it: bodies of its rows would be removed. Nothing was removed. Import the module that makes "
            f"Outbox(app, connect) before sweep(). If that outbox is gone for good: SREM {key} {min(unknown)}"
        )
    for table in outboxes:
        for entry in table.entries():
            yield _read_entry(entry, f"A row of {table.table}")


def _jobs_of_outboxes(node: ServerClient) -> Iterator[tuple[str, str, bytes]]:
    for queue, key in list(queues_at(node, "outbox")):
        # In one read: the list is trimmed at its head meanwhile, so a second page would begin too late.
        for entry in _read(node, "LRANGE", key, "0", "-1"):
            yield _read_entry(entry, f"An entry of the outbox of queue '{queue}'")


def _jobs_of_queues(nodes: list[ServerClient]) -> Iterator[tuple[str, str, bytes]]:
    """Yield the jobs of all queues; look for further queues until there are none, since a slot may move meanwhile."""
    read: set[str] = set()
    while True:
        found = [(node, queue, key) for node in nodes for queue, key in queues_at(node, "jobs") if key not in read]
        if not found:
            return
        for node, queue, key in found:
            read.add(key)
            cursor = b"0"
            while True:
                cursor, page = _read(node, "HSCAN", key, cursor, "COUNT", str(PAGE_SIZE))
                for id_, data in zip(page[::2], page[1::2], strict=True):
                    yield queue, id_.decode(), data
                if cursor == b"0":
                    break


def _read_entry(data: bytes, where: str) -> tuple[str, str, bytes]:
    try:
        queue, entry = outbox.read(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise PayloadError(f"{where} cannot be read, so its body is not known. Nothing was removed. {error}") from None
    return queue, entry.id, entry.rest


def _server_run(node: ServerClient) -> str:
    """Return what tells one run of one server from any other: a page of HSCAN continues in the same run only."""
    reply = node.execute("INFO", "server", retry_for=node.retry_for)
    return replies.parse_info(reply)["run_id"]


def _changed() -> StoreUnavailable:
    return StoreUnavailable(
        "A server was replaced, or a slot moved, while the jobs were read, so some may have been missed. Nothing was "
        "removed. Call sweep() again."
    )


def _read(node: ServerClient, command: str, key: str, *rest: str | bytes) -> Any:
    return node.execute(command, key, *rest, key=key, retry_for=node.retry_for)
