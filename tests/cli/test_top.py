"""`conveyor top`, the live view in a terminal."""

from __future__ import annotations

import pytest

from conveyor import Conveyor
from conveyor.admin import queue_flow
from conveyor.admin.admin import Admin
from support.waiting import auntil

pytest.importorskip("textual")


@pytest.mark.leaves_keys("a job is left to be looked at")
async def test_it_shows_queues_and_workers_and_pauses(url: str) -> None:
    """Rows follow what is in Redis, and the key p pauses the queue under the cursor and resumes it."""
    from textual.widgets import DataTable, Static

    from conveyor.cli.top_screen import Top

    app = Conveyor(url)
    await app.queue("mail").apush({"n": 1})
    screen = Top(Admin(app.client), every=3600)

    def cell(table: str, row: str, column: str) -> str:
        return str(screen.query_one(table, DataTable).get_cell(row, column))

    async with screen.run_test(size=(120, 30)) as pilot:
        await pilot.pause()
        assert "1 ready" in str(screen.query_one("#totals", Static).render())
        assert (cell("#queues", "mail", "ready"), cell("#queues", "mail", "state")) == ("1", "no worker")
        assert screen.query_one("#workers", DataTable).row_count == 0

        await pilot.press("p")
        assert cell("#queues", "mail", "state") == "paused"
        assert (await app.queue("mail").astats()).paused
        await pilot.press("p")
        assert not (await app.queue("mail").astats()).paused

        await app.queue("mail").apush({"n": 2})
        async with app.worker(queues={"mail": 1}):
            await pilot.press("r")
            assert screen.query_one("#workers", DataTable).row_count == 1
        await pilot.press("r")
        assert screen.query_one("#workers", DataTable).row_count == 0
        await pilot.press("q")
    await app.aclose()


@pytest.mark.leaves_keys("jobs are left to be looked at")
async def test_it_says_what_is_wrong_and_why_jobs_wait(url: str) -> None:
    """Below the tables stands what asks for attention with the command that helps, and why jobs of the queue under the cursor wait."""
    from textual.widgets import DataTable, Static

    from conveyor.cli.top_screen import Top

    app = Conveyor(url)
    for name in ("audit", "mail"):
        await app.queue(name).apush({"n": 1})
    await app.queue("mail").apause()
    screen = Top(Admin(app.client), every=3600)

    def shown(name: str) -> str:
        return str(screen.query_one(name, Static).render())

    async with screen.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "✗ Queue 'audit' has 1 job and no worker takes it" in shown("#flags")
        assert "conveyor worker -q audit" in shown("#flags")
        assert shown("#why") == ""

        await pilot.press("down")
        await auntil(lambda: shown("#why") == "mail: It is paused: 1 job waits.")
        await pilot.press("up")
        await auntil(lambda: shown("#why") == "")
        for name in ("#queues", "#workers"):
            assert screen.query_one(name, DataTable).size.height >= 3
        await pilot.press("ctrl+c")
    assert screen.return_code == 130
    await app.aclose()


@pytest.mark.leaves_keys("jobs are left to be looked at")
async def test_a_long_name_leaves_room_for_the_counts(url: str) -> None:
    """On 80 columns the counts of all queues are seen, however long a name is."""
    from textual.widgets import DataTable

    from conveyor.cli.top_screen import Top

    app = Conveyor(url)
    for name in ("mail", "tenant-and-its-name-" * 6):
        await app.queue(name).apush({"n": 1})
    screen = Top(Admin(app.client), every=3600)

    async with screen.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        columns = list(screen.query_one("#queues", DataTable).ordered_columns)
        before_dead = columns[: [str(one.label) for one in columns].index("DEAD") + 1]
        assert sum(one.get_render_width(screen.query_one("#queues", DataTable)) for one in before_dead) <= 80
    await app.aclose()


@pytest.mark.leaves_keys("jobs are left to be looked at")
async def test_it_shows_what_comes_and_goes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second look on a queue has its rates, and the word for a backlog that grows."""
    from textual.widgets import DataTable

    from conveyor.cli.top_screen import Top

    monkeypatch.setattr(queue_flow, "_LEAST_MS", 1)
    app = Conveyor(url)
    await app.queue("mail").apush(0)
    screen = Top(Admin(app.client), every=3600)

    def cells(*columns: str) -> list[str]:
        return [str(screen.query_one("#queues", DataTable).get_cell("mail", column)) for column in columns]

    async with screen.run_test(size=(120, 30)) as pilot:
        await pilot.pause()
        assert cells("in/s", "out/s", "trend") == ["-", "-", ""]
        await app.queue("mail").apush_many(list(range(50)))
        await pilot.press("r")
        came, gone, trend = cells("in/s", "out/s", "trend")
        assert float(came.replace(",", "")) > 0
        assert (gone, trend) == ("0", "grows")
        await pilot.press("q")
    await app.aclose()
