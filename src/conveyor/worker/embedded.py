"""The worker inside another program: `async with app.worker():`. No supervisor; a thread renews the leases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Self

from conveyor.errors import ConfigurationError, ConveyorError, StoreUnavailable
from conveyor.jobs.core import core_of
from conveyor.jobs.include import import_included
from conveyor.jobs.registry import queue_weights
from conveyor.store.transport import eviction, replies
from conveyor.units import Duration, milliseconds, span
from conveyor.worker.leasing.heartbeat import Heartbeat, Lease
from conveyor.worker.worker import Worker

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.jobs.app import Conveyor
    from conveyor.jobs.registry import QueueNames

log = logging.getLogger("conveyor.worker")


class EmbeddedWorker:
    """A worker that works on the running loop from the start of an `async with` block to its end."""

    def __init__(
        self, app: Conveyor, *, queues: QueueNames | None = None, concurrency: int = 100, threads: int = 8,
        burst: bool = False, grace: Duration = 30.0, allow_eviction: bool = False,
        labels: str | Iterable[str] = (),
    ) -> None:  # fmt: skip
        """The parameters are those of `app.worker`."""
        for name, value in (("concurrency", concurrency), ("threads", threads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"worker({name}=…) must be a whole number of at least 1, not {value!r}.")
        weights: dict[str, float] | None = None
        if queues is not None:
            named = queue_weights(queues, "app.worker()")
            weights = {one if isinstance(one, str) else one.name: weight for one, weight in named.items()}
        self._worker = Worker(
            app, queues=weights, concurrency=concurrency, threads=threads, burst=burst,
            grace=milliseconds(grace, name="grace") / 1000, before_leasing=self._keep_leases, labels=labels,
        )  # fmt: skip
        self._app = app
        self._allow_eviction = allow_eviction
        self._stack = ExitStack()
        self._running: asyncio.Task[int] | None = None
        self._stopped = False

    def __repr__(self) -> str:
        running = self._running
        state = "not started" if running is None else "stopped" if running.done() else "running"
        return f"<EmbeddedWorker of {', '.join(self._worker.queues)}: {state}>"

    async def __aenter__(self) -> Self:
        """Start the worker; return when it is registered, or raise the reason why it could not start."""
        import_included(core_of(self._app).include)
        waited_since = None if await self._check_eviction() else monotonic()
        self._running = asyncio.get_running_loop().create_task(self._run(), name="conveyor-worker")
        ready = asyncio.ensure_future(self._worker.ready.wait())
        try:
            await asyncio.wait([self._running, ready], return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            # No block follows that could stop it. It ends by itself should this wait be cancelled as well.
            self._worker.hurry()
            self._running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            await asyncio.wait([self._running])
            raise
        finally:
            ready.cancel()
        if waited_since is not None and self._worker.ready.is_set():
            log.info("Redis answers after %s", span(monotonic() - waited_since))
        if self._running.done():
            await self._running
        return self

    async def _run(self) -> int:
        with self._stack:
            return await self._worker.run()

    def _keep_leases(self) -> None:
        # Before the first job is leased: one that blocks the loop at once would not let us come to it afterwards.
        worker = self._worker
        heartbeat = Heartbeat(
            self._app.client.endpoint, self._leases, lambda: worker.last_renewal, lambda: worker.last_tick
        )
        heartbeat.start()
        self._stack.callback(heartbeat.close)

    async def _check_eviction(self) -> bool:
        """Refuse a server that deletes jobs (E10). Return False for one that is away: the worker waits for it."""
        try:
            known = replies.parse_info(await self._app.client.aexecute("INFO"))
        except StoreUnavailable as error:
            log.warning("%s Waiting for it.", str(error).splitlines()[0])
            return False
        except ConveyorError:
            known = {}  # this user may not send INFO
        if "maxmemory_policy" not in known:
            log.warning("%s: see `conveyor doctor`", eviction.UNKNOWN)
        wrong = eviction.eviction_risk(known.get("maxmemory_policy", ""), int(known.get("evicted_keys", 0)))
        if wrong is not None and not self._allow_eviction:
            raise ConfigurationError(
                f"{wrong}\nSet:  {eviction.REMEDY}\nStart anyway:  app.worker(allow_eviction=True)", code="E10"
            )
        return True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain and stop."""
        assert self._running is not None
        if not self._running.done():
            self._worker.stop()
        await self._running

    async def wait(self) -> None:
        """Wait until the worker ends by itself, which it does with `burst` when everything is drained."""
        assert self._running is not None
        await asyncio.shield(self._running)

    def stop(self) -> None:
        """Stop before the block ends. The first call drains, the second hands everything back at once."""
        (self._worker.hurry if self._stopped else self._worker.stop)()
        self._stopped = True

    def _leases(self) -> list[Lease]:
        return [(one.keys, one.identity, one.lease_ms) for one in self._worker.consumers if one.identity]
