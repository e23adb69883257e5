"""The pages of the dashboard in a real browser: drawn without a complaint, readable, usable by keys, and closed to scripts."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conveyor.units import span
from support.browser import open_browser, open_page, violations
from support.sample_dashboard import POLICY, STATIC, SampleDashboard, history
from support.xss_strings import STRINGS

DEAD, WAITS = "mail:01JDSAMPLE0000000000000007", "reports:01JDSAMPLE0000000000000042"
PAGES = {
    "overview": "", "queues": "queues", "queue": "queue?name=mail", "jobs": "jobs?filter=state%3Adead", "job": f"job?id={DEAD}",
    "waiting-job": f"job?id={WAITS}", "failures": "failures", "schedules": "schedules", "workers": "workers", "limits": "limits",
    "topics": "topics", "redis": "redis", "audit": "audit",
}  # fmt: skip
CUT = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).map(one => one.ariaLabel)"
"""The tables that are wider than their place."""
NAMED = ("name", "queue", "queues", "task", "group", "key", "tags", "id")
PICTURES = Path(__file__).parents[2] / "docs" / "images" if os.environ.get("CONVEYOR_PICTURES") else None
"""With CONVEYOR_PICTURES set the tests write the pictures of the documentation."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as one:
        yield one


@pytest.fixture(scope="module")
def sample() -> Iterator[SampleDashboard]:
    with SampleDashboard(prefix="/ops/jobs/") as one:
        yield one


def visit(page: Any, url: str) -> None:
    """Open *url* and wait until nothing is being loaded any more on it."""
    page.goto(url)
    page.wait_for_selector("main h1")
    page.wait_for_selector(".live.live", state="attached")
    page.wait_for_selector(".loading", state="detached")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_in_both_themes_and_on_a_phone(browser: Any, sample: SampleDashboard, name: str) -> None:
    """Each page below a path prefix: no complaint of the browser, nothing that axe finds, and nothing wider than its place."""
    with open_page(browser) as page:
        visit(page, sample.url + PAGES[name])
        assert page.title().endswith("· Conveyor")
        assert violations(page) == []
        assert page.evaluate(CUT) == []
        picture(page, name, "light")
        page.emulate_media(color_scheme="dark")
        assert violations(page, "color-contrast") == []
        picture(page, name, "dark")
        page.set_viewport_size({"width": 1024, "height": 768})
        assert page.evaluate(CUT) == []
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert set(page.evaluate(CUT)) <= {"Path"}


def test_a_phone_shows_the_state_that_a_job_is_in(browser: Any, sample: SampleDashboard) -> None:
    """The picture of a job's way is wider than a phone; it opens where the present state is seen."""
    with open_page(browser, width=390, height=800) as page:
        visit(page, sample.url + PAGES["job"])
        now = page.locator(".diagram .now").bounding_box()
        assert now["x"] >= 0
        assert now["x"] + now["width"] <= 390


def test_large_numbers_fit_their_tiles(browser: Any) -> None:
    """Ten million jobs, and the longest ways to write an age, are cut off at no width between a phone and a large screen."""
    cut = "[...document.querySelectorAll('.tile :is(.value, .label)')].filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent)"
    with SampleDashboard() as sample, open_page(browser, quiet=False) as page:  # the stream does not come
        snapshot = sample.answer("snapshot", {})
        counts = dict.fromkeys(("ready", "leased", "scheduled", "waiting", "dead"), 999_999)
        snapshot["totals"] |= counts | {"oldest_age": 45 * 60 + 44}
        for name in ("snapshot", "overview"):
            page.route(f"**/api/v1/{name}*", lambda route: route.fulfill(json=snapshot))
        page.route("**/api/v1/stream*", lambda route: route.fulfill(status=503))  # at a refusal the page asks at once
        for width in (390, 821, 1024, 1240, 1241, 1279, 1280, 1420, 1421):
            page.set_viewport_size({"width": width, "height": 860})
            page.goto(sample.url)
            page.wait_for_selector(".tile:has-text('999,999')")
            assert page.evaluate(cut) == [], width


