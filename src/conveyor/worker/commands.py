"""Carries out the commands that people send to a worker: quiet, stop, stack."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import threading
import traceback
from itertools import islice
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError
from conveyor.store import worker_commands
from conveyor.store.worker_commands import MOST_STACK, WorkerCommand
from conveyor.worker.execution.coroutines import RESUME_CODE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType
    from typing import Any

    from conveyor.worker.leasing.membership import LeaseHolder
    from conveyor.worker.leasing.queue_consumer import QueueConsumer

log = logging.getLogger("conveyor.worker")
_MOST_THREADS = 200
_MOST_TASKS = 300
_MOST_FRAMES = 30


def all_stacks(jobs: Mapping[asyncio.Task[Any], str]) -> str:
    """Return where each thread and each asyncio task of this process is, those of *jobs* with their names; at most MOST_STACK."""
    text = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in islice(sys._current_frames().items(), _MOST_THREADS):  # noqa: SLF001  the documented way
        text.write(f"Thread {names.get(ident, ident)}:\n")
        text.writelines(traceback.format_stack(frame)[-_MOST_FRAMES:])
        text.write("\n")
    for task in sorted(asyncio.all_tasks(), key=lambda one: one not in jobs)[:_MOST_TASKS]:  # jobs first: it may be cut
        text.write(f"Task {jobs.get(task) or task.get_name()}:\n")
        for frame in _frames_of(task):
            text.writelines(traceback.format_stack(frame, limit=1))
        text.write("\n")
    data = text.getvalue().encode(errors="replace")
    cut = "" if len(data) <= MOST_STACK else "\n… (cut)\n"
    return data[:MOST_STACK].decode(errors="ignore") + cut


def _frames_of(task: asyncio.Task[Any]) -> Iterator[FrameType]:
    """Yield the frames of a task, from its outermost coroutine to what it awaits; `Task.get_stack` knows the first alone."""
    awaited: Any = task.get_coro()
    for _ in range(_MOST_FRAMES):
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(awaited, f"{kind}_frame")), None)
        frame = None if kind is None else getattr(awaited, f"{kind}_frame")
        if frame is None:
            return
        yield frame
        # The executor steps a job's coroutine by itself, so nothing awaits it.
        stepped = frame.f_locals.get("coroutine") if frame.f_code is RESUME_CODE else None
        awaited = stepped or getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


async def send_answer(consumer: LeaseHolder, command: WorkerCommand, text: str) -> None:
    """Send the answer to a command that came through a queue of *consumer*."""
    try:
        call = worker_commands.answer(command, text.encode(errors="replace"))
        await consumer.connection.run(call, retry_for=5.0)
    except ConveyorError as error:
        log.warning("The answer to the command %r could not be sent: %s", command.action, error)


async def describe_again(consumers: list[QueueConsumer], about: Mapping[QueueConsumer, bytes]) -> None:
    """Replace what Redis holds of the worker, in each of its queues."""
    for consumer in consumers:
        if consumer.identity and not consumer.has_left:
            try:
                call = worker_commands.describe(consumer.keys, consumer.identity, about[consumer])
                await consumer.connection.run(call, retry_for=5.0)
            except ConveyorError as error:
                log.debug("queue %s: the state of the worker could not be stored: %s", consumer.queue, error)
