"""The app in a real browser: Debian's chromium, a real Streamlit server, a real llama.cpp with a tiny model."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fine_tuning.data_collection.conversation_logger import ConversationLogger
from tests.app_checkout import APP, REPOSITORY, environment, write_checkout
from tests.fake_ollama import FakeOllama, Manifest

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `apt-get install chromium`")

EVIL = (
    "Look: ![pixel](http://tracker.example/p.png) <img src=http://tracker.example/q.png> "
    "<script>document.title='x'</script>"
)


@contextmanager
def running_app(checkout: Path) -> Iterator[str]:
    """`streamlit run` in a checkout, as `make chat` does it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", str(APP), "--server.port", str(port)],
        cwd=checkout,
        env=environment() | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{address}/_stcore/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A phone-sized page that remembers every address it asked for."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(45_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.close()


def send(page, text: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(text)
    box.press("Enter")


def events(checkout: Path) -> list[dict]:
    return list(ConversationLogger(checkout / "inbox/conversations.jsonl").read_events())


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def strangers(page, address: str) -> list[str]:
    return [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]


def live_model(ollama: FakeOllama) -> None:
    layers = [{"mediaType": "m", "digest": "d", "size": 1}]
    ollama.manifests["whetstone:live"] = Manifest(layers, "{{ range .Messages }}{{ .Content }}{{ end }}", "", {})


def test_chat_then_thumb_then_seal(tmp_path, tiny_base, page):
    checkout = write_checkout(tmp_path, tiny_base)
    for command in ("git init -q", f"{sys.executable} -m dvc init -q"):
        subprocess.run(command.split(), cwd=checkout, check=True, env=environment())
    shutil.copy(REPOSITORY / ".gitignore", checkout)
    with running_app(checkout) as address:
        page.goto(address)
        send(page, "How do I reset the router?")
        page.get_by_role("radio", name="Thumbs up").click()
        until(lambda: [event["event"] for event in events(checkout)] == ["exchange", "feedback"])

        page.goto(f"{address}/data")
        page.get_by_text("1 to seal, 0 sealed.").wait_for()
        page.get_by_role("button", name="Seal").click()
        page.get_by_text("0 to seal, 1 sealed.").wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, "nothing is wider than a phone"
        assert strangers(page, address) == []

        (shard,) = (checkout / "data/conversations").glob("*.jsonl")
        (sealed,) = map(json.loads, shard.read_text().splitlines())
        assert sealed["messages"][0]["content"] == "How do I reset the router?"
        assert sealed["feedback"][0]["rating"] == 1
        assert sealed["source"] == "chat"
        assert (checkout / "data/conversations.dvc").is_file()

        page.goto(address)
        page.get_by_test_id("stExpandSidebarButton").click()
        page.get_by_role("button", name="How do I reset the router?").click()
        page.get_by_role("radio", name="Thumbs up", checked=True).wait_for()


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_base):
    """(address, checkout, Ollama) of an app that chats through Ollama."""
    with FakeOllama(reply="Restart the router and wait.") as ollama:
        live_model(ollama)
        checkout = write_checkout(tmp_path_factory.mktemp("served"), tiny_base, host=ollama.host)
        with running_app(checkout) as address:
            yield address, checkout, ollama


def of_this_chat(page, checkout: Path) -> list[dict]:
    identity = page.url.rsplit("=", 1)[-1]
    return [event for event in events(checkout) if event["conversation_id"] == identity]


def test_stop_in_mid_stream_keeps_what_came(served, page):
    address, checkout, ollama = served
    page.goto(address)
    page.get_by_test_id("stChatInputTextArea").wait_for()
    ollama.faults["POST /api/chat"] = "hang in stream"
    send(page, "What now?")
    page.get_by_text("Restart").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped, not trained on").wait_for()
    (event,) = of_this_chat(page, checkout)
    assert event["metadata"]["incomplete"] == "stopped"
    assert event["assistant_response"] == "Restart "

    send(page, "And then?")
    page.get_by_text("Restart the router and wait.").wait_for()
    until(lambda: len(of_this_chat(page, checkout)) == 2)
    assert "incomplete" not in of_this_chat(page, checkout)[1]["metadata"]


def test_a_reply_is_text_whatever_it_says(served, page):
    address, _, ollama = served
    page.goto(address)
    page.get_by_test_id("stChatInputTextArea").wait_for()
    ollama.reply, before = EVIL, ollama.reply
    send(page, "Hello")
    page.get_by_role("radio", name="Thumbs up").wait_for()
    ollama.reply = before
    shown = page.get_by_test_id("stChatMessage").nth(1)
    assert "<img src=" in shown.inner_text() and "<script>" in shown.inner_text()
    assert shown.locator("img").count() == 0
    assert page.title() != "x"
    assert strangers(page, address) == []


def test_a_conversation_is_deleted_after_it_said_where_it_is(served, page):
    address, checkout, _ = served
    page.set_viewport_size({"width": 1000, "height": 800})
    page.goto(address)
    send(page, "Forget this")
    page.get_by_role("radio", name="Thumbs up").wait_for()
    said = of_this_chat(page, checkout)
    page.get_by_role("button", name="This chat").click()
    page.get_by_role("button", name="Delete…").click()
    page.get_by_text("the live log (1 event)").wait_for()
    page.get_by_role("button", name="Delete it").click()
    page.get_by_role("button", name="Forget this").wait_for(state="detached")
    assert events(checkout)[-1]["event"] == "delete"
    assert events(checkout)[-1]["conversation_id"] == said[0]["conversation_id"]


def test_a_reply_goes_on_while_its_page_is_closed(served, page):
    address, checkout, _ = served
    page.goto(address)
    page.get_by_test_id("stChatInputTextArea").wait_for()
    conversation = page.url
    send(page, "Tell me everything")
    page.get_by_test_id("stChatMessage").get_by_text("Tell me everything").wait_for()
    page.goto("about:blank")
    until(lambda: events(checkout)[-1]["event"] == "exchange")
    page.goto(conversation)
    page.get_by_test_id("stChatMessage").get_by_text("Tell me everything").wait_for()
    page.get_by_role("radio", name="Thumbs up").wait_for()
