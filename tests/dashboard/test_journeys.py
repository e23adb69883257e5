"""Two things that people come to the dashboard for, done in a real browser on a real server, as a new user would."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from conveyor import Conveyor, Retry
from conveyor.dashboard import Access, dashboard, live_routes
from support.browser import open_browser, open_page, violations
from support.running_worker import drain, working
from support.waiting import auntil

Browse = Callable[[Callable[[Any], Any]], Any]


@contextmanager
def served(app: Conveyor) -> Iterator[str]:
    """Serve the dashboard of an app on a port of this machine; yield its address."""
    site = dashboard(app, lambda _: Access.ALL.named("ada"))
    config = uvicorn.Config(site, port=0, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with config.bind_socket() as listener:
        listener.listen()  # what connects before the server has started waits for it
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def beside() -> Iterator[tuple[ThreadPoolExecutor, Any]]:
    """A thread, and a browser whose steps are done there: its event loop would keep this thread from using the app."""
    stack = ExitStack()
    with ThreadPoolExecutor(1) as thread:
        try:
            yield thread, thread.submit(lambda: stack.enter_context(open_browser())).result()
        finally:
            thread.submit(stack.close).result()


@pytest.fixture
def browse(beside: tuple[ThreadPoolExecutor, Any]) -> Iterator[Browse]:
    """Carry out steps on a page of its own."""
    (thread, browser), stack = beside, ExitStack()
    page = thread.submit(lambda: stack.enter_context(open_page(browser))).result()
    try:
        yield lambda step: thread.submit(step, page).result()
    finally:
        thread.submit(stack.close).result()


def test_the_first_view_waits_for_no_second_answer(
    browse: Browse, app: Conveyor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overview is drawn with its charts and counts from the page alone, while the stream has not answered yet."""
    monkeypatch.setattr(live_routes, "_FIRST_SECONDS", 60)
    app.queue("mail").push_many(range(3))

    def look(page: Any) -> None:
        page.route("**/api/v1/stream*", lambda _: None)
        page.goto(url)
        page.wait_for_selector(".chart")
        page.wait_for_selector(".live.live", state="attached")
        page.wait_for_selector("main a:text-is('mail')")

    with served(app) as url:
        browse(look)


def test_failing_task_is_found_read_and_retried(browse: Browse, app: Conveyor) -> None:
    """The task that fails is found, the reason is read, all of its dead jobs are retried, and the queue drains."""
    broken = True

    @app.task(name="mail.send", queue="mail", retry=Retry(attempts=1))
    def send(user: int) -> None:
        if broken and user % 2:
            raise TimeoutError("smtp.example.com did not answer")

    for user in range(6):
        send.enqueue(2**53 + user)
    asyncio.run(drain(app))

    def find_and_retry(page: Any) -> None:
        page.goto(url)
        page.click("section[aria-label^='Failing tasks'] a:text-is('mail.send')")
        page.wait_for_selector("section[aria-label=Jobs] tbody tr >> nth=2")
        page.click("tbody tr:first-child a.name")
        page.wait_for_selector(".why:has-text('failed for good after 1 attempt: TimeoutError: smtp.example.com')")
        assert "test_journeys.py" in page.inner_text(".trace .user")
        assert re.search(r'"user": 900719925474099[357]', page.inner_text("pre[aria-label=Arguments]"))
        page.click("nav a:has-text('Failures')")
        page.click("tr:has-text('mail.send') td.actions button:text-is('Retry')")
        page.click("dialog button:text-is('Retry 3')")
        page.wait_for_selector(".toast:has-text('started for 3 jobs')")
        page.goto(f"{url}queue?name=mail")
        page.wait_for_selector(".tile:has-text('Ready') .value:text-is('3')")
        page.wait_for_selector(".tile:has-text('Dead') .value:text-is('0')")

    def see_it_drain(page: Any) -> None:
        page.wait_for_selector(".tile:has-text('Ready') .value:text-is('0')")
        page.goto(f"{url}audit")
        page.wait_for_selector("tr:has-text('ada'):has-text('retry')")

    with served(app) as url:
        browse(find_and_retry)
        broken = False
        asyncio.run(drain(app))
        browse(see_it_drain)


