"""A page in a real browser: its messages on the console, and its requests to the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = 375, 1100


@dataclass
class Opened:
    """An open page, with its warnings, errors and network requests so far."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's Chromium without a window; the test is skipped without one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on PATH")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, *, width: int = DESK, **options: Any) -> Iterator[Opened]:
    """A file in its own window, after its scripts have run; `options` are those of a browser context."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    found = Opened(context.new_page())
    found.page.on("console", lambda m: found.complaints.append(m.text) if m.type in ("error", "warning") else None)
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("request", lambda r: found.requests.append(r.url) if not _inside(r.url) else None)
    found.page.goto(file.as_uri())
    if options.get("java_script_enabled", True) and found.page.locator("#moving").count():
        found.page.wait_for_selector("#moving[data-ready]")
    yield found
    context.close()


def _inside(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))
