"""The pictures in README and docs, from a browser: `python -m tests.screenshots` in a clone that has a champion.

It chats, so it leaves a conversation in the inbox. `--phone FOLDER` takes every page at a phone's width instead.
"""

import argparse
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser import CHROMIUM, PHONE, running_app, send, settled, too_wide

DESK = {"width": 1000, "height": 760}
PAGES = ("", "chat", "compare", "review", "data", "runs", "models")
QUESTIONS = ("What is machine learning?", "How do I reset a forgotten password?")
WAIT = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phone", type=Path, metavar="FOLDER")
    folder = parser.parse_args().phone
    with running_app(Path.cwd()) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = chromium.new_page(viewport=PHONE if folder else DESK)
        page.set_default_timeout(WAIT)
        if folder:
            every_page(page, address, folder)
        else:
            visit(page, address)
            page.screenshot(path="docs/home.png")  # first: Home counts files that changed
            chat(page, address)
            for name in ("data", "models"):
                visit(page, f"{address}/{name}")
                page.screenshot(path=f"docs/{name}.png")
        chromium.close()


def visit(page: Page, address: str) -> None:
    """Open a page and wait until it has been drawn."""
    page.goto(address)
    page.get_by_test_id("stMain").wait_for()
    settled(page)
    page.wait_for_timeout(2000)  # charts are drawn after the page
    assert page.get_by_test_id("stException").count() == 0, f"{address} failed"


def chat(page: Page, address: str) -> None:
    """Two questions, one answer liked."""
    visit(page, f"{address}/chat")
    for number, question in enumerate(QUESTIONS, 1):
        send(page, question)
        page.get_by_role("radio", name="Thumbs up").nth(number - 1).wait_for()
    page.get_by_role("radio", name="Thumbs up").first.click()
    page.get_by_placeholder("Why? (optional)").wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path="docs/chat.png")


def every_page(page: Page, address: str, folder: Path) -> None:
    """All of each page, and what hangs over its edge."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        visit(page, f"{address}/{name}")
        height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        page.set_viewport_size(PHONE | {"height": min(height, 4000)})
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"{name or 'home'}.png")
        page.set_viewport_size(PHONE)
        print(name or "home", too_wide(page))


if __name__ == "__main__":
    main()
