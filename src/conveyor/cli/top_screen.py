"""The screen of `conveyor top`, with Textual."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.widgets import DataTable, Footer, Static

from conveyor.admin.queue_flow import FlowMeter
from conveyor.admin.worker_control import slots_of
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import MARKS, human_text
from conveyor.errors import ConveyorError
from conveyor.ids import clean, clean_lines
from conveyor.units import quantity, rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conveyor.admin.admin import Admin
    from conveyor.admin.flags import Flag
    from conveyor.admin.queue_flow import Flow
    from conveyor.admin.views import QueueCount, QueueInfo
    from conveyor.admin.worker_control import WorkerProcess

QUEUES = (
    "queue", "state", "ready", "waiting", "scheduled", "leased", "dead", "oldest", "in/s", "out/s", "trend", "workers",
)  # fmt: skip
WORKERS = ("worker", "state", "slots", "holds", "longest job", "heartbeat", "queues")
"""The columns; what is wrong stands where 80 columns show it, and the list of any length last."""
_TEXTS = {"queue", "state", "trend", "worker", "queues"}
_NUMBERS = 68
"""The columns of a terminal that the numbers beside a name take."""
_FLAGS_EVERY = 5.0
"""Seconds between two looks at what asks for attention, for which schedules, records and statistics are read."""
_LEVELS = {"problem": "bold red", "warning": "yellow", "note": ""}
_SHOWN_BY_ITSELF = frozenset({"position", "no-worker"})
"""Causes of waiting that the table shows, or the flags."""


class Top(App[None]):
    """
    Two tables, of queues and of worker processes, read anew every second.

    Below the queues stands why the jobs of the one under the cursor wait, below the workers what asks for attention, and what to
    do about it.
    """

    TITLE = "conveyor top"
    CSS = """
    #totals, #why, #flags { padding: 0 1; height: auto; }
    #why { max-height: 3; }
    #flags { max-height: 30%; }
    #queues { height: 2fr; min-height: 4; }
    #workers { height: 1fr; min-height: 3; }
    """
    BINDINGS: ClassVar = [
        ("q", "quit", "Quit"),
        ("p", "pause", "Pause or resume the queue"),
        ("r", "refresh", "Read now"),
        Binding("ctrl+c", "interrupt", show=False, priority=True),  # Textual asks for another key instead
    ]

    def __init__(self, admin: Admin, every: float = 1.0) -> None:
        """Show what *admin* reads *every* so many seconds."""
        super().__init__()
        self._admin, self._every = admin, every
        self._queues: dict[str, QueueInfo] = {}
        self._flags_at = -_FLAGS_EVERY
        self._meter = FlowMeter()

    def compose(self) -> ComposeResult:
        """Yield the line of totals, the two tables, what stands below them, and the keys."""
        yield Static("…", id="totals")
        yield DataTable(id="queues", cursor_type="row", zebra_stripes=True)
        yield Static("", id="why")
        yield DataTable(id="workers", cursor_type="row", zebra_stripes=True)
        yield Static("", id="flags")
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
            counted = await self._admin.acount(await self._admin.aqueue_partitions(), 1)
            queues = [one.info for one in counted]
            workers = await self._admin.aworker_processes(jobs=1)
            flags = await self._read_flags(queues)
        except ConveyorError as error:
            totals.update(clean(str(error).splitlines()[0]))
            return
        self._queues = {one.name: one for one in queues}
        self._meter.keep(self._queues)
        ready, running, dead = (sum(getattr(one, name) for one in queues) for name in ("ready", "leased", "dead"))
        slots = slots_of(workers)
        totals.update(
            f"{quantity(len(queues), 'queue')} · {ready:,} ready · {running:,} leased · {dead:,} dead · "
            f"{quantity(len(workers), 'worker process')}{f' · {slots}' if slots.total else ''}"
        )
        self._show("#queues", {one.info.name: _queue_row(one.info, self._flow(one, workers)) for one in counted})
        self._show("#workers", {one.name: _worker_row(one) for one in workers})
        if flags is not None:
            self.query_one("#flags", Static).update(_flag_lines(flags))
        await self._show_causes()

    def _flow(self, one: QueueCount, workers: Sequence[WorkerProcess]) -> Flow | None:
        """Return the rates of a queue that was counted again."""
        return self._meter.add(one, {process.kind for process in workers if one.info.name in process.queues})

    async def _read_flags(self, queues: Sequence[QueueInfo]) -> list[Flag] | None:
        """Return what asks for attention; None when that was read a moment ago."""
        if monotonic() - self._flags_at < _FLAGS_EVERY:
            return None
        self._flags_at = monotonic()
        return await self._admin.aflags(queues)

    async def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Say why the jobs of the queue wait to which the cursor has moved."""
        if event.data_table.id == "queues":
            await self._show_causes()

    async def _show_causes(self) -> None:
        name = self._chosen()
        one = self._queues.get(name)
        lines = []
        if one is not None and (one.ready or one.waiting or one.scheduled):
            try:
                causes = await self._admin.acauses(name, one.ready + one.waiting)
            except ConveyorError as error:  # it may have gone meanwhile
                causes, lines = [], [str(error).splitlines()[0]]
            lines += [str(cause) for cause in causes if cause.kind not in _SHOWN_BY_ITSELF]
        if name == self._chosen():  # the cursor may have moved on while this was read
            self.query_one("#why", Static).update(Text(clean_lines("\n".join(f"{name}: {line}" for line in lines))))

    def _chosen(self) -> str:
        """Return the name of the queue under the cursor; "" without one."""
        table = self.query_one("#queues", DataTable)
        if not table.row_count:
            return ""
        return str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)

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
                    table.update_cell(key, heading, cell, update_width=True)

    def _cell(self, heading: str, value: object) -> Text:
        """Return a value as it is shown: numbers to the right, and a name no longer than leaves room for them."""
        text = Text(clean(human_text(value)), justify="left" if heading in _TEXTS else "right", no_wrap=True)
        if heading in {"queue", "worker"}:
            text.truncate(max(12, self.size.width - _NUMBERS), overflow="ellipsis")
        return text

    def action_interrupt(self) -> None:
        """End as a command that is interrupted."""
        self.exit(return_code=ExitCode.INTERRUPTED)

    async def action_pause(self) -> None:
        """Pause the queue under the cursor, or resume it."""
        if not (name := self._chosen()):
            return
        paused = name in self._queues and self._queues[name].paused
        try:
            await (self._admin.aresume(name) if paused else self._admin.apause(name))
        except ConveyorError as error:
            self.notify(clean(str(error)), severity="error")
        await self.action_refresh()


