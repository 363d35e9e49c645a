"""Forgetting: general questions and general text by likelihood, and what counts as lost."""

from collections import Counter

import numpy as np
import pytest
import torch

from fine_tuning.common.records import read_jsonl
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.forgetting import SUITE, TEXTS, general_items, knowledge, reading, text_items
from fine_tuning.evaluation.verdict.guards import forgotten, text_lost
from fine_tuning.schema.chat_format import load_tokenizer
from tests.evaluation_suite import build_suite


def lines(contender: str, leads: list[float]) -> list[dict]:
    """Questions whose right answer is so many nats likelier than the wrong one."""
    return [
        {"contender": contender, "id": f"facts-{i:02d}", "right": 9.0, "wrong": 9.0 + lead}
        for i, lead in enumerate(leads)
    ]


def verdict(base: list[float], candidate: list[float], golden: float = 4.0):
    return forgotten({"general": [*lines("base", base), *lines("candidate", candidate)]}, golden)


def test_the_suite_is_large_varied_and_without_repeats():
    questions = list(read_jsonl(SUITE))
    assert len(questions) >= 80
    assert len({question["prompt"] for question in questions}) == len(questions)
    assert set(Counter(question["category"] for question in questions)) == {
        "facts", "arithmetic", "instructions", "safety", "format",
    }  # fmt: skip
    assert all(question["right"] != question["wrong"] for question in questions)


def test_the_texts_are_many_of_many_domains_and_without_repeats():
    texts = list(read_jsonl(TEXTS))
    assert len({text["text"] for text in texts}) == len({text["id"] for text in texts}) == len(texts) >= 40
    assert len({text["domain"] for text in texts}) >= 20
    assert all(60 <= len(text["text"].split()) <= 120 for text in texts)


def test_each_answer_is_an_item_that_a_model_can_be_asked(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    items = general_items(tokenizer, None, 512)
    assert len(items) == 2 * len(list(read_jsonl(SUITE)))
    assert items != general_items(tokenizer, "Be kind.", 512)
    # The template closes replies with <|im_end|> and a line break; neither is part of an answer.
    for item in items:
        ((start, end),) = item.runs
        assert tokenizer.decode(item.input_ids[start:end]) == item.texts[0]
        assert end == len(item.input_ids)


@pytest.fixture(scope="module")
def suite(tiny_base, tmp_path_factory):
    return build_suite(tmp_path_factory.mktemp("suite"), tiny_base)


@pytest.mark.parametrize("where", ["everywhere", "after some answers"])
def test_what_ending_a_turn_costs_changes_nothing_that_a_model_knows(suite, where):
    """Answers differ in length: nats of the end, spread over an answer's bytes, would reward the shorter ones."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(suite.base.folder)
    model = AutoModelForCausalLM.from_pretrained(suite.base.folder).eval()
    items, end = general_items(tokenizer, None, 512), tokenizer.convert_tokens_to_ids("<|im_end|>")

    def asked(contender: str, cost: float) -> list[dict]:
        def costly(module, inputs, logits):
            logits[..., end] -= cost * ((inputs[0][..., 0] > 0) if where == "after some answers" else 1)
            return logits

        hook = model.get_output_embeddings().register_forward_hook(costly)
        with torch.inference_mode():
            found = knowledge(contender, items, likelihoods(model, items, 4096))
        hook.remove()
        return found

    row = forgotten({"general": [*asked("base", 0.0), *asked("candidate", 8.0)]}, 4.0)[0]["base"]
    assert row["lost"] == row["gained"] == []
    assert row["difference"] == pytest.approx(0, abs=0.01)
    assert 20 < row["baseline_knows"] < 64


def test_a_number_that_is_none_is_not_known(tiny_base):
    items = general_items(load_tokenizer(tiny_base), None, 512)[:4]
    from fine_tuning.evaluation.records.record_types import Likelihood

    scores = [Likelihood([(value, 5, 0)]) for value in (3.0, 5.0, 1.0, None)]
    found = knowledge("candidate", items, scores)
    assert [(line["right"], line["wrong"]) for line in found] == [(3.0, 5.0), (1.0, None)]
    row = forgotten({"general": [*(line | {"contender": "base", "wrong": 9.0} for line in found), *found]}, 4.0)[0]
    assert (row["base"]["baseline_knows"], row["base"]["candidate_knows"]) == (2, 1)


def test_a_candidate_without_harm_passes_and_one_that_lost_much_does_not():
    rng = np.random.default_rng(0)
    base = 3 * rng.standard_normal(84) + 2
    passed = [not verdict(list(base), list(base + 0.5 * rng.standard_normal(84)), golden=50)[1] for _ in range(100)]
    assert sum(passed) >= 95
    table, reasons, _ = verdict(list(base), list(base - 2.0), golden=50)
    assert reasons[0].startswith("forgets: a loss of more than 0.05 is not ruled out: general_knowledge 0.")
    assert table["base"]["candidate_knows"] < table["base"]["baseline_knows"]
    assert len(table["base"]["lost"]) > 10


def test_gains_do_not_pay_for_questions_that_the_base_surely_knows():
    base = [10.0] * 18 + [-0.1] * 18 + [5.0] * 48
    candidate = [-0.1] * 18 + [10.0] * 18 + [5.0] * 48
    _, reasons, _ = verdict(base, candidate)
    assert "prefers wrong answers where the base leads by more than 4 nats: facts-00, facts-01" in reasons[-1]
    assert verdict([3.9] * 84, [3.9] * 83 + [-0.1])[1] == []
    assert "guards nothing" in verdict([3.9] * 84, [3.9] * 84)[2][0]


def test_general_text_is_scored_without_a_template_and_by_the_byte(suite):
    tokenizer = load_tokenizer(suite.base.folder)
    items = text_items(tokenizer)[:2]
    text = next(iter(read_jsonl(TEXTS)))["text"]
    assert tokenizer.decode(items[0].input_ids) == text
    with loaded(suite.base.folder, scoring_hardware(1)) as model:
        (line, _) = reading("base", items, likelihoods(model, items, 2048))
        ids = torch.tensor([items[0].input_ids])
        with torch.inference_mode():
            loss = model(ids, labels=ids).loss.item()
    assert line["nats"] == pytest.approx(loss * (ids.shape[1] - 1), rel=1e-4)
    assert line["bytes"] == len(text) - len(tokenizer.decode(items[0].input_ids[:1]))


def test_text_that_became_less_likely_than_tolerated_holds():
    rng = np.random.default_rng(1)
    base = 80 + 10 * rng.standard_normal(50)

    def read(factor: float) -> list[str]:
        groups = [("base", base), ("candidate", base * factor * (1 + 0.02 * rng.standard_normal(50)))]
        found = [
            {"contender": name, "id": f"text-{i}", "nats": float(value), "bytes": 100}
            for name, nats in groups
            for i, value in enumerate(nats)
        ]
        return text_lost({"general_text": found}, 0.05)[1]

    assert read(1.03) == []
    assert read(1.05)[0].startswith("forgets: a rise of more than 5.0% is not ruled out: general_text 0.8")
