"""A picture of `bridle demo`: methods of a comparison side by side, with the card of a token.

python benchmarks/demo_picture.py runs/quickstart docs/images/demo.png

Needs Playwright and a Chromium. The quickstart's world is invented, and so is what its models say.
"""

import argparse
import shutil
import socket
import threading

import uvicorn
from playwright.sync_api import sync_playwright

from bridle.demo.server import application
from bridle.demo.session import Session
from bridle.demo.subject import subject_of

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison")
    parser.add_argument("picture")
    parser.add_argument("--prompt", default="Tavern board. barley writes, heated:")
    parser.add_argument("--seed", default="0")
    asked = parser.parse_args()
    session = Session(subject_of(asked.comparison))
    session.load()
    listener = socket.create_server((HOST, 0))
    server = uvicorn.Server(uvicorn.Config(application(session, HOST), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        photograph(f"http://{HOST}:{listener.getsockname()[1]}/", asked)
    finally:
        server.should_exit = True
        thread.join()


def photograph(address: str, asked: argparse.Namespace) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1640})
        page.goto(address)
        page.get_by_label("Prompt").first.fill(asked.prompt)
        page.get_by_label("Seed").fill(asked.seed)
        page.get_by_label("Seed").press("Tab")
        page.get_by_role("button", name="Draw 32").click()
        page.locator(".drawn").last.locator(".dot").nth(31).wait_for(timeout=60_000)
        page.get_by_role("button", name="Write", exact=True).click()
        page.locator(".verdict").last.wait_for(timeout=60_000)
        page.wait_for_timeout(500)
        page.locator(".written").last.locator(".token").nth(5).focus()
        page.screenshot(path=asked.picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