def test_waiting_job_says_why(browse: Browse, app: Conveyor) -> None:
    """From the overview to a job that nothing serves: it says so in the words of `why()`; a pause is said there too, and its end."""

    @app.task(name="reports.build", queue="reports")
    def build() -> None: ...

    job = build.enqueue()
    sentence = str(job.why())
    assert sentence.startswith("No worker")

    def read(page: Any) -> None:
        page.goto(url)
        page.click("section[aria-label='Needs attention'] a:text-is('reports')")
        page.click(".tile:has-text('Ready')")
        page.click("tbody tr:first-child a.name")
        page.wait_for_selector(".why")
        assert sentence in page.inner_text(".why")
        page.click(".crumb a:text-is('reports')")
        page.click("button:text-is('Pause')")
        page.wait_for_selector(".head .tag:text-is('paused')")
        page.goto(f"{url}job?id={job.id}")
        page.wait_for_selector(".why:has-text('paused')")

    with served(app) as url:
        browse(read)
        app.queue("reports").resume()
        asyncio.run(drain(app))
        browse(lambda page: page.wait_for_selector(".head .state:text-is('done')"))


def test_all_queues_are_paused_after_a_question(browse: Browse, app: Conveyor) -> None:
    """The overview pauses the queues that are not paused and resumes those that are; the dialog tells how many, and its way back does nothing."""
    for name in ("mail", "media", "reports"):
        app.queue(name).push(1)
    app.queue("media").pause()

    def pause(page: Any) -> None:
        page.goto(url)
        page.click("button:text-is('Pause all')")
        page.wait_for_selector("dialog:has-text('2 queues are paused')")
        page.click("dialog button:text-is('Back')")
        page.click("button:text-is('Resume all')")
        page.wait_for_selector("dialog:has-text('1 queue is resumed')")
        page.click("dialog button:text-is('Back')")

    def go_on(page: Any) -> None:
        page.click("button:text-is('Pause all')")
        page.click("dialog button:text-is('Pause 2')")
        page.wait_for_selector("button:text-is('Pause all')", state="detached")
        assert violations(page) == []

    def resume(page: Any) -> None:
        page.click("button:text-is('Resume all')")
        page.click("dialog button:text-is('Resume 3')")
        page.wait_for_selector("button:text-is('Resume all')", state="detached")
        page.goto(f"{url}audit")
        page.wait_for_selector("tr:has-text('ada'):has-text('resume'):has-text('all queues')")

    def paused() -> list[bool]:
        return [app.queue(name).stats().paused for name in ("mail", "media", "reports")]

    with served(app) as url:
        browse(pause)
        assert paused() == [False, True, False]
        browse(go_on)
        assert paused() == [True, True, True]
        browse(resume)
        assert paused() == [False, False, False]


def test_a_worker_is_made_quiet(browse: Browse, app: Conveyor) -> None:
    """A worker that takes no more jobs is marked, and its button is used up; the audit says who did it."""

    @app.task(name="mail.send", queue="mail")
    def send() -> None: ...

    def press(page: Any) -> None:
        page.goto(f"{url}workers")
        page.click("tr button:text-is('Quiet')")
        page.wait_for_selector("tr .tag:text-is('quiet')")
        assert page.locator("tr button:text-is('Quiet')").is_disabled()
        assert violations(page) == []
        page.goto(f"{url}audit")
        page.wait_for_selector("tr:has-text('ada'):has-text('quiet')")

    async def run() -> None:
        async with working(app):
            await asyncio.to_thread(browse, press)
        await app.aclose()

    with served(app) as url:
        asyncio.run(run())


def test_a_worker_that_is_opened_shows_its_running_jobs(browse: Browse, app: Conveyor) -> None:
    """Of a dozen running jobs the ten longest are shown with how long they run, and a link to all; nothing is asked before."""
    begun, asked = list[int](), list[str]()
    go = asyncio.Event()

    @app.task(name="hold", queue="held")
    async def hold(number: int) -> None:
        begun.append(number)
        await go.wait()

    def look(page: Any) -> None:
        page.on("request", lambda request: asked.append(request.url) if "/workers/jobs" in request.url else None)
        page.goto(f"{url}workers")
        page.wait_for_selector("tbody button[aria-expanded=false]")
        assert asked == []
        page.click("tbody button[aria-expanded=false]")
        page.wait_for_selector(".held li:nth-child(11)")
        rows = page.locator(".held li").all_text_contents()
        assert len(rows) == 11
        assert all(re.fullmatch(r"hold held · [\d.]+ (ms|s|m( \d+ s)?)", row) for row in rows[:10]), rows
        assert rows[10] == "and 2 more"
        assert violations(page) == []
        page.reload()  # what is open stands in the address
        page.click(".held a:text-is('and 2 more')")
        page.wait_for_selector("tbody tr:nth-child(12):has-text('hold')")
        page.go_back()
        page.click("tbody button[aria-expanded=true]")
        page.wait_for_selector(".held", state="detached")

    async def run() -> None:
        async with working(app):
            for number in range(12):
                await hold.aenqueue(number)
            await auntil(lambda: len(begun) == 12)
            await asyncio.to_thread(browse, look)
            go.set()
        await app.aclose()

    with served(app) as url:
        asyncio.run(run())


