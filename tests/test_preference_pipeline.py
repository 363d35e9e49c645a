"""From the log to the verdict: edits, preferences and thumbs become pairs, are trained on, judged by, and forgotten."""

import json
from pathlib import Path

import pytest

from fine_tuning.schema.preferences import read_preferences
from tests.project import Project, new_project

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
    project.run("python", "-c", CHAT)
    project.run("python", "-m", "fine_tuning", "seal")
    project.run("dvc", "repro")
    return project


def read(project: Project, name: str):
    return json.loads((project.folder / name).read_bytes())


def test_what_people_said_is_prepared_trained_and_in_the_verdict(project):
    counts = read(project, "metrics/prepare.json")["preferences"]
    assert counts["pairs_by_kind"].keys() == {"edit", "preferred"}
    assert counts["pairs"]["train"] > 40 and counts["pairs"]["test"] > 10
    assert counts["thumbs"]["train"]["liked"] > 10 and counts["thumbs"]["train"]["disliked"] > 10
    measured = read(project, "metrics/train.json")
    assert {"pairs_accuracy", "pairs_margin", "thumbs_accuracy", "validation_loss"} <= measured.keys()
    found = read(project, "metrics/evaluation.json")
    # The log names no model, so no pair decides; all are shown.
    assert found["candidate"]["preference_accuracy_apart"]["n"] == counts["pairs"]["test"]
    assert "preference_accuracy_apart" in read(project, "metrics/comparison.json")["differences"]["base"]
    assert "up to date" in project.run("dvc", "repro")


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
