"""
The first view of the dashboard in a real Chromium, and what viewers cost Redis: `python -m benchmarks.dashboard_viewers`.

Prints the requests, the bytes as they were sent and the time from the start of the navigation until the first bar of a chart is
painted, each in a fresh context without a cache; beside it the floor: one line of text of the same server, which no page can be
sooner than. Then the commands a second that reach Redis while 1 and 50 viewers follow.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import httpx
import redis

from benchmarks.harness import running_dashboard, running_server, wait_for
from conveyor import Conveyor

_PAINTED = """
new MutationObserver((_, observer) => {
  if (window.painted || !document.querySelector(".chart .column")) return;
  observer.disconnect();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.painted = performance.now(); }));
}).observe(document, {childList: true, subtree: true});
"""
_PHASES = """
(() => {
  const [page] = performance.getEntriesByType("navigation");
  const files = performance.getEntriesByType("resource").filter((one) => one.name.includes("static/"));
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  return {
    "page begins": page.responseStart, "page ends": page.responseEnd,
    "files are there": Math.max(...files.map((one) => one.responseEnd)),
    "modules have run": page.domContentLoadedEventEnd, "first paint": paint?.startTime ?? 0, "chart is painted": window.painted,
  };
})()
"""


def fill(app: Conveyor) -> None:
    """Store jobs in three queues, and an hour of counters."""
    minute = int(time.time()) // 60
    for name in ("mail", "media", "reports"):
        app.queue(name).push_many(range(100))
        prefix = app.client.keys(name).prefix
        for number in range(minute - 60, minute):
            app.client.execute(
                "HSET", f"{prefix}stats:{number}", f"done:{name}.work", "40", f"ms:{name}.work", "900",
                f"le3:{name}.work", "40", key=prefix + "jobs",
            )  # fmt: skip


def measure_first_view(address: str, times: int) -> None:
    """Print requests, bytes and time of the first view."""
    from playwright.sync_api import sync_playwright

    path = next(found for name in ("chromium", "google-chrome") if (found := shutil.which(name)))
    sent, asked = [], []
    phases, floor = defaultdict[str, list[float]](list), list[float]()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for _ in range(times):
            context = browser.new_context(viewport={"width": 1280, "height": 860}, bypass_csp=True)  # for what waits
            page = context.new_page()
            session = context.new_cdp_session(page)
            session.send("Network.enable")
            bytes_, requests = list[int](), list[str]()
            session.on("Network.dataReceived", lambda told, found=bytes_: found.append(told["encodedDataLength"]))
            session.on("Network.requestWillBeSent", lambda told, found=requests: found.append(told["request"]["url"]))
            page.add_init_script(_PAINTED)
            page.goto(address)
            page.wait_for_function("window.painted")
            for phase, at in page.evaluate(_PHASES).items():
                phases[phase].append(float(at))
            sent.append(sum(bytes_))
            asked.append(sum(one.startswith("http") for one in requests))
            context.close()
            floor.append(_time_text(browser, address))
        browser.close()
    print(f"first view: {max(asked)} requests, {max(sent) / 1000:.1f} kB as sent; after (median of {times}, least):")
    for phase, at in phases.items():
        print(f"  {phase:<18} {statistics.median(at):>5.0f} ms {min(at):>5.0f}")
    print(f"  {'floor, a text':<18} {statistics.median(floor):>5.0f} ms {min(floor):>5.0f}")


def _time_text(browser: Any, address: str) -> float:
    """Return after how many ms a short answer of the same server, shown as text, is painted."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, bypass_csp=True)
    page = context.new_page()
    page.goto(f"{address}api/v1/session")
    paint = "performance.getEntriesByName('first-contentful-paint')"
    page.wait_for_function(f"{paint}.length")
    after = float(page.evaluate(f"{paint}[0].startTime"))
    context.close()
    return after


def measure_viewers(address: str, url: str, viewers: int, seconds: float) -> None:
    """Print the commands a second that the server gets over the wire while so many viewers follow."""
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(limits=httpx.Limits(max_connections=None), timeout=None))
        events = [0]
        for _ in range(viewers):
            answer = stack.enter_context(client.stream("GET", f"{address}api/v1/stream?history=1h"))
            threading.Thread(target=_follow, args=(answer, events), daemon=True).start()
        wait_for(lambda: events[0] >= 3 * viewers, "every viewer to be told something")
        commands, ends = 0, time.monotonic() + seconds
        with redis.Redis.from_url(url).monitor() as monitor:
            while time.monotonic() < ends:
                told = monitor.next_command()
                commands += told["client_type"] != "lua"
        print(f"{viewers:>3} viewers: {commands / seconds:.1f} commands a second reach the server", flush=True)


def _follow(answer: Any, events: list[int]) -> None:
    try:
        for line in answer.iter_lines():
            events[0] += line.startswith("event:")
    except (httpx.HTTPError, httpx.StreamError, RuntimeError, ValueError):
        return  # it was closed


def main() -> int:
    """Measure; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard_viewers", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="first views")
    parser.add_argument("--seconds", type=float, default=20, help="for which commands are counted")
    options = parser.parse_args()
    with running_server() as (url, _):
        with Conveyor(url) as app:
            fill(app)
        with running_dashboard(url) as (address, _):
            measure_first_view(address, options.times)
            for viewers in (1, 50):
                measure_viewers(address, url, viewers, options.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