def test_slots_and_usage_are_seen(browse: Browse, app: Conveyor) -> None:
    """Slots that are used stand on the overview, on the page of workers and on that of a queue, and memory and processor use by each worker."""
    begun, go = list[int](), asyncio.Event()

    @app.task(name="hold", queue="held")
    async def hold(number: int) -> None:
        begun.append(number)
        await go.wait()

    def look(page: Any) -> None:
        page.goto(url)
        page.wait_for_selector("a.tile:has-text('Workers'):has-text('3 of 8 slots') [aria-label='3 of 8 slots used']")
        page.goto(f"{url}workers")
        page.wait_for_selector("h1:text-is('Workers')")
        page.wait_for_selector("text=1 process holds 3 jobs, 3 of 8 slots used")
        assert re.fullmatch(r"\d+ MB0 %", page.locator("tbody td:nth-child(5)").text_content())
        page.click("tbody button[aria-expanded=false]")
        page.wait_for_selector("p:has-text('of memory, 0 % of a core')")
        page.goto(f"{url}queues")
        page.wait_for_selector("tr:has-text('held') [aria-label='3 of 8 slots used']")
        assert violations(page) == []
        page.goto(f"{url}queue?name=held")
        page.wait_for_selector(".tile:has-text('Workers'):has-text('3 of 8 slots')")
        assert violations(page) == []
        for theme, width in (("dark", 1280), ("light", 390)):
            page.emulate_media(color_scheme=theme)
            page.set_viewport_size({"width": width, "height": 860})
            for path in ("", "workers", "queue?name=held"):
                page.goto(f"{url}{path}")
                page.wait_for_selector("text=3 of 8 slots")
                assert violations(page) == []
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    async def run() -> None:
        async with working(app, concurrency=8):
            for number in range(3):
                await hold.aenqueue(number)
            await auntil(lambda: len(begun) == 3)
            await asyncio.to_thread(browse, look)
            go.set()
        await app.aclose()

    with served(app) as url:
        asyncio.run(run())


@pytest.mark.leaves_keys("jobs are left")
def test_a_job_is_changed_and_another_runs_again(browse: Browse, url: str, tmp_path: Path) -> None:
    """
    A waiting job is changed on its page and a dead one runs again, with large numbers whole and redacted values untouched.

    Both stand in the audit with who it was; the dialogs have no fault that axe finds, in both themes, and fit a phone.
    """
    app = Conveyor(url, redact=["token"])

    @app.task(name="mail.send", queue="mail", retry=Retry(attempts=1))
    def send(user: int, token: str, text: str = "") -> None:
        raise ValueError("no such user")

    large = 2**60 + 1
    dead = send.enqueue(large, "secret-token")
    asyncio.run(drain(app))
    waiting = send.options(delay="1h").enqueue(large, "secret-token")

    def change(page: Any) -> None:
        page.goto(f"{site}job?id={waiting.id}")
        page.click("button:text-is('Change …')")
        arguments = page.locator("dialog textarea")
        assert "[redacted]" in arguments.input_value()
        assert str(large) in arguments.input_value()
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            assert violations(page) == []
            page.screenshot(path=tmp_path / f"change-{theme}.png")
        page.set_viewport_size({"width": 390, "height": 780})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "change-390.png")
        page.set_viewport_size({"width": 1280, "height": 860})
        arguments.fill(arguments.input_value().replace("}", ', "text": "hello"}'))
        page.fill("dialog input[type=number]", "7")
        page.fill("dialog input >> nth=0", "2h")
        page.click("dialog button:text-is('Change it')")
        page.wait_for_selector(".toast:has-text('The job is changed')")
        page.wait_for_selector("pre[aria-label=Arguments]:has-text('hello')")

    def run_again(page: Any) -> None:
        page.goto(f"{site}job?id={dead.id}")
        page.click("button:text-is('Run again')")
        page.screenshot(path=tmp_path / "again.png")
        page.click("dialog button:text-is('Run it again')")
        page.wait_for_selector(".toast:has-text('A new job')")
        page.wait_for_selector("h1:has-text('mail.send')")
        page.goto(f"{site}audit")
        page.wait_for_selector("tr:has-text('ada'):has-text('update')")
        page.wait_for_selector("tr:has-text('ada'):has-text('rerun')")

    with served(app) as site:
        browse(change)
        info = waiting.info()
        assert info.arguments == {"user": large, "token": "secret-token", "text": "hello"}
        assert next(app.jobs(state="scheduled")).id == waiting.id
        browse(run_again)
    [again] = app.jobs(state="ready")
    assert (again.info().origin, again.info().arguments) == (dead.id, {"user": large, "token": "secret-token"})
    app.close()


