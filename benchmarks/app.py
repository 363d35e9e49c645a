"""Seconds until the app's pages are drawn in a browser, with 10, 5,000 and 100,000 conversations.

    python -m benchmarks.app [--sizes 10 5000 100000] [--folder DIR]

For each size a checkout is made in a temporary folder (of DIR): conversations of benchmarks/load.py as shards, which
the stages intake and clean have taken in, and a tiny base model. The app runs in it as `make chat` starts it, with
chromium on the same machine. `first` is the first visit after the app has started, when what pages read is indexed;
`again` the median of five later ones; then those after a message was logged, and after a thousand conversations were
sealed. Beside each are the CPU seconds of the server. `search` is the median of three times from Enter in the search of
Data, for a word that nobody said, to the answer. The memory is the server's (PSS) at the end.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.load import SHARD, conversations
from fine_tuning.common.project import CONVERSATIONS, LOG
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shards import write_shard
from stages import clean, intake
from tests.app_checkout import write_checkout
from tests.browser import CHROMIUM, app_process, settled
from tests.tiny import write_tiny_base

PAGES = ("", "chat", "data")  # those that read the conversations
SEALED = 1000
WAIT = 600_000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 5000, 100_000], metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        write_tiny_base(base := Path(name) / "base")
        for size in arguments.sizes:  # before Playwright's threads: the stage clean forks
            collect(Path(name) / str(size), base, size)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox"])
            print("conversations  page   first    (CPU)   again    (CPU)   said     (CPU)   sealed   (CPU)")
            for size in arguments.sizes:
                visit(chromium, Path(name) / str(size), size)


def collect(checkout: Path, base: Path, size: int) -> None:
    """A checkout with so many conversations, cleaned."""
    checkout.mkdir()
    write_checkout(checkout, base)
    with contextlib.chdir(checkout):
        for start in range(0, size, SHARD):
            write_shard("data/conversations", "import", conversations(start, min(size, start + SHARD)))
        intake.main()
        clean.main()


def visit(chromium: Browser, checkout: Path, size: int) -> None:
    """Print the times of one app."""
    with app_process(checkout) as (address, server):
        page = chromium.new_page()
        page.set_default_timeout(WAIT)
        for number, path in enumerate(PAGES):
            first, *later = (seconds(page, f"{address}/{path}", server.pid) for _ in range(6))
            ConversationLogger(checkout / LOG).log_conversation("What is new?", "This.")
            said = seconds(page, f"{address}/{path}", server.pid)
            start = size + number * SEALED
            write_shard(checkout / CONVERSATIONS, f"20270101T{start:09d}-chat", conversations(start, start + SEALED))
            times = (first, statistics.median_low(later), said, seconds(page, f"{address}/{path}", server.pid))
            shown = " ".join(f"{wall:6.2f} s ({cpu:5.2f})" for wall, cpu in times)
            print(f"{size:13,}  {path or 'home':6} {shown}", flush=True)
        times = []
        for _ in range(3):
            seconds(page, f"{address}/data", server.pid)
            times.append(seconds(page, None, server.pid))
        wall, cpu = statistics.median_low(times)
        print(f"{size:13,}  search {wall:6.2f} s ({cpu:5.2f})")
        memory = psutil.Process(server.pid).memory_full_info().pss >> 20
        print(f"{size:13,}  memory {memory:9,} MiB", flush=True)
        page.close()


def seconds(page: Page, address: str | None, server: int) -> tuple[float, float]:
    """From the request to the page as it stays, or of Data to the answer of a search, and the server's CPU seconds."""
    began, used = time.monotonic(), sum(psutil.Process(server).cpu_times()[:2])
    if address is None:
        page.get_by_role("textbox", name="Search").fill("qqqq")
        page.get_by_role("textbox", name="Search").press("Enter")
        page.get_by_text("None.", exact=True).wait_for()
    else:
        page.goto(address)
        page.get_by_test_id("stMainBlockContainer").wait_for()
        settled(page)
    return time.monotonic() - began, sum(psutil.Process(server).cpu_times()[:2]) - used


if __name__ == "__main__":
    main()
