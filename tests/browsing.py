"""A headless Chromium, and what its pages ask for and complain about."""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@contextmanager
def launched():
    """The browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@dataclass
class Watch:
    """Opens pages of one test.

    Attributes:
        requests: the addresses that the pages asked for.
        complaints: what they wrote to the console, raised, and asked in dialogues.
    """

    browser: object
    requests: list = field(default_factory=list)
    complaints: list = field(default_factory=list)
    contexts: list = field(default_factory=list)

    def page(self, **options):
        self.contexts.append(self.browser.new_context(**options))
        page = self.contexts[-1].new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        return page


@contextmanager
def watching(browser):
    """A `Watch` that must have seen no complaint when the block ends."""
    watch = Watch(browser)
    yield watch
    assert watch.complaints == []
    for context in watch.contexts:
        context.close()
