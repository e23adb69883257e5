"""
The main module of a child process: ``python -m conveyor.worker.supervision.child_main APP NUMBER/SLOTS MEMORY ALIVE STACK``.

The last three are descriptors of the supervisor: its shared memory, a pipe that ends when it ends, a file for stacks.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol

from conveyor.errors import ConveyorError
from conveyor.store.transport.credentials import LoginProvider
from conveyor.worker.app_loading import load
from conveyor.worker.logs import LOG, configure_log
from conveyor.worker.recycling import RecycleLimits
from conveyor.worker.shared_memory import ChildInfo, ChildSlot, ChildSpec, SharedMemory
from conveyor.worker.shutdown import RECYCLE
from conveyor.worker.supervision.lease_guard import DeadChild, LeaseGuard

_IMPORTING = ("<frozen importlib", str(Path(importlib.__file__).parent), str(Path(__file__).parents[2]))
"""The beginnings of the names of files whose code imports an app."""
IMPORT_FAILED = 4
"""Exit code of a child whose app cannot be loaded."""
MARGIN = 2.0
"""Seconds beyond the grace after which a child that was told to stop is killed."""


class Runnable(Protocol):
    """The worker of a child: `worker.Worker`, or a small one in tests."""

    @property
    def login(self) -> LoginProvider | None:
        """That of its app, asked at each connection; None: the URL has user and password."""

    async def run(self) -> int:
        """Run until stopped or drained; return the exit code."""

    def stop(self) -> None:
        """Drain."""

    def hurry(self) -> None:
        """Drain, and hand everything back at once."""

    def quiet(self) -> None:
        """Lease no more."""


def main(start: Callable[[ChildSpec, ChildSlot], tuple[ChildInfo, Runnable]] | None = None) -> NoReturn:
    """Run the child that the command line describes; *start* makes its worker (None: `start_app`)."""
    _, slot_place, *descriptors = sys.argv[1:6]
    memory_fd, alive_fd, stack_fd = map(int, descriptors)
    for descriptor in (memory_fd, alive_fd, stack_fd):
        os.set_inheritable(descriptor, False)  # not for the processes that jobs start
    number, slots = map(int, slot_place.split("/"))
    slot = SharedMemory(slots, memory_fd).slot(number)
    spec = slot.spec()
    assert spec is not None
    if spec.path:
        sys.path[:] = spec.path
    # The first connection needs them; on a busy machine importing takes longer than a loop may be blocked.
    import hiredis  # noqa: F401
    import redis.asyncio  # noqa: F401

    configure_log(verbose=spec.verbose)
    faulthandler.enable()
    code = _run(spec, slot, alive_fd, stack_fd, start or start_app)
    slot.finish()
    _exit(code)


def start_app(spec: ChildSpec, slot: ChildSlot) -> tuple[ChildInfo, Runnable]:
    """Import the app and make its worker. Empty `queues`: those that its tasks and plain lists name."""
    from conveyor.worker.worker import Worker

    app = load(spec.app)
    names = sorted(app.tasks)
    worker = Worker(
        app,
        queues=spec.queues,
        concurrency=spec.concurrency,
        threads=spec.threads,
        burst=spec.burst,
        grace=spec.grace,
        slot=slot,
        reference=spec.app,
        recycle_limits=RecycleLimits(spec.max_jobs, spec.max_memory),
        await_until=spec.await_until,
        declares=spec.declares,
        labels=spec.labels,
    )
    address, attachment = app.client.address, app.client.server_handle
    url = address.url if attachment is None else f"embedded:{attachment.directory}"
    return ChildInfo(url, app.namespace, len(names), tuple(names[:10]), worker.queues), worker


def _run(
    spec: ChildSpec,
    slot: ChildSlot,
    alive_fd: int,
    stack_fd: int,
    start: Callable[[ChildSpec, ChildSlot], tuple[ChildInfo, Runnable]],
) -> int:
    try:
        info, worker = start(spec, slot)
    except Exception as error:
        LOG.error(
            "Cannot start the worker of %s", spec.app, exc_info=(type(error), error, _from_app(error, error.__traceback__))
        )  # fmt: skip
        return IMPORT_FAILED
    slot.set_info(info)
    # Imported objects stay for ever: a garbage collection that visits them again and again delays jobs by milliseconds.
    gc.collect()
    gc.freeze()
    if spec.quiet:
        worker.quiet()
    loop = _new_loop()
    asyncio.set_event_loop(loop)
    # A second SIGTERM does not hurry: a service manager sends one to every process, and the supervisor passes its own on.
    actions: dict[int, Callable[[], None]] = {
        signal.SIGTERM: worker.stop, signal.SIGINT: worker.hurry, signal.SIGUSR1: worker.quiet,
        signal.SIGUSR2: partial(_write_tasks, loop, stack_fd),
    }  # fmt: skip
    loop.call_soon(_listen, loop, actions, _collect(actions), slot, stack_fd)
    threading.Thread(
        target=_end_after_supervisor,
        args=(alive_fd, loop, worker, slot, spec.grace),
        name="conveyor-orphan",
        daemon=True,
    ).start()
    try:
        return loop.run_until_complete(worker.run())
    except ConveyorError as error:  # its text says what to do: a refused password, another number of partitions
        LOG.critical("The worker cannot continue: %s %s", error.code, error, exc_info=LOG.isEnabledFor(logging.DEBUG))
        return 1
    except BaseException:
        LOG.critical("The worker failed unexpectedly", exc_info=True)
        return 1


def _from_app(error: Exception, traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the first line of the app on: what imported that says nothing. Whole where no line is the app's."""
    one = traceback
    while one is not None and one.tb_frame.f_code.co_filename.startswith(_IMPORTING):
        one = one.tb_next
    return one if one is not None or isinstance(error, SyntaxError) else traceback


