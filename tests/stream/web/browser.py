"""A real browser: Chromium, headless, driven by Playwright."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from tests.conftest import requires

WAIT_MS = 90_000
"""On a busy machine a page takes its time."""

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@contextlib.contextmanager
def page(width: int = 1280, height: int = 900, **context: Any) -> Iterator[Any]:
    """Open a page. At the end nothing may stand in its console, and nothing may have been asked of others."""
    requires("chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        try:
            opened = browser.new_context(
                viewport={"width": width, "height": height}, **{"color_scheme": "light", **context}
            )
            opened.set_default_timeout(WAIT_MS)
            tab = opened.new_page()
            said: list[str] = []
            asked: list[str] = []
            tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.said, tab.asked = said, asked
            yield tab
            foreign = [url for url in asked if "//127.0.0.1:" not in url]
            assert foreign == []
            assert said == []
        finally:
            browser.close()


def settled(tab: Any, expression: str) -> None:
    """Wait until an expression holds. Not with Playwright's own function, which the pages' policy forbids."""
    end = time.monotonic() + WAIT_MS / 1000
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        tab.wait_for_timeout(100)
