"""The app in a real browser: Debian's chromium, a real Streamlit server, a real llama.cpp with a tiny model."""

import json
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.schema.votes import read_votes
from tests.app_checkout import add_candidate, add_repositories, write_checkout
from tests.browser import (
    PHONE,
    act_until,
    app_process,
    events,
    needs_chromium,
    press_until,
    running_app,
    send,
    settled,
    strangers,
    too_wide,
    until,
)
from tests.fake_ollama import FakeOllama, Manifest

pytestmark = [needs_chromium, pytest.mark.end_to_end]

EVIL = (
    "Look: ![pixel](http://tracker.example/p.png) <img src=http://tracker.example/q.png> "
    "<script>document.title='x'</script>"
)


def live_model(ollama: FakeOllama) -> None:
    layers = [{"mediaType": "m", "digest": "d", "size": 1}]
    ollama.manifests["whetstone:live"] = Manifest(layers, "{{ range .Messages }}{{ .Content }}{{ end }}", "", {})


def test_chat_then_thumb_then_seal(tmp_path, tiny_base, page):
    checkout = add_repositories(write_checkout(tmp_path, tiny_base))
    with running_app(checkout) as address:
        page.goto(f"{address}/chat")
        send(page, "How do I reset the router?")
        page.get_by_role("radio", name="Thumbs up").click()
        until(lambda: [event["event"] for event in events(checkout)] == ["exchange", "feedback"])

        page.goto(address)
        page.get_by_role("button", name="Seal only").click()
        page.get_by_test_id("stAlert").get_by_text("Seal: next:").wait_for()
        page.goto(f"{address}/data")
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

        page.goto(f"{address}/chat")
        page.get_by_test_id("stExpandSidebarButton").click()
        page.get_by_role("button", name="How do I reset the router?").click()
        page.get_by_role("radio", name="Thumbs up", checked=True).wait_for()


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_base):
    """(address, checkout, Ollama) of an app that chats through Ollama, which has a version beside the live one."""
    with FakeOllama(reply="Restart the router and wait.") as ollama:
        live_model(ollama)
        ollama.manifests["whetstone:5"] = Manifest([{"mediaType": "m", "digest": "e", "size": 1}], "", "", {})
        checkout = add_repositories(write_checkout(tmp_path_factory.mktemp("served"), tiny_base, host=ollama.host))
        with running_app(checkout) as address:
            yield address, checkout, ollama


def of_this_chat(page, checkout: Path) -> list[dict]:
    identity = page.url.rsplit("=", 1)[-1]
    return [event for event in events(checkout) if event["conversation_id"] == identity]


def test_stop_in_mid_stream_keeps_what_came(served, page):
    address, checkout, ollama = served
    page.goto(f"{address}/chat")
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
    page.goto(f"{address}/chat")
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


def test_two_models_are_compared_blind(served, page):
    address, checkout, _ = served
    page.goto(f"{address}/compare")
    page.get_by_role("textbox", name="Message for both").fill("Which one?")
    page.get_by_role("button", name="Ask both").click()
    page.get_by_role("button", name="Right", exact=True).wait_for()
    sides = page.get_by_test_id("stColumn").all_inner_texts()
    assert [side.split() for side in sides] == [
        f"{side} Restart the router and wait.".split() for side in ("Left", "Right")
    ]
    assert too_wide(page) == []
    page.get_by_role("button", name="Right", exact=True).click()
    page.get_by_text("Your vote:").wait_for()
    sides = page.get_by_test_id("stColumn").all_inner_texts()
    assert {next(name for name in ("Live", "version 5") if name in side) for side in sides} == {"Live", "version 5"}
    page.get_by_text("win rate").wait_for()

    logger = ConversationLogger(checkout / "inbox/conversations.jsonl")
    (held,) = [c for c in logger.read_conversations() if c["source"] == "compare"]
    chosen = "whetstone:5" if "version 5" in sides[1] else "whetstone:live"
    (other,) = held["messages"][1]["alternatives"]
    assert held["messages"][1]["model"] == chosen != other["model"]
    assert held["feedback"][0]["over"] == [other["id"]]
    assert strangers(page, address) == []