def _flag_lines(flags: Sequence[Flag]) -> Text:
    """Return what asks for attention, the worst first, each with the command that helps."""
    text = Text()
    for one in flags:
        mark = MARKS[one.level][0]
        text.append("\n" if text else "").append(f"{mark} {clean(one.text)}", _LEVELS[one.level])
        if one.remedy:
            text.append(f"\n    {clean(one.remedy)}")
    return text


def _queue_row(one: QueueInfo, flow: Flow | None) -> tuple[object, ...]:
    age = None if one.oldest_age is None else timedelta(seconds=round(one.oldest_age, 1))
    state = "paused" if one.paused else "no worker" if one.stranded else ""
    counts = (one.ready, one.waiting, one.scheduled, one.leased, one.dead)
    came, gone = (flow.in_per_second, flow.out_per_second) if flow else (None, None)
    rates = (None if number is None else rate(number) for number in (came, gone))
    return (one.name, state, *counts, age, *rates, str(flow or ""), one.workers)


def _worker_row(one: WorkerProcess) -> tuple[object, ...]:
    since = next((job.since for job in one.jobs if job.since is not None), None)
    longest = None if since is None else max(timedelta(), one.members[0].read_at - since)
    state = "silent" if one.silent else one.state
    beat = timedelta(seconds=round(one.heartbeat_age, 1))
    return (one.name, state, one.concurrency, one.held, longest, beat, ", ".join(one.queues))