def test_long_names_widen_no_page(browser: Any) -> None:
    """Names nearly as long as they may be, of all that has one: no table is cut off at 1024 pixels, and no page is wider than a phone."""
    with SampleDashboard(texts=["tenant-and-its-name-" * 6], only=NAMED) as sample, open_page(browser) as page:
        for name, path in PAGES.items():
            page.set_viewport_size({"width": 1024, "height": 860})
            visit(page, sample.url + path)
            assert page.evaluate(CUT) == [], name
            page.set_viewport_size({"width": 390, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, name


def test_what_people_did_with_long_names_fits_its_table(browser: Any) -> None:
    """A target, a filter and a detail without a place to break, as long as they are kept, are cut off on no page of the audit."""
    with (
        SampleDashboard(texts=["x" * 4_096], only=["target", "filter", "detail"]) as sample,
        open_page(browser) as page,
    ):
        visit(page, sample.url + PAGES["audit"])
        assert page.evaluate(CUT) == []
        assert page.locator("tbody tr").first.bounding_box()["height"] < 200


def picture(page: Any, name: str, theme: str) -> None:
    """Write the page as a picture of the documentation, where it is one and pictures are wanted."""
    if PICTURES and (name in {"overview", "job", "failures"}) and (theme == "light" or name == "overview"):
        page.screenshot(path=PICTURES / f"dashboard-{name}-{theme}.png")


def test_the_first_view_is_five_requests(browser: Any, sample: SampleDashboard) -> None:
    """Five requests draw the overview with its charts: the page, its style, two modules and the stream."""
    with open_page(browser) as page:
        asked: list[str] = []
        page.on(
            "request",
            lambda request: request.url.startswith("http") and asked.append(request.url.removeprefix(sample.url)),
        )
        visit(page, sample.url)
        page.wait_for_selector(".chart .column")
        assert len(asked) <= 5, asked


def test_no_text_of_a_user_is_ever_run(browser: Any, rounds: Callable[[int, int], int]) -> None:
    """Texts that would run a script stay text in the fields of every page; with --full each of two hundred in each field."""
    count = rounds(len(STRINGS), 1)
    for first in range(count):
        with SampleDashboard(texts=STRINGS[first:] + STRINGS[:first]) as sample, open_page(browser) as page:
            for path in PAGES.values():
                visit(page, sample.url + path)
                assert not page.evaluate("window.ran"), path
                bad = "[...document.querySelectorAll('a[href]')].filter(a => a.protocol !== 'http:').length"
                assert page.evaluate(bad) == 0, path
                assert page.locator("main :is(script, img, iframe, object)").count() == 0


def test_keys_go_everywhere(browser: Any, sample: SampleDashboard) -> None:
    """Letters open pages, a slash the search, a question mark the help, and Ctrl-K goes to a queue by its name."""
    with open_page(browser) as page:
        visit(page, sample.url)
        page.keyboard.press("w")
        page.wait_for_selector("h1:text('Workers')")
        page.keyboard.press("/")
        page.keyboard.type("state:ready")
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:text('Jobs')")
        assert page.input_value("#filter") == "state:ready"
        page.locator("main").focus()
        page.keyboard.press("?")
        page.wait_for_selector("dialog h2:text('Keys')")
        assert violations(page) == []
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog", state="detached")
        page.keyboard.press("Control+k")
        page.wait_for_selector(".palette input")
        page.keyboard.type("web")
        assert violations(page) == []
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:text('webhooks')")
        page.keyboard.press("Control+k")
        page.wait_for_selector(".palette input")
        page.keyboard.type("mail")
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:text-is('mail')")  # the name itself, before longer ones


def test_a_single_minute_is_seen_on_a_chart(browser: Any, sample: SampleDashboard) -> None:
    """A value with none beside it, as the first minute of a new system has, is drawn as a dot: no line leads to it."""
    once = history("15m") | {f"{name}_ms": [None] * 14 + [3_900_000] for name in ("p50", "p95", "p99")}
    with open_page(browser) as page:
        page.route("**/api/v1/history?range=15m*", lambda route: route.fulfill(json=once))
        visit(page, sample.url)
        assert page.locator(".chart .lone[d^=M]").count() == 0
        page.click("button:text('15 min')")
        page.wait_for_selector(".chart .lone[d^=M] >> nth=2", state="attached")
        assert page.locator(".chart .lone").first.evaluate("one => parseFloat(getComputedStyle(one).strokeWidth)") >= 4
        ticks = page.locator(".chart").nth(1).locator("svg text[text-anchor=end]").all_text_contents()
        assert {"30 m", "1 h"} <= set(ticks)  # and not as the next round number of milliseconds


def test_a_form_is_sent_once(browser: Any, sample: SampleDashboard) -> None:
    """A double click on the button of a form enqueues one job; a form that is refused stays, with what is wrong beside its fields."""
    with open_page(browser) as page:
        visit(page, sample.url + PAGES["job"])
        page.click("button:text('Duplicate …')")
        arguments = page.input_value("dialog textarea")
        page.fill("dialog textarea", "{")
        page.click("dialog button:text('Enqueue')")
        page.wait_for_selector("dialog [role=alert]:has-text('no JSON')")
        page.fill("dialog textarea", arguments)
        before = len(sample.posted)
        page.dblclick("dialog button:text('Enqueue')")
        page.wait_for_url("**/job?id=*0001")
        assert [path for path, _ in sample.posted[before:]].count("enqueue") == 1


def test_a_job_that_is_gone_has_no_actions(browser: Any, sample: SampleDashboard) -> None:
    """Where a job was deleted by another before a button is pressed, that is told once, and the page offers nothing more."""
    with open_page(browser, quiet=False) as page:
        visit(page, sample.url + PAGES["job"])
        page.select_option("select[aria-label=Refresh]", "0")
        missing = {"error": {"code": "E23", "message": "No job is known."}}
        page.route("**/api/v1/job?*", lambda route: route.fulfill(status=404, json=missing))
        gone = {"results": [{"id": DEAD, "outcome": "not found", "detail": ""}], "done": 0}
        page.route("**/api/v1/jobs/actions", lambda route: route.fulfill(json=gone))
        page.click("button:text-is('Retry')")
        page.wait_for_selector(".toast:has-text('The job is not there any more.')")
        page.wait_for_selector(".empty:has-text('No such job')")
        assert page.locator(".head button").count() == 0


def test_an_action_on_all_that_match_tells_its_end(browser: Any, sample: SampleDashboard) -> None:
    """After an action in the background has ended, the page says how many jobs it changed and how many it did not."""
    ended = {"id": "op1", "action": "retry", "state": "done", "total": 87, "done": 86, "refused": 1}
    with open_page(browser) as page:
        page.route("**/api/v1/operation?*", lambda route: route.fulfill(json={"operation": ended}))
        visit(page, sample.url + PAGES["failures"])
        page.click("td.actions button:text-is('Retry') >> nth=0")
        page.click("dialog button.primary")
        page.wait_for_selector(".toast:has-text('started for')")
        page.wait_for_selector(".toast:has-text('86 jobs are ready again. 1 job is unchanged.')")


def test_the_key_enter_destroys_nothing(browser: Any, sample: SampleDashboard) -> None:
    """A question about what cannot be undone begins at the way back: whoever presses Enter twice deletes nothing."""
    with open_page(browser) as page:
        visit(page, sample.url + PAGES["queue"])
        before = len(sample.posted)
        for button in ("Delete dead", "Purge"):
            page.locator(f"button:text-is('{button}')").focus()
            page.keyboard.press("Enter")
            page.wait_for_selector("dialog:focus-within")
            page.keyboard.press("Enter")
            page.wait_for_selector("dialog", state="detached")
        assert sample.posted[before:] == []


def test_a_mistake_in_a_filter_is_pointed_at(browser: Any, sample: SampleDashboard) -> None:
    """The mark below a filter stands under the column that is wrong."""
    error = {"error": {"code": "E42", "message": "Column 12 of the filter: …", "position": 11}}
    with open_page(browser, quiet=False) as page:
        page.route("**/api/v1/jobs?*", lambda route: route.fulfill(status=422, json=error))
        visit(page, sample.url + "jobs?filter=state%3Adead%20taks%3Ax")
        assert page.locator(".problem pre").text_content() == "state:dead taks:x\n" + " " * 11 + "^"


def test_a_search_goes_on_until_a_page_is_full(browser: Any, sample: SampleDashboard) -> None:
    """A call that has looked at some jobs for its time and found few is gone on with; a page says what was looked at in all."""
    asked: list[str] = []
    rows = sample.answer("jobs", {})["jobs"][:3]

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        found = [one | {"id": f"{one['id']}{len(asked)}"} for one in rows[: len(asked) - 1]]
        route.fulfill(
            json={"jobs": found, "next": f"c{len(asked)}", "looked": 4_000, "total": 84_211, "footer": "Searched"}
        )

    with open_page(browser) as page:
        page.route("**/api/v1/jobs?*", answer)
        visit(page, sample.url + "jobs?filter=error%3Ax")
        page.wait_for_selector(".foot:has-text('Searched 12,000 of 84,211 jobs.')")
        assert page.locator("tbody tr").count() == 3
        assert ["cursor=c1" in one for one in asked[:3]] == [False, True, False]


def test_a_chosen_view_is_in_the_address(browser: Any, sample: SampleDashboard) -> None:
    """A period, a filter of names and a schedule that is open stand in the address, so that a link shows the same."""
    with open_page(browser) as page:
        for path, chosen in (("failures", "7 d"), ("", "24 h"), ("queue?name=mail", "6 h")):
            visit(page, sample.url + path)
            page.click(f"main button:text-is('{chosen}')")
            page.wait_for_url("**range=*")
            visit(page, page.url)
            page.wait_for_selector(f"button[aria-pressed=true]:text-is('{chosen}')")
        visit(page, sample.url + "queues")
        page.fill("main input[placeholder='Filter by name']", "web")
        page.wait_for_url("**queues?q=web")
        page.click("nav a:text('Schedules')")
        page.wait_for_selector("h1:text('Schedules')")
        page.go_back()
        page.wait_for_selector("h1:text('Queues')")
        assert page.input_value("main input[placeholder='Filter by name']") == "web"
        visit(page, sample.url + "failures?range=nonsense")
        page.wait_for_selector("button[aria-pressed=true]:text-is('24 h')")


def test_a_time_has_the_clocks_of_here_and_of_utc(browser: Any, sample: SampleDashboard) -> None:
    """Whatever form of times was chosen, what stands behind one names the others, with the zone of each."""
    with open_page(browser, timezone="Asia/Tokyo") as page:
        visit(page, sample.url + PAGES["audit"])
        title = page.locator("tbody time").first.get_attribute("title")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:]{8} local · \d{4}-\d\d-\d\d [\d:]{8} UTC", title), title
        page.select_option("#times", "utc")
        title = page.locator("tbody time").first.get_attribute("title")
        assert re.fullmatch(r"(now|.* ago) · .* local · .* UTC", title), title


def test_signs_that_turn_text_are_shown_as_numbers(browser: Any) -> None:
    """Characters that change the direction of what follows, or are not seen, are written as numbers where texts of a program stand."""
    with SampleDashboard(texts=["a\u202ebc\u200b\x1b"]) as sample, open_page(browser) as page:
        for path in (PAGES["job"], PAGES["jobs"], PAGES["failures"]):
            visit(page, sample.url + path)
            texts = page.locator("main :is(.sub, pre, .trace, .log)").all_text_contents()
            assert any("a\\u202ebc\\u200b\\u001b" in one for one in texts), path
            assert not any(sign in one for one in texts for sign in "\u202e\u200b\x1b"), path


def test_a_login_that_has_ended_is_told(browser: Any, sample: SampleDashboard) -> None:
    """Where the page of a login answers in place of the API, a page says so and does not go blank."""
    with open_page(browser, quiet=False) as page:
        login = {"status": 200, "content_type": "text/html", "body": "<h1>Log in</h1>"}
        page.route("**/api/v1/**", lambda route: route.fulfill(**login))
        page.goto(sample.url + "workers")
        page.wait_for_selector("main [role=alert]:has-text('perhaps your login has ended')")


def test_a_running_job_that_is_looked_at_sends_its_lines(browser: Any, sample: SampleDashboard) -> None:
    """The page of a running job asks for its lines as they come, and shows the newest, unless an earlier one is being read."""
    document = sample.answer("job", {"id": DEAD})
    line = document["logs"][0]
    document["job"]["state"], document["logs"] = "leased", [line | {"text": f"line {n}"} for n in range(100)]
    with open_page(browser) as page:
        page.route("**/api/v1/job?*", lambda route: route.fulfill(json=document))
        page.route("**/api/v1/job/logs?*", lambda route: route.fulfill(json={"followed": True, "logs": []}))
        with page.expect_request(lambda request: "api/v1/job/logs?" in request.url):
            visit(page, sample.url + PAGES["job"])
        box = page.locator(".log")
        assert box.evaluate("one => one.scrollHeight - one.scrollTop - one.clientHeight") < 24
        document["logs"].append(line | {"text": "a new one"})
        page.wait_for_selector(".log :text('a new one')")
        assert box.evaluate("one => one.scrollHeight - one.scrollTop - one.clientHeight") < 24
        box.evaluate("one => one.scrollTo(0, 100)")
        document["logs"].append(line | {"text": "the last one"})
        page.wait_for_selector(".log :text('the last one')")
        assert box.evaluate("one => one.scrollTop") == 100


def test_a_long_traceback_is_folded(browser: Any, sample: SampleDashboard) -> None:
    """Of sixty frames those nearest to the error are seen, the others open on demand."""
    document = sample.answer("job", {"id": DEAD})
    frame = document["job"]["errors"][-1]["frames"][0]
    document["job"]["errors"][-1]["frames"] = [frame | {"own": True, "line": line} for line in range(60)]
    with open_page(browser) as page:
        page.route("**/api/v1/job?*", lambda route: route.fulfill(json=document))
        visit(page, sample.url + PAGES["job"])
        first = page.locator(".trace > .user .where")
        assert first.count() == 8
        assert ":59 in" in first.first.inner_text()
        page.click(".trace summary:text('52 frames further out')")
        page.wait_for_selector(".trace details .where:has-text(':0 in')")


def test_a_schedule_says_all_of_when_it_runs(browser: Any, sample: SampleDashboard) -> None:
    """The words of an expression are not cut, its zone included, and one that is paused names no next instant."""
    with open_page(browser) as page:
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 860})
            visit(page, sample.url + PAGES["schedules"])
            cut = "[...document.querySelectorAll('td .sub')].filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent)"
            assert page.evaluate(cut) == []
            assert "ago" not in page.inner_text("tr:has-text('import.partner')")


