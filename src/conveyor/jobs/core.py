"""The inside of an app: what its tasks, its handles, workers, outboxes and the command line share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conveyor.errors import ConfigurationError
from conveyor.jobs.context import queue_of_job
from conveyor.jobs.hooks import Hooks
from conveyor.jobs.registry import QueueRegistry
from conveyor.jobs.results import ResultSubscriber
from conveyor.jobs.watching import WatchHub
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.payload.formats import JSON

if TYPE_CHECKING:
    from conveyor.jobs.schedule import Declaration
    from conveyor.jobs.task import Task
    from conveyor.payload.formats import FormatRegistry
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.payload.sealed_records import RecordDecoder
    from conveyor.store.client.client import Client


class DatabaseOutbox(Protocol):
    """A table in a database of the program whose rows are jobs to come."""

    @property
    def table(self) -> str: ...

    def entries(self) -> Iterator[bytes]:
        """Yield all rows that are committed and not delivered, as `outbox.write` wrote them."""
        ...


class AppCore(QueueRegistry, Hooks):
    """
    The connections, tasks, queues and hooks of one app.

    `Conveyor` is its public face. The two are separate so that completion on an app shows the documented members alone.
    """

    def __init__(
        self,
        client: Client,
        *,
        lease_ms: int,
        max_payload: int,
        sealing: PayloadPipeline | None,
        formats: FormatRegistry,
        include: tuple[str, ...] = (),
        module: str = "",
    ) -> None:
        Hooks.__init__(self)
        QueueRegistry.__init__(
            self, client, lease_ms=lease_ms, max_payload=max_payload, sealing=sealing, formats=formats,
            push_middlewares=self.push_middlewares,
        )  # fmt: skip
        self.namespace = client.namespace
        client.queue_of_job = queue_of_job
        self.include = include
        """The modules that a worker and the command line import, so that their tasks are known."""
        self._module = module  # which made the app
        self.result_subscriber = ResultSubscriber(client)
        self.watch_hub = WatchHub(client, self.result_subscriber)
        self.tasks: dict[str, Task[..., Any]] = {}
        self.external_tasks: dict[str, Task[..., Any]] = {}
        """Tasks whose functions other programs have, by name: enqueued here and never run."""
        self.declared_schedules: dict[str, Declaration] = {}
        """The schedules that decorators have declared, by name."""
        self.overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
        """Functions of dependencies, and what is called in their places."""
        self.outboxes: list[DatabaseOutbox] = []
        """Those in a database of the program, whose rows are jobs to come."""

    @classmethod
    def without_declarations(
        cls, client: Client, *, max_payload: int = MAX_PAYLOAD, sealing: PayloadPipeline | None = None,
        formats: FormatRegistry = JSON,
    ) -> AppCore:  # fmt: skip
        """Return the inside of an app that declares nothing: for what looks at the jobs of other programs."""
        return cls(client, lease_ms=15_000, max_payload=max_payload, sealing=sealing, formats=formats)

    @property
    def decoder(self) -> RecordDecoder:
        """The decoder of what is stored of jobs: arguments, results, errors and lines."""
        from conveyor.payload.sealed_records import RecordDecoder

        return RecordDecoder(self.sealing, self.formats)

    @property
    def worker_command(self) -> str:
        """The command that runs a worker of this app, with its name where the module that made the app holds it."""
        module = sys.modules.get(self._module)
        names = (
            [
                name
                for name, value in vars(module).items()
                # By its class first: the top level of a module may hold proxies that fail when they are used.
                if type(value).__module__ == "conveyor.jobs.app" and getattr(value, "_core", None) is self
            ]
            if module is not None
            else []
        )
        if not names:
            return "conveyor worker MODULE:app"
        return f"conveyor worker {_importable(self._module)}:{names[0]}"

    def close(self) -> None:
        """Close the connections of this process and leave the embedded server; a later use opens them again."""
        self.watch_hub.close()
        self.result_subscriber.close()
        self.client.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop, then the rest."""
        self.watch_hub.close()
        self.result_subscriber.close()
        await self.client.aclose()


def _importable(module: str) -> str:
    """Return the name under which another process imports *module*, the main program too."""
    if module != "__main__":
        return module
    main = sys.modules[module]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return str(spec.name) if spec is not None else Path(file).stem if file else "MODULE"


def core_of(app: Any) -> AppCore:
    """Return the inside of an app; raises ConfigurationError for what is none."""
    core = getattr(app, "_core", None)  # the one way to it
    if not isinstance(core, AppCore):
        raise ConfigurationError(f"This takes an app, such as app = Conveyor(), not {app!r:.100}.")
    return core