def test_another_web_page_cannot_talk_to_the_app(served):
    address, *_ = served
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}

    def status(**headers: str) -> int:
        asked = upgrade | {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="} | headers
        with httpx.stream("GET", f"{address}/_stcore/stream", headers=asked, trust_env=False) as answer:
            return answer.status_code

    assert status(Origin=address) == 101
    assert status(Origin="http://evil.example") == 403
    # A name of somebody else's that leads to this machine has the origin that it asks from.
    assert status(Host="evil.example:8501", Origin="http://evil.example:8501") == 403
    assert httpx.put(f"{address}/_stcore/upload_file/a/b", content=b"x", trust_env=False).status_code == 403


def test_a_conversation_is_deleted_at_once_and_erased_after_it_was_said_where_it_is(served, page):
    address, checkout, _ = served
    page.set_viewport_size({"width": 1000, "height": 800})
    page.goto(f"{address}/chat")
    send(page, "Forget this")
    page.get_by_role("radio", name="Thumbs up").wait_for()
    said = of_this_chat(page, checkout)
    page.get_by_role("button", name="This chat").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Forget this", exact=True).wait_for(state="detached")
    page.get_by_text("Deleted (1)").click()
    page.get_by_role("button", name="Undo: Forget this").wait_for()
    erase = page.get_by_role("button", name="Erase for good…")
    act_until(lambda: erase.click(timeout=5000), page.get_by_text("inbox/conversations.jsonl: 2 events → taken out"))
    page.get_by_text("no stage has to run").wait_for()
    page.get_by_role("button", name="Erase it").click()
    page.get_by_test_id("stAlertContentSuccess").get_by_text("Erase: next: git add").wait_for()
    page.get_by_text("Its output").click()
    page.get_by_text("is left there").wait_for()
    identity = said[0]["conversation_id"]
    assert identity not in (checkout / "inbox/conversations.jsonl").read_text()
    (tombstone,) = (checkout / "data/forgotten.jsonl").read_text().splitlines()
    assert "Forget" not in tombstone


def test_a_reply_goes_on_while_its_page_is_closed(served, page):
    address, checkout, _ = served
    page.goto(f"{address}/chat")
    page.get_by_test_id("stChatInputTextArea").wait_for()
    conversation = page.url
    send(page, "Tell me everything")
    page.get_by_test_id("stChatMessage").get_by_text("Tell me everything").wait_for()
    page.goto("about:blank")
    until(lambda: events(checkout)[-1]["event"] == "exchange")
    page.goto(conversation)
    page.get_by_test_id("stChatMessage").get_by_text("Tell me everything").wait_for()
    page.get_by_role("radio", name="Thumbs up").wait_for()


def test_a_drawing_in_a_reply_is_not_drawn(served, page):
    address, _, ollama = served
    page.goto(f"{address}/chat")
    page.get_by_test_id("stChatInputTextArea").wait_for()
    drawing = 'flowchart TD\n    A@{ img: "http://tracker.example/m.png", label: "x", h: 60 }\n'
    quoted = drawing.replace("\n", "\n> ")
    spellings = ("mermaid", "MERMAID", "&#109;ermaid", "language-mermaid", "\\\\mermaid")
    evil = [f"> ```{word}\n> {quoted}\n> ```\n" for word in spellings]
    evil += [f"- ~~~{word}\n  {drawing}" for word in spellings] + [f"```mermaid\n{drawing}```\n"]
    evil += [f"[^1]: ~~~mermaid\n    {drawing}\nsee [^1]\n"]
    ollama.reply, before = "\n\n".join(evil), ollama.reply
    send(page, "Draw")
    page.get_by_role("radio", name="Thumbs up").wait_for()
    ollama.reply = before
    page.wait_for_timeout(1500)
    shown = page.get_by_test_id("stChatMessage").nth(1)
    assert "flowchart TD" in shown.inner_text()
    assert shown.locator("svg[id^=mermaid], [data-testid*=Mermaid]").count() == 0
    assert strangers(page, address) == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_ends_with_the_app(tmp_path, tiny_base, page, end):
    with app_process(write_checkout(tmp_path, tiny_base)) as (address, server):
        page.goto(f"{address}/chat")
        page.get_by_test_id("stChatInputTextArea").wait_for()  # from now on it is being loaded

        def engines() -> list[int]:
            children = psutil.Process(server.pid).children()
            return [child.pid for child in children if "llama_server" in str(child.cmdline())]

        until(engines)
        (engine,) = engines()
        server.send_signal(end)
        server.wait(60)

        def ended() -> bool:
            try:
                return psutil.Process(engine).status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:  # it may go between any two questions
                return True

        until(ended)


def test_a_long_message_is_sent_whole(served, page):
    address, checkout, _ = served
    page.goto(f"{address}/chat")
    page.get_by_test_id("stChatInputTextArea").wait_for()
    text = "word " * 5_000 + "end"
    send(page, text)
    page.get_by_role("radio", name="Thumbs up").wait_for()
    assert of_this_chat(page, checkout)[0]["user_message"] == text


def test_a_question_outlives_an_app_that_is_killed(tmp_path, tiny_base, page):
    with FakeOllama(reply="Restart the router and wait.") as ollama:
        live_model(ollama)
        checkout = write_checkout(tmp_path, tiny_base, host=ollama.host)
        with app_process(checkout) as (address, server):
            page.goto(f"{address}/chat")
            page.get_by_test_id("stChatInputTextArea").wait_for()
            ollama.faults["POST /api/chat"] = "hang in stream"
            send(page, "A long and careful text")
            page.get_by_text("Restart").wait_for()
            server.kill()
            server.wait(60)
        ollama.faults.clear()
        with app_process(checkout) as (address, _):
            page.set_viewport_size({"width": 1000, "height": 800})
            page.goto(f"{address}/chat")
            page.get_by_role("button", name="No reply yet: A long and careful text").click()
            page.get_by_role("button", name="Try again").click()
            page.get_by_role("radio", name="Thumbs up").wait_for()
            (event,) = events(checkout)
            assert event["user_message"] == "A long and careful text"
            assert json.loads((checkout / ".whetstone/questions.json").read_text()) == {}


def test_an_app_that_is_ended_in_mid_reply_keeps_what_came(tmp_path, tiny_base, page):
    with FakeOllama(reply="Restart the router and wait.") as ollama:
        live_model(ollama)
        checkout = write_checkout(tmp_path, tiny_base, host=ollama.host)
        with app_process(checkout) as (address, server):
            page.goto(f"{address}/chat")
            page.get_by_test_id("stChatInputTextArea").wait_for()
            ollama.faults["POST /api/chat"] = "hang in stream"
            send(page, "What now?")
            page.get_by_text("Restart").wait_for()
            server.terminate()
            server.wait(60)
        (event,) = events(checkout)
    assert (event["assistant_response"], event["metadata"]["incomplete"]) == ("Restart ", "stopped")


@pytest.fixture(scope="module")
def reviewed(tiny_base, tmp_path_factory):
    """(address, checkout) of an app with a candidate to review."""
    checkout = add_repositories(add_candidate(write_checkout(tmp_path_factory.mktemp("reviewed"), tiny_base)))
    with running_app(checkout) as address:
        yield address, checkout


@pytest.mark.parametrize(("size", "keys"), [(PHONE, "12"), ({"width": 1280, "height": 900}, "34")])
def test_pairs_are_reviewed_with_keys_only(reviewed, page, size, keys):
    address, checkout = reviewed
    live = checkout / "inbox/votes.jsonl"
    before = len(read_votes(live))
    page.set_viewport_size(size)
    page.goto(f"{address}/review")
    for count, key in enumerate(keys, start=before + 1):
        page.get_by_role("button", name="1 is better").wait_for()
        settled(page)
        press_until(page, key, lambda count=count: len(read_votes(live)) == count)
    page.get_by_text(f"{before + len(keys)} of 6 prompts done").wait_for()
    assert too_wide(page) == []
    page.get_by_role("button", name="1 is better").wait_for()
    page.set_viewport_size(size | {"height": 480})  # as long replies do, it leaves no room below them
    settled(page)
    for name in ("1 is better", "2 is better", "As good", "Both bad", "Skip", "Undo"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 480, f"{name} has to be scrolled to"
    press_until(page, "u", lambda: len(read_votes(live)) == before + len(keys) - 1)
    text = page.get_by_test_id("stMain").inner_text()
    assert not any(word in text.lower() for word in ("candidate", "base", "win rate", "gguf"))
    assert strangers(page, address) == []