def test_arguments_keep_every_digit(browser: Any, sample: SampleDashboard) -> None:
    """An integer beyond 2^53 is shown, and sent again, as it is stored."""
    with open_page(browser) as page:
        visit(page, sample.url + PAGES["job"])
        assert "9007199254740993" in page.inner_text("pre[aria-label=Arguments]")
        with page.expect_request(lambda request: request.url.endswith("api/v1/enqueue")) as sent:
            page.click("button:text('Duplicate …')")
            page.click("dialog button:text('Enqueue')")
        assert '"user": 9007199254740993,' in sent.value.post_data
        page.wait_for_url("**/job?id=*0001")


def test_a_choice_stays_while_the_list_lives(browser: Any, sample: SampleDashboard) -> None:
    """A box that is ticked stays ticked while snapshots come in; an action on it says how many jobs it changed."""
    with open_page(browser) as page:
        visit(page, sample.url + PAGES["jobs"])
        page.check("tbody tr:nth-child(2) input[type=checkbox]")
        with page.expect_request(lambda request: "jobs/counts" in request.url):
            page.mouse.move(0, 0)
        assert page.is_checked("tbody tr:nth-child(2) input[type=checkbox]")
        assert violations(page) == []
        page.click(".bar button:text-is('Retry')")
        page.wait_for_selector(".toast:has-text('1 job is ready again.')")
        assert (
            sample.posted[-1][1]["ids"] == ["mail:01JDSAMPLE0000000000000002"] or len(sample.posted[-1][1]["ids"]) == 1
        )


