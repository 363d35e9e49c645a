"""Every page in a browser, wide and narrow, light and dark: what people do there, and the rules of axe-core."""

from importlib.resources import files

import pytest

from tests.browser import PHONE, act_until, events, needs_chromium, running_app, send, settled, strangers, too_wide
from tests.project import Project

pytestmark = [needs_chromium, pytest.mark.end_to_end]

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
DESK = {"width": 1200, "height": 900}
# Streamlit's own markup, which no page can change: a toast without a name, a drop zone with two roles.
STREAMLITS = "[['[data-testid=stToast]'], ['[data-testid=stFileUploaderDropzone]']]"
EXPORT = b'{"messages": [{"role": "user", "content": "Is it a plane?"}, {"role": "assistant", "content": "A bird."}]}\n'


@pytest.fixture(scope="module")
def app(tmp_path_factory, trained_project):
    """(address, checkout) of an app beside a pipeline that has run."""
    project: Project = trained_project.copy(tmp_path_factory.mktemp("accessible") / "project")
    project.set_params(app={"max_tokens": 24}, deploy={"host": "http://127.0.0.1:9"})
    project.commit("No Ollama")
    with running_app(project.folder, project.folder) as address:
        yield address, project.folder


def broken_rules(page) -> list[str]:
    """`rule: element` of everything on the page that breaks a rule of axe-core."""
    settled(page)
    page.mouse.move(0, 0)  # help of what lies under the mouse is in an overlay of Streamlit's, outside every region
    page.get_by_role("tooltip").first.wait_for(state="hidden")
    page.wait_for_timeout(500)  # colours fade
    page.evaluate(AXE)
    found = page.evaluate(f"axe.run({{exclude: {STREAMLITS}}}, {{resultTypes: ['violations']}})")
    return [f"{rule['id']}: {node['html'][:160]}" for rule in found["violations"] for node in rule["nodes"]]


@pytest.fixture(params=[(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")], ids=str)
def visitor(request, browser, app):
    """(page, visit): `visit(name)` opens a page of the app."""
    viewport, scheme = request.param
    page = browser.new_page(viewport=viewport, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.asked = []
    page.on("request", lambda asked: page.asked.append(asked.url))

    def visit(name: str) -> None:
        page.goto(f"{app[0]}/{name}")
        page.get_by_test_id("stMainBlockContainer").wait_for()
        settled(page)
        page.wait_for_timeout(1000)  # charts are drawn after the page

    yield page, visit
    assert strangers(page, app[0]) == []
    page.close()


def test_what_people_do_on_each_page_breaks_no_rule_of_accessibility(app, visitor):
    (_, checkout), (page, visit) = app, visitor
    found: dict[str, list[str]] = {}

    def check(name: str) -> None:
        found[name] = broken_rules(page) + [f"too wide: {element}" for element in too_wide(page)]

    visit("")
    page.get_by_text("new or changed since the last training").wait_for()
    check("home")
    page.get_by_role("button", name="Back to the last good state").click()
    page.get_by_role("dialog").get_by_role("button", name="Back").wait_for()
    check("going back")
    page.keyboard.press("Escape")

    visit("chat")
    send(page, "How do I restart my lamp?")
    page.get_by_role("radio", name="Thumbs up").or_(page.get_by_role("button", name="Try again")).first.wait_for()
    check("chat")
    if page.get_by_role("radio", name="Thumbs up").count():  # an untrained model now and then says nothing
        chat, before = page.url, len(events(checkout))
        page.get_by_role("button", name="Rewrite").first.click()
        page.get_by_label("Ask this instead").fill("How do I restart my other lamp?")
        check("editing a message")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_url(lambda url: url != chat)
        page.get_by_test_id("stChatMessage").get_by_text("my other lamp").wait_for()
        page.goto(chat)
        page.get_by_test_id("stChatMessage").get_by_text("How do I restart my lamp?").wait_for()
        assert len(events(checkout)) >= before

    visit("data")
    page.get_by_role("textbox", name="Search").fill("printer")
    page.get_by_role("textbox", name="Search").press("Enter")
    page.get_by_text("5 conversations; click the left edge").wait_for()
    settled(page)
    correct = page.get_by_role("button", name="Correct").first
    act_until(lambda: correct.click(timeout=5000), page.get_by_role("dialog").get_by_role("button", name="Save"))
    check("correcting a reply")
    page.keyboard.press("Escape")
    page.get_by_text("Import a file").click()
    page.locator("input[type=file]").set_input_files({"name": "a.jsonl", "mimeType": "text/plain", "buffer": EXPORT})
    page.get_by_role("button", name="Import", exact=True).click()
    page.get_by_test_id("stAlert").get_by_text("Import:").wait_for()
    check("data")

    visit("runs")
    page.get_by_text("Train with other parameters").click()
    page.get_by_role("spinbutton", name="train.learning_rate").wait_for()
    check("runs")
    visit("models")
    page.get_by_text("Candidate", exact=True).wait_for()
    check("models")
    visit("compare")
    check("compare")
    assert {name: broken for name, broken in found.items() if broken} == {}