def picture(page: Any, path: Path) -> None:
    """Hold a page as it is against axe, and against its width on a desk and a phone, in both themes; keep a picture of each."""
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        assert violations(page) == []
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 860})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=path.with_name(f"{path.name}-{theme}-{width}.png"))
    page.set_viewport_size({"width": 1280, "height": 860})


def test_a_schedule_is_created_and_changed_in_a_form(browse: Browse, app: Conveyor, tmp_path: Path) -> None:
    """
    A form shows when a schedule would be due, or the column that is wrong, stores it, and changes it later without its arguments.

    One that code declares has no such button. The dialog has no fault that axe finds, in both themes, and fits a phone.
    """

    @app.cron(every="1h", name="tick", queue="ticks")
    def tick() -> None: ...

    @app.task(name="report", queue="reports")
    def report(tenant: str, days: int = 1) -> None: ...

    declared = app._core.declared_schedules["tick"]
    app.schedules.drive(app.schedules.put_program("tick", declared.call, declared.spec, "code"))
    cron, every = "dialog label:has-text('Cron expression') input", "dialog label:has-text('Or every') input"

    def create(page: Any) -> None:
        page.goto(f"{site}schedules")
        page.wait_for_selector("tr:has-text('tick')")
        page.click("button:text-is('tick')")
        page.wait_for_selector("dialog h2:text-is('tick')")
        assert page.locator("dialog button:text-is('Change …')").count() == 0
        page.click("dialog button:text-is('Close')")
        page.click("button:text-is('New schedule …')")
        page.fill("dialog label:has-text('Name') input", "daily")
        page.select_option("dialog select", "report")
        assert page.input_value("dialog textarea") == '{\n  "tenant": null\n}'
        page.fill(cron, "0 25 * * *")
        page.wait_for_selector("dialog .problem:has-text('at column 3')")
        page.fill(cron, "0 9 * * mon-fri")
        page.fill("dialog label:has-text('Time zone') input", "Europe/Berlin")
        page.wait_for_selector("dialog li:has-text('09:00:00 CE') >> nth=4")
        picture(page, tmp_path / "schedule")
        page.fill("dialog textarea", '{"tenant": "a"}')
        page.click("dialog button:text-is('Create it')")
        page.wait_for_selector(".toast:has-text('daily is created')")

    def change(page: Any) -> None:
        page.click("button:text-is('daily')")
        page.click("dialog button:text-is('Change …')")
        assert page.input_value(cron) == "0 9 * * mon-fri"
        page.fill(cron, "")
        page.fill("dialog label:has-text('Time zone') input", "")
        page.fill(every, "15m")
        page.wait_for_selector("dialog li >> nth=4")
        page.click("dialog button:text-is('Change it')")
        page.wait_for_selector(".toast:has-text('daily is changed')")
        page.wait_for_selector("tr:has-text('every 15 m')")
        picture(page, tmp_path / "schedules")
        page.goto("about:blank")  # its stream has ended before the server does

    with served(app) as site:
        browse(create)
        made = app.schedules.get("daily")
        assert (made.task, made.queue, made.origin) == ("report", "reports", "data")
        browse(change)
    assert app.schedules.get("daily").run().info().arguments == {"tenant": "a"}
    for one in app.schedules.list():
        one.delete()


def test_a_server_that_is_away_is_told_once(
    beside: tuple[ThreadPoolExecutor, Any], start_server: Callable[..., Any]
) -> None:
    """While Redis does not answer a page says so once, however much of it was asked."""
    thread, browser = beside
    server = start_server()

    def look(url: str) -> None:
        with open_page(browser, quiet=False) as page:  # the browser complains of each answer that is an error
            page.goto(f"{url}jobs")
            page.wait_for_selector("main tbody tr")
            page.wait_for_selector(".live.live", state="attached")
            server.kill()
            with page.expect_response(lambda answer: "api/v1/jobs?" in answer.url and answer.status == 503):
                page.wait_for_selector(".live.lost", state="attached")
                page.reload()
            page.wait_for_selector(".live.lost", state="attached")
            page.wait_for_selector("main [role=alert]")
            assert page.locator("main [role=alert]").count() == 1

    with Conveyor(server.url) as app, served(app) as url:
        app.queue("mail").push(1)
        thread.submit(look, url).result()
