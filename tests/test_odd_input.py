"""Evaluation of what is odd: endless items, a silent model, empty references, one conversation, other scripts."""

import json
import math
import shutil
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from fine_tuning.common.errors import UserError
from fine_tuning.common.results import Memo
from fine_tuning.evaluation.evaluator import Evaluator
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.records.measurements import summarise
from fine_tuning.evaluation.report.report import Findings, write_report
from fine_tuning.evaluation.suite.contenders import Contender
from fine_tuning.evaluation.suite.items import read_items
from fine_tuning.evaluation.verdict.comparison import CompareSettings, compare
from fine_tuning.evaluation.verdict.slices import slices
from fine_tuning.runtime.gguf_writer import write_gguf
from fine_tuning.schema.chat_format import ChatSettings, encode_conversation, load_tokenizer
from fine_tuning.schema.prepared import encoded_row
from tests.evaluation_suite import MODULES, SETTINGS, conversation, evaluator_of, write_items, write_rows

COMPARE = CompareSettings(
    primary="perplexity",
    minimum_effect=0.01,
    minimum_conversations=2,
    minimum_against_champion=2,
    secondary={"token_accuracy": 0.02, "rougeL": 0.03},
    quantisation_tolerance=0.05,
    golden_lead=4.0,
    text_tolerance=0.05,
    prompt_help=0.8,
)


@pytest.fixture(scope="module")
def metrics():
    return [load_metric(name, MODULES) for name in SETTINGS.metrics]


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory):
    gguf = tmp_path_factory.mktemp("odd") / "base.gguf"
    write_gguf(tiny_base, gguf, "F16")
    return Contender("base", tiny_base, gguf)


@pytest.fixture(scope="module")
def silent(base, tmp_path_factory):
    """A candidate that only ever says its end token: whatever it read, its last hidden state is the same."""
    folder = tmp_path_factory.mktemp("silent")
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    tokenizer = load_tokenizer(base.folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = torch.zeros_like(model.model.embed_tokens.weight)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
    head[end] = 0.5
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    write_gguf(folder / "merged", folder / "model.gguf", "F16")
    return Contender("candidate", folder / "merged", folder / "model.gguf")


def judged(contenders, items, memo, metrics, folder):
    """The verdict on the last contender; all the way to a report."""
    evaluator = evaluator_of(items, contenders[0].folder, memo)
    records, answers = [], {}
    for contender in contenders:
        lines, answers[contender.name] = evaluator.evaluate(contender)
        records += lines
    records += evaluator.score_quantised(contenders[-1])
    found = compare(records, metrics, COMPARE, SETTINGS.interval)
    names = dict.fromkeys(line["contender"] for line in records)
    table = {
        name: summarise([line for line in records if line["contender"] == name], metrics, SETTINGS.interval)
        for name in names
    }
    suite = {"sha256": evaluator.suite, "conversations": len(items), "clusters": len(items)}
    where = slices(records, metrics, SETTINGS.interval)
    write_report(folder / "report.html", Findings(found, table | {"suite": suite}, records, [], where))
    assert json.dumps([found, records, table], allow_nan=False)
    return found, table


def items_of(base, path, told, max_length=200):
    return read_items(write_items(path, base.folder, told, max_length), load_tokenizer(base.folder))


def test_a_model_that_only_ends_is_silent_in_numbers_and_is_held(base, silent, metrics, tmp_path):
    items = items_of(base, tmp_path / "t", {f"c{i}": conversation(f"Where is {i}?", "There.") for i in range(5)})
    found, table = judged([base, silent], items, tmp_path / "memo", metrics, tmp_path)
    row = table["candidate"]
    assert row["empty"]["value"] == row["self_ended"]["value"] == 1
    assert row["bleu"]["value"] == row["rougeL"]["value"] == row["exact_match"]["value"] == 0
    assert row["distinct_1"]["value"] is None
    assert row["length_ratio"]["value"] == 0
    assert found["verdict"] == "HOLD"


def test_one_conversation_is_inconclusive_and_still_a_report(base, silent, metrics, tmp_path):
    items = items_of(base, tmp_path / "t", {"only": conversation("Where?", "There.")})
    found, _ = judged([base, silent], items, tmp_path / "memo", metrics, tmp_path)
    assert found["verdict"] == "INCONCLUSIVE"
    assert found["reasons"][0].startswith("only 1 different conversation in the test split, 2 are needed")


def test_ten_thousand_tokens_are_scored_and_answered_like_any(base, metrics, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(base.folder, wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16_384}))
    write_gguf(wide, tmp_path / "wide.gguf", "F16")
    items, evaluator = endless(base, tmp_path)
    records, _ = evaluator.evaluate(Contender("base", wide, tmp_path / "wide.gguf"))
    assert max(len(item.input_ids) for item in items) > 10_000
    assert all(math.isfinite(record["nll"]) for record in records)
    assert all("predictions" in record for record in records)
    assert summarise(records, metrics, SETTINGS.interval)["perplexity"]["value"] > 1


def test_more_tokens_than_the_model_was_made_for_are_one_clear_line(base, tmp_path):
    with pytest.raises(UserError, match=r"exceeds the 1024 that base\.gguf was made for: lower chat\.max_length"):
        endless(base, tmp_path)[1].evaluate(base)


def endless(base, folder):
    """An item of more than ten thousand tokens beside a short one, and their evaluator."""
    long = "The quick brown fox jumps over the lazy dog. " * 900
    told = {"long": conversation(long, long[: len(long) // 8]), "short": conversation("a", "b")}
    items = items_of(base, folder / "t", told, max_length=12_000)
    settings = SETTINGS.model_copy(update={"generation": SETTINGS.generation.model_copy(update={"max_tokens": 4})})
    chat = ChatSettings(system_prompt=None, max_length=12_000)
    return items, Evaluator(items, load_tokenizer(base.folder), chat, settings, Memo(folder / "memo", "evaluate"))


def test_empty_references_cost_their_end_and_leave_what_has_no_meaning_open(base, silent, metrics, tmp_path):
    tokenizer = load_tokenizer(base.folder)
    rows = []
    for index in range(3):
        messages = conversation(f"Say nothing, {index}.", "")
        encoded = encode_conversation(tokenizer, messages, None, 200)
        rows.append(encoded_row(encoded, id=f"c{index}", source="test", cluster=f"c{index}"))
    write_rows(tmp_path / "t", rows)
    items = read_items(tmp_path / "t", tokenizer)
    assert [item.texts for item in items] == [[""]] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, table = judged([base, silent], items, tmp_path / "memo", metrics, tmp_path)
    row = table["candidate"]
    assert row["perplexity"]["value"] > 0
    assert row["nll_per_byte"]["value"] is None
    assert row["bleu"]["value"] is None
    assert row["exact_match"]["value"] == 1


def test_other_scripts_have_words_loops_and_overlaps(metrics):
    by_name = {type(metric).__name__: metric for metric in metrics}
    replies, rouge = by_name["Replies"], by_name["Rouge"]
    texts = ["你好你好你好你好", "Привет, мир!", "สวัสดีครับ", "नमस्ते दुनिया"]
    found = replies.compute(predictions=texts, references=texts, finished=[True] * 4)
    assert found["loops"] == 0.25
    assert 0 < found["distinct_1"] < 1
    assert rouge.compute(predictions=["你好世界"], references=["世界和平"])["rouge1"] == pytest.approx(0.5)
    assert all(
        math.isfinite(value)
        for name in ("Bleu", "Chrf", "Rouge")
        for value in by_name[name].compute(predictions=texts, references=texts).values()
    )
