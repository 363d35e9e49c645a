"""From the log to the verdict: edits, preferences and thumbs become pairs, are trained on, judged by, and forgotten."""

import csv
import json
from pathlib import Path

import pytest

from fine_tuning.integration.embedded_engine import shared_engines
from fine_tuning.schema.preferences import read_preferences
from tests.app_checkout import NOBODY
from tests.project import Project, new_project
from tests.test_app import logged, open_chat, say, settle
from tests.test_app_pages import open_page

pytestmark = pytest.mark.end_to_end

CHAT = """
from fine_tuning.data_collection.conversation_logger import ConversationLogger
log = ConversationLogger("inbox/conversations.jsonl", durable=False)
for n in range(60):
    session = {"session_id": f"s{n}", "source": "chat"}
    worse = log.log_conversation(f"What does lamp number {n} cost?", f"As a model I cannot know lamp {n}.", session)
    better = log.log_conversation(f"What does lamp number {n} cost?", f"{n + 10} euros.", session | {"replaces": worse})
    log.log_preference(better, [worse], "ann", conversation_id=session["session_id"])
    edited = log.log_conversation("Thanks a lot.", "OK", session)
    log.log_edit(edited, f"You are welcome, enjoy lamp {n}!", conversation_id=session["session_id"])
    single = log.log_conversation(f"Is lamp {n} bright?", f"Lamp {n} is.", {"session_id": f"t{n}", "source": "chat"})
    log.log_feedback(single, 1 if n % 2 else -1, conversation_id=f"t{n}")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_base) -> Project:
    project = new_project(tmp_path_factory.mktemp("preferences") / "project", tiny_base)
    project.set_params(train={"max_steps": 30}, prepare={"test_fraction": 0.3})
    app = {"max_tokens": 16, "context": 512, "slots": 2}
    project.set_params(app=app, deploy={"host": NOBODY})
    project.run("dvc", "repro", "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OLLAMA_HOST", raising=False)
        patch.chdir(project.folder)
        for number in range(4):
            judge_in_the_app(project.folder, number)
        shared_engines.close()
    project.run("python", "-c", CHAT)
    project.run("python", "-m", "fine_tuning", "seal")
    project.run("dvc", "repro")
    return project


def judge_in_the_app(checkout: Path, number: int) -> None:
    """Chats on the page: a reply asked for again and preferred, one edited, one with a thumb; then a blind vote."""
    at = say(open_chat(), f"Where is kite number {number}?")
    first = logged(checkout)[-1]["id"]
    settle(at.button(key=f"again-{first}").click().run())
    at.button(key=f"prefer-{first}").click().run()
    at = say(open_chat(), f"Who built kite number {number}?")
    edited = logged(checkout)[-1]["id"]
    at.button(key=f"edit-{edited}").click().run()
    at.text_area(key=f"edited-{edited}").set_value(f"Ada built kite number {number}.")
    at.button(key="save-edit").click().run()
    at = say(open_chat(), f"Can kite number {number} fly?")
    at.feedback(key=f"thumbs-{logged(checkout)[-1]['id']}").set_value(number % 2).run()
    candidate = checkout / "models/package/model.gguf"
    candidate.parent.mkdir(exist_ok=True)
    candidate.write_bytes((checkout / "models/base/base-Q8_0.gguf").read_bytes())
    at = open_page("compare")
    at.text_area(key="prompt").set_value(f"What is kite number {number} made of?")
    at.button(key="ask-both").click().run()
    for reply in at.session_state["duel"].replies:
        reply._thread.join(30)
    at.run()
    at.button(key="vote-second").click().run()
    assert not at.exception


def read(project: Project, name: str):
    return json.loads((project.folder / name).read_bytes())


def test_what_people_said_is_prepared_trained_and_in_the_verdict(project):
    counts = read(project, "metrics/prepare.json")["preferences"]
    assert counts["pairs_by_kind"].keys() == {"edit", "preferred", "vote"}
    assert counts["pairs"]["train"] > 40 and counts["pairs"]["test"] > 10
    assert counts["thumbs"]["train"]["liked"] > 10 and counts["thumbs"]["train"]["disliked"] > 10
    measured = read(project, "metrics/train.json")
    assert {"pairs_accuracy", "pairs_margin", "thumbs_accuracy", "validation_loss"} <= measured.keys()
    with open(project.folder / "metrics/plots/preferences.csv") as file:
        curve = list(csv.DictReader(file))
    assert len(curve) > 1 and all(value for line in curve for value in line.values())
    found = read(project, "metrics/evaluation.json")
    # Where the log names no model, no pair decides; all are shown.
    measured = found["candidate"]
    shown = [measured.get(f"preference_accuracy{end}", {"n": 0})["n"] for end in ("", "_apart")]
    assert sum(shown) == counts["pairs"]["test"] and shown[1] > 10
    assert "preference_accuracy_apart" in read(project, "metrics/comparison.json")["differences"]["base"]
    assert "up to date" in project.run("dvc", "repro")


def test_what_was_judged_in_the_app_is_among_it(project):
    said = {kind: [] for kind in ("preferences", "thumbs")}
    for kind, records in said.items():
        for split in ("train", "validation", "test"):
            records += read_preferences(project.folder / f"data/{kind}/{split}.parquet")
    about_kites = [record for record in said["preferences"] if "kite" in record["messages"][-1]["content"]]
    assert {record["kind"] for record in about_kites} == {"preferred", "edit", "vote"}
    assert any("kite" in record["messages"][-1]["content"] for record in said["thumbs"])
    report = (project.folder / "metrics/report.html").read_text()
    assert "preference_accuracy" in report


def test_a_forgotten_conversation_leaves_no_pair_and_no_reference(project, tmp_path):
    copy = project.copy(tmp_path / "copy")
    kept = read_preferences(copy.folder / "data/preferences/train.parquet")
    (gone,) = kept[0]["conversations"]
    assert list((copy.folder / ".whetstone/references").glob("*.json"))
    copy.commit("Trained")
    copy.run("python", "-m", "fine_tuning", "forget", gone, "--yes")
    for split in ("train", "validation", "test"):
        for folder in ("preferences", "thumbs"):
            records = read_preferences(copy.folder / f"data/{folder}/{split}.parquet")
            assert all(gone not in record["conversations"] for record in records)
    texts = [kept[0]["chosen"].encode(), kept[0]["id"].encode()]
    for file in Path(copy.folder, ".whetstone").rglob("*"):
        assert not file.is_file() or not any(text in file.read_bytes() for text in texts), file
