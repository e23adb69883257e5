"""A real Chromium for tests of the dashboard; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE = Path(__file__).parents[1] / "dashboard" / "vendor" / "axe.min.js"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Return the path of an installed Chromium."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start Chromium without a window; skip where it, or Playwright, is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--force-color-profile=srgb"])
        yield browser
        browser.close()


class Complaints(list[str]):
    """Complaints of a page: errors, and all that its console says, as a broken content security policy does."""

    def follow(self, page: Any) -> None:
        page.on("console", lambda message: self.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.append(f"{error}\n{getattr(error, 'stack', '')}"))


@contextmanager
def open_page(
    browser: Any,
    *,
    theme: str = "light",
    width: int = 1280,
    height: int = 860,
    quiet: bool = True,
    timezone: str = "UTC",
) -> Iterator[Any]:
    """Open an empty page; with *quiet* the test fails when the page complains of anything."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, locale="en-GB", timezone_id=timezone
    )
    context.set_default_timeout(30_000)
    page, complaints = context.new_page(), Complaints()
    complaints.follow(page)
    try:
        yield page
        assert not quiet or not complaints, complaints
    finally:
        context.close()


def violations(page: Any, *rules: str) -> list[str]:
    """Return what axe finds wrong with the page as it is, by all its rules or only by *rules*."""
    if not page.evaluate("typeof axe !== 'undefined'"):
        page.evaluate(AXE.read_text())
    options = {"resultTypes": ["violations"]} | ({"runOnly": {"type": "rule", "values": list(rules)}} if rules else {})
    found = page.evaluate("options => axe.run(document, options)", options)["violations"]
    return [
        f"{one['id']}: {node['html'][:160]} {node.get('failureSummary', '')}" for one in found for node in one["nodes"]
    ]