def _collect(numbers: Iterable[int]) -> list[int]:
    """Collect the signals that come before the loop runs: uvloop loses one that comes between its handler and its start."""
    early: list[int] = []
    for number in numbers:
        signal.signal(number, lambda number, _: early.append(number))
    return early


def _listen(
    loop: asyncio.AbstractEventLoop, actions: Mapping[int, Callable[[], None]], early: list[int], slot: ChildSlot,
    stack_fd: int,
) -> None:  # fmt: skip
    """Handle signals on the running loop, those that came *early* first; from here on the child is up."""
    for number, act in actions.items():
        loop.add_signal_handler(number, act)
    # This one at once, also in C code.
    faulthandler.register(signal.SIGUSR2, file=stack_fd, all_threads=True, chain=True)
    slot.tick()
    for number in early:
        actions[number]()


def _write_tasks(loop: asyncio.AbstractEventLoop, stack_fd: int) -> None:
    """Write where each task of the loop waits, below the stacks of the threads; called when the loop is free."""
    text = io.StringIO()
    for task in islice(asyncio.all_tasks(loop), 100):
        task.print_stack(file=text)
    os.write(stack_fd, text.getvalue().encode(errors="replace"))


def _end_after_supervisor(
    alive_fd: int, loop: asyncio.AbstractEventLoop, worker: Runnable, slot: ChildSlot, grace: float
) -> None:
    """Wait for the end of the supervisor; then drain, and guard the leases of this child until it ends."""
    os.read(alive_fd, 1)
    LOG.warning("The supervisor is gone: worker %d drains and ends", os.getpid())
    lease_guard = LeaseGuard(worker.login)
    lease_guard.watch(slot)
    loop.call_soon_threadsafe(worker.stop)
    time.sleep(grace + MARGIN)
    info = slot.info()
    assert info is not None
    what = f"Worker {os.getpid()} was stuck beyond its grace of {grace:g} s"
    lease_guard.forget(slot)
    lease_guard.return_jobs(DeadChild(what, info, slot.identities(), crashed=False))
    lease_guard.close(2.0)
    _exit(RECYCLE)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _exit(code: int) -> NoReturn:
    """Exit at once: a thread that is stuck in a job must not delay the end."""
    if (buffers := sys.modules.get("conveyor.store.client.buffer")) is not None:
        buffers.flush_all()  # what jobs pushed while Redis was away
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # the other end has closed it
    os._exit(code)


if __name__ == "__main__":
    main()
