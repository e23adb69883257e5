"""The routes of the HTTP API that a page follows: who looks, the snapshot of the whole, and what ended over time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from msgspec.structs import asdict
from starlette.responses import Response, StreamingResponse

from conveyor.admin.history import RANGES
from conveyor.admin.metrics import CONTENT_TYPE, load_json, load_view, render
from conveyor.dashboard.endpoint import ApiCall, ApiRoute, Field
from conveyor.dashboard.live import event
from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.store.transport.endpoint import in_thread

_MOST_NAMES = 1_000
_SCRAPE_SECONDS = 1.0
"""The age that a count may have for those who measure."""


def session(call: ApiCall) -> dict[str, Any]:
    """Return who asks, what they may do, and what is looked at."""
    core, admin = call.service.core, call.admin
    actions = sorted(call.access.actions)
    return {
        "user": call.access.user, "actions": actions, "view_payloads": call.access.allows("view_payloads"),
        "read_only": not set(actions) - {"view_payloads"}, "namespace": admin.client.namespace,
        "version": call.service.version, "server_url": str(admin.client.address),
        "live": "sse" if call.service.streams else "poll",
        "tasks": [] if core is None else sorted(core.tasks)[:_MOST_NAMES], "queues": admin.names()[:_MOST_NAMES],
    }  # fmt: skip


async def snapshot(call: ApiCall) -> dict[str, Any]:
    """Return the counts of all queues, and what asks for attention."""
    return await call.service.live.snapshot.get()


async def first_view(call: ApiCall, *, hour: bool) -> dict[str, Any]:
    """Return what a page shows first, as the stream sends it, with the last *hour*; nothing where that takes longer."""
    live = call.service.live
    asked = [in_thread(partial(session, call)), live.snapshot.get(), *([live.hour.get()] if hour else [])]
    try:
        async with asyncio.timeout(_FIRST_SECONDS):
            return dict(zip(("session", "snapshot", "history"), await asyncio.gather(*asked), strict=False))
    except (ConveyorError, TimeoutError):
        return {}


async def overview(call: ApiCall) -> dict[str, Any]:
    """Return the snapshot with the findings of the doctor."""
    live = call.service.live
    return {**await live.snapshot.get(), **await live.findings.get()}


def history(call: ApiCall) -> dict[str, Any]:
    """Return what ended in each minute or hour."""
    return asdict(call.admin.history(call["range"], queue=call["queue"], task=call["task"]))


def metrics(call: ApiCall) -> Response:
    """Return what Prometheus scrapes. Of many queues the counts are shared by all that scrape within a second."""
    text = render((), {}, None)
    with suppress(StoreUnavailable):  # the text says so
        counts = call.service.live.queues.counted(_SCRAPE_SECONDS, workers=True)
        text = call.admin.knowing(counts.partitions).metrics_text(counts.infos, counts.workers)
    return Response(text, headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})


def load(call: ApiCall) -> dict[str, Any]:
    """Return the work of a queue, or of all, for an autoscaler; `at`: when the first of them was counted."""
    if call["queue"]:
        at, views = datetime.now(UTC), call.admin.load([call["queue"]])
    else:
        counts = call.service.live.queues.counted(_SCRAPE_SECONDS)
        at, views = counts.since, {info.name: load_view(info) for info in counts.infos}
    return {"at": at, **{name: value for name, value in load_json(views).items() if name != "schema"}}


async def stream(call: ApiCall) -> Response:
    """Send the session, then snapshots for as long as the visitor follows; with `history` what ended in the last hour too."""
    if not call.service.streams:
        return Response(status_code=204)  # tells the browser not to try again
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(call), headers=headers, media_type="text/event-stream")


async def _events(call: ApiCall) -> AsyncIterator[bytes]:
    """Yield the events of one visitor for as long as the right to look lasts; the session again when rights change."""
    live, told = call.service.live, float("-inf")
    greeted, asked = False, time.monotonic()
    while True:
        try:
            if not greeted:
                yield event("session", await in_thread(partial(session, call)))
                greeted = True
            yield await live.snapshot.event("snapshot")
            if call["history"] and time.monotonic() - told >= _HISTORY_SECONDS:
                yield await live.hour.event("history")
                told = time.monotonic()
        except ConveyorError as error:
            yield event("away", {"message": str(error)})
        await asyncio.sleep(call["seconds"])
        if call.ask_access is not None and time.monotonic() - asked >= _ACCESS_SECONDS:
            access, asked = await call.ask_access(), time.monotonic()
            if not access.allows(None):
                return
            if access != call.access:
                call, greeted = replace(call, access=access), False


_HISTORY_SECONDS = 30.0
_ACCESS_SECONDS = 10.0
"""A visitor who follows is asked for so often, so that a right that was taken away does not last as long as the connection."""
_FIRST_SECONDS = 0.5
"""A page waits so long for what it shows first; the stream says what is wrong, or brings it."""
METRICS = ApiRoute("GET", "metrics", "metrics", "Show what Prometheus scrapes", metrics, media="text/plain")
LIVE_ENDPOINTS = (
    METRICS,
    ApiRoute(
        "GET", "load", "load", "Show the work of a queue for an autoscaler", load,
        fields={"queue": Field("text", "only of this queue")},
    ),
    ApiRoute("GET", "session", "session", "Show who asks and what they may do", session),
    ApiRoute("GET", "snapshot", "snapshot", "Count all queues, and list what asks for attention", snapshot),
    ApiRoute("GET", "overview", "overview", "Show the snapshot with the findings of the doctor", overview),
    ApiRoute(
        "GET", "stream", "stream", "Follow the snapshot as server-sent events", stream, media="text/event-stream",
        fields={
            "seconds": Field("number", "the time between two snapshots", default=1, least=1, most=60),
            "history": Field("text", "1h: what ended in the last hour too", choices=("1h",)),
        },
    ),
    ApiRoute(
        "GET", "history", "history", "Show what ended over time", history,
        fields={
            "range": Field("text", "how far back", default="1h", choices=tuple(RANGES)),
            "queue": Field("text", "only of this queue"), "task": Field("text", "only of this task"),
        },
    ),
)  # fmt: skip
