"""The whole round in a browser: chat, judge, seal, train, promote, and chat with what came of it."""

import json

import pytest

from tests.browser import events, needs_chromium, running_app, send, settled, strangers, too_wide, until
from tests.project import Project, conversations, new_project

pytestmark = [needs_chromium, pytest.mark.end_to_end]


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_base) -> Project:
    """A project with a base and imported conversations; its pipeline has gone no further."""
    project = new_project(tmp_path_factory.mktemp("journey") / "project", tiny_base)
    project.set_params(app={"max_tokens": 24}, deploy={"host": "http://127.0.0.1:9"}, clean={"processes": 1})
    project.import_conversations(conversations(), "first")
    project.run("dvc", "repro", "base")
    project.commit("Conversations")
    return project


def ask(page, text: str) -> None:
    """Send a message and wait for the reply. An untrained model now and then says nothing: it is asked again."""
    replies = page.get_by_role("radio", name="Thumbs up")
    before = replies.count()
    send(page, text)
    again = page.get_by_role("button", name="Try again")
    while True:
        replies.nth(before).or_(again).first.wait_for()
        if replies.count() > before:
            return
        again.click()
        again.wait_for(state="detached")


def test_from_a_chat_to_a_chat_with_the_model_that_learned_from_it(project, page):
    checkout = project.folder
    with running_app(checkout, checkout) as address:

        def visit(name: str) -> None:
            page.goto(f"{address}/{name}")
            page.get_by_test_id("stMain").wait_for()
            settled(page)

        visit("chat")
        ask(page, "How do I restart my lamp?")
        page.get_by_role("radio", name="Thumbs up").click()
        page.get_by_role("button", name="Edit").click()
        page.get_by_role("textbox", name="Reply").fill("Hold the power button of the lamp for ten seconds.")
        page.get_by_role("button", name="Save").click()
        page.get_by_text("edited, the edit is trained on").wait_for()
        assert [event["event"] for event in events(checkout)] == ["exchange", "feedback", "edit"]
        assert too_wide(page) == []

        visit("data")
        page.get_by_text("1 to seal, 40 sealed.").wait_for()
        visit("models")
        page.get_by_text("No comparison yet").wait_for()
        visit("")
        page.get_by_text("41 new or changed since the last training.").wait_for()
        page.get_by_role("button", name="Train on what's new").click()
        page.get_by_text("to the verdict").first.wait_for()
        page.get_by_test_id("stMain").get_by_test_id("stVegaLiteChart").wait_for(timeout=900_000)
        page.get_by_test_id("stToast").get_by_text("Train: Verdict:").wait_for(timeout=900_000)
        page.get_by_test_id("stAlert").get_by_text("Train: Verdict:").wait_for()
        assert (checkout / "metrics/comparison.json").is_file()
        assert project.run("git", "log", "-1", "--format=%s").startswith("Round: ")
        for name in ("", "data", "runs", "models", "compare"):
            visit(name)
            assert too_wide(page) == [], name

        visit("models")
        verdict = json.loads((checkout / "metrics/comparison.json").read_bytes())["verdict"]
        page.get_by_text(verdict, exact=True).wait_for()
        page.get_by_text("Show the report").click()
        page.frame_locator("iframe").get_by_role("heading", name="What decides").wait_for()
        if verdict == "PROMOTE":
            page.get_by_role("button", name="Promote", exact=True).click()
        else:
            page.get_by_role("button", name="Promote anyway…").click()
            page.get_by_label("Why").fill("it is a test")
            page.get_by_label("Why").press("Enter")
        page.get_by_role("dialog").get_by_role("button", name="Promote").click()
        page.get_by_text("it is the champion already").wait_for()
        page.get_by_test_id("stGraphVizChart").locator("svg").wait_for()
        assert json.loads((checkout / "models/champion.json").read_bytes())["version"] == 1

        visit("chat")
        answering = page.get_by_role("combobox", name="Model that answers")
        until(lambda: answering.input_value().startswith("Champion · version 1 · whetstone:1 ·"))
        ask(page, "And the other lamp?")
        until(lambda: events(checkout))
        (event,) = events(checkout)
        assert (event["metadata"]["model"], event["metadata"]["version"]) == ("whetstone:1", 1)
        page.get_by_text("whetstone:1 · version 1").wait_for()
        assert strangers(page, address) == []
