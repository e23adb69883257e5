"""The screen of `conveyor top`, with Textual."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.widgets import DataTable, Footer, Static

from conveyor.cli.output import human_text
from conveyor.errors import ConveyorError
from conveyor.ids import clean
from conveyor.units import quantity

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.views import QueueInfo
    from conveyor.admin.worker_control import WorkerProcess

QUEUES = ("queue", "state", "ready", "waiting", "scheduled", "leased", "dead", "oldest", "workers")
WORKERS = ("worker", "state", "slots", "holds", "longest job", "heartbeat", "queues")
"""The columns; what is wrong stands where 80 columns show it, and the list of any length last."""
_TEXTS = {"queue", "state", "worker", "queues"}
_NUMBERS = 68
"""The columns of a terminal that the numbers beside a name take."""


class Top(App[None]):
    """Two tables, of queues and of worker processes, read anew every second."""

    TITLE = "conveyor top"
    CSS = "#totals { padding: 0 1; } #queues { height: 1fr; } #workers { height: 1fr; }"
    BINDINGS: ClassVar = [
        ("q", "quit", "Quit"),
        ("p", "pause", "Pause or resume the queue"),
        ("r", "refresh", "Read now"),
    ]

    def __init__(self, admin: Admin, every: float = 1.0) -> None:
        """Show what *admin* reads *every* so many seconds."""
        super().__init__()
        self._admin, self._every = admin, every
        self._paused: dict[str, bool] = {}

    def compose(self) -> ComposeResult:
        """Yield the line of totals, the two tables and the keys."""
        yield Static("…", id="totals")
        yield DataTable(id="queues", cursor_type="row", zebra_stripes=True)
        yield DataTable(id="workers", cursor_type="row", zebra_stripes=True)
        yield Footer()

    async def on_mount(self) -> None:
        """Begin to read."""
        for name, headings in (("#queues", QUEUES), ("#workers", WORKERS)):
            table = self.query_one(name, DataTable)
            for heading in headings:
                table.add_column(Text(heading.upper(), justify="left" if heading in _TEXTS else "right"), key=heading)
        await self.action_refresh()
        self.set_interval(self._every, self.action_refresh)

    async def action_refresh(self) -> None:
        """Read and show; what cannot be read now is said, and what was read stays."""
        totals = self.query_one("#totals", Static)
        try:
            queues = await self._admin.aqueues()
            workers = await self._admin.aworker_processes(jobs=1)
        except ConveyorError as error:
            totals.update(clean(str(error).splitlines()[0]))
            return
        self._paused = {one.name: one.paused for one in queues}
        ready, running, dead = (sum(getattr(one, name) for one in queues) for name in ("ready", "leased", "dead"))
        totals.update(
            f"{quantity(len(queues), 'queue')} · {ready:,} ready · {running:,} leased · {dead:,} dead · "
            f"{quantity(len(workers), 'worker process')}"
        )
        self._show("#queues", {one.name: _queue_row(one) for one in queues})
        self._show("#workers", {one.name: _worker_row(one) for one in workers})

    def _show(self, name: str, rows: dict[str, tuple[object, ...]]) -> None:
        """Change the cells that differ, so that the cursor and the position stay."""
        table = self.query_one(name, DataTable)
        headings = [str(key.value) for key in table.columns]
        for key in [str(key.value) for key in table.rows]:
            if key not in rows:
                table.remove_row(key)
        known = {str(key.value) for key in table.rows}
        for key, row in rows.items():
            cells = [self._cell(heading, cell) for heading, cell in zip(headings, row, strict=True)]
            if key not in known:
                table.add_row(*cells, key=key)
                continue
            for heading, cell in zip(headings, cells, strict=True):
                if table.get_cell(key, heading) != cell:
                    table.update_cell(key, heading, cell)

    def _cell(self, heading: str, value: object) -> Text:
        """Return a value as it is shown: numbers to the right, and a name no longer than leaves room for them."""
        text = Text(clean(human_text(value)), justify="left" if heading in _TEXTS else "right", no_wrap=True)
        if heading in {"queue", "worker"}:
            text.truncate(max(12, self.size.width - _NUMBERS), overflow="ellipsis")
        return text

    async def action_pause(self) -> None:
        """Pause the queue under the cursor, or resume it."""
        table = self.query_one("#queues", DataTable)
        if not table.row_count:
            return
        name = str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)
        try:
            await (self._admin.aresume(name) if self._paused.get(name) else self._admin.apause(name))
        except ConveyorError as error:
            self.notify(clean(str(error)), severity="error")
        await self.action_refresh()


def _queue_row(one: QueueInfo) -> tuple[object, ...]:
    age = None if one.oldest_age is None else timedelta(seconds=round(one.oldest_age, 1))
    state = "paused" if one.paused else "no worker" if one.stranded else ""
    return (one.name, state, one.ready, one.waiting, one.scheduled, one.leased, one.dead, age, one.workers)


def _worker_row(one: WorkerProcess) -> tuple[object, ...]:
    since = next((job.since for job in one.jobs if job.since is not None), None)
    longest = None if since is None else max(timedelta(), one.members[0].read_at - since)
    state = "silent" if one.silent else one.state
    beat = timedelta(seconds=round(one.heartbeat_age, 1))
    return (one.name, state, one.concurrency, one.held, longest, beat, ", ".join(one.queues))