def test_what_was_seen_stays_when_the_server_goes(browser: Any) -> None:
    """Without an answer the page says so, and keeps the numbers of the last answer."""
    with open_page(browser, quiet=False) as page:
        with SampleDashboard() as sample:
            visit(page, sample.url)
        page.wait_for_selector("[role=alert]:has-text('does not answer')")
        assert page.inner_text(".tile >> nth=4 >> .value") == "132"


def test_files_are_small_and_their_own() -> None:
    """All code and style is at most 70 kB compressed, asks no other host, runs no text, and vendored files are as they were."""
    files = [path for path in sorted(STATIC.rglob("*")) if path.suffix in {".js", ".css", ".html"}]
    assert sum(len(gzip.compress(path.read_bytes(), 9)) for path in files) <= 70_000
    own = "".join(path.read_text() for path in files if path.parent.name != "vendor")
    assert set(re.findall(r"https?://[\w.]+", own)) <= {"http://www.w3.org"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|dangerouslySet", own
    )
    assert "unsafe" not in POLICY
    lines = (STATIC / "vendor" / "SOURCES").read_text().splitlines()
    sums = {name: digest for name, digest, *_ in (line.split() for line in lines if not line.startswith("#"))}
    assert sums == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").glob("*.js")
    }


def test_durations_and_counts_are_written_as_on_the_command_line(browser: Any, sample: SampleDashboard) -> None:
    """A page writes a length of time as the sentences of the server do, and counts with commas, from a million on in short."""
    seconds = (0.34, 1.2, 59, 60, 200, 3600, 7500, 90_000, 172_800)
    with open_page(browser) as page:
        visit(page, sample.url)
        page.evaluate("async () => { window.shell = await import(document.querySelector('script[type=module]').src); }")
        assert page.evaluate("list => list.map(n => shell.span(n * 1000))", seconds) == [span(one) for one in seconds]
        assert page.evaluate("[null, 0, 999, 1204, -1204, 999999, 1e6, 1234567, 999960000, 2.5e12].map(shell.num)") == [
            "–", "0", "999", "1,204", "-1,204", "999,999", "1M", "1.2M", "1B", "2.5T",
        ]  # fmt: skip
