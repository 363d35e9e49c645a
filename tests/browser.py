"""The app in a real browser: Debian's chromium and a real Streamlit server."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from fine_tuning.data_collection.conversation_logger import ConversationLogger
from tests.app_checkout import REPOSITORY, environment
from tests.forked import folder as forked_python

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `apt-get install chromium`")
PHONE = {"width": 390, "height": 844}


@contextmanager
def running_app(checkout: Path, code: Path = REPOSITORY) -> Iterator[str]:
    """`streamlit run` in a checkout, as `make chat` does it; yields its address."""
    with app_process(checkout, code, python=str(forked_python() / "python")) as (address, _):
        yield address


@contextmanager
def app_process(
    checkout: Path, code: Path = REPOSITORY, modules: Path | None = None, python: str = sys.executable, **variables: str
) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, server) of the app in a checkout; `modules` is a folder of further Python modules."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = code / "fine_tuning" / "integration" / "streamlit_app.py"
    server = subprocess.Popen(
        [python, "-m", "streamlit", "run", str(app), "--server.port", str(port)],
        cwd=checkout,
        env=environment() | {"PYTHONPATH": f"{modules}:{code}" if modules else str(code)} | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):  # two minutes, on a busy machine
            try:
                if httpx.get(f"{address}/_stcore/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield address, server
    finally:
        server.terminate()
        server.wait(20)


def send(page, text: str) -> None:
    """Type a message and send it."""
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(text)
    box.press("Enter")


def choose(page, label: str, option: str) -> None:
    """Choose from a select box; `option` is how its text begins."""
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=option).first.click()


def act_until(act: Callable[[], None], shown) -> None:
    """Click or type until what follows is there: a page that is being drawn anew may lose what was done to it."""
    for _ in range(4):
        with suppress(PlaywrightTimeout):
            act()
        with suppress(PlaywrightTimeout):
            return shown.wait_for(timeout=30_000)
    shown.wait_for()


def settled(page) -> None:
    """Wait until the page has been drawn."""
    page.get_by_test_id("stApp").and_(page.locator("[data-test-script-state=notRunning]")).wait_for()


def events(checkout: Path) -> list[dict]:
    """What is in the live log."""
    return list(ConversationLogger(checkout / "inbox/conversations.jsonl").read_events())


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def press_until(page, key: str, condition: Callable[[], object]) -> None:
    """Press a key until what it does has happened; see `act_until`."""
    for _ in range(3):
        page.keyboard.press(key)
        with suppress(AssertionError):
            return until(condition, 20)
    until(condition)


def strangers(page, address: str) -> list[str]:
    """Addresses of other machines that the page asked for."""
    return [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]


def too_wide(page) -> list[str]:
    """What hangs over the edge of the window, apart from what scrolls by itself."""
    return page.evaluate(
        """() => [...document.querySelectorAll('[data-testid=stMainBlockContainer] *')].filter(e => {
            const box = e.getBoundingClientRect();
            if (box.width === 0 || box.right <= innerWidth + 1) return false;
            for (let p = e.parentElement; p; p = p.parentElement) {
                const kept = /auto|scroll|hidden|clip/.test(getComputedStyle(p).overflowX);
                if (kept && p.getBoundingClientRect().right <= innerWidth + 1)
                    return false;
            }
            return true;
        }).map(e => e.tagName + '.' + (e.dataset.testid || e.className)).slice(0, 5)"""
    )
