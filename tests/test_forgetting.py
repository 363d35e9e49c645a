"""Forgetting: general questions ranked by likelihood, and what counts as lost."""

from collections import Counter

from fine_tuning.data_preparation.tokenizer import load_tokenizer
from fine_tuning.evaluation.forgetting import SUITE, forgotten, general_items, knowledge, known
from fine_tuning.evaluation.scoring import Likelihood
from fine_tuning.records import read_jsonl


def lines(contender: str, known: int, of: int = 84) -> list[dict]:
    return [{"contender": contender, "question": f"facts-{i:02d}", "known": i <= known} for i in range(1, of + 1)]


def test_the_suite_is_large_varied_and_without_repeats():
    questions = list(read_jsonl(SUITE))
    assert len(questions) >= 80
    assert len({question["prompt"] for question in questions}) == len(questions)
    assert set(Counter(question["category"] for question in questions)) == {
        "facts", "arithmetic", "instructions", "safety", "format",
    }  # fmt: skip
    assert all(question["right"] != question["wrong"] for question in questions)


def test_each_answer_is_an_item_that_a_model_can_be_asked(tiny_base):
    items = general_items(load_tokenizer(tiny_base), None, 512)
    assert len(items) == 2 * len(list(read_jsonl(SUITE)))
    assert all(len(item.runs) == 1 for item in items)
    assert items != general_items(load_tokenizer(tiny_base), "Be kind.", 512)


def test_the_likelier_answer_a_byte_is_what_a_model_knows(tiny_base):
    items = general_items(load_tokenizer(tiny_base), None, 512)[:4]
    # Right: 1 nat a byte; wrong: 2 nats a byte for the first question, no number for the second.
    nats = [len(item.texts[0].encode()) * (1 if item.id.endswith("right") else 2) for item in items]
    scores = [Likelihood([(float(value), 5, 0)]) for value in nats[:3]] + [Likelihood([(float("nan"), 5, 0)])]
    assert known(items, scores) == {items[0].cluster: True, items[2].cluster: False}
    assert [line["known"] for line in knowledge("base", items, scores)] == [True, False]


def test_a_small_loss_is_chance_and_a_large_one_is_forgetting():
    assert forgotten([*lines("base", 60), *lines("candidate", 57)], goldens=[])[1] == []
    table, reasons = forgotten([*lines("base", 60), *lines("candidate", 40)], goldens=[])
    assert "it lost 20 that the base knows and gained 0" in reasons[0]
    assert table["base"]["candidate_knows"] == 40


def test_a_golden_question_may_not_be_lost_at_all():
    lost = [line | {"known": False} if line["question"] == "facts-01" else line for line in lines("candidate", 60)]
    _, reasons = forgotten([*lines("base", 60), *lost], goldens=["facts-01"])
    assert reasons == ["lost what must not be lost and the base knows: facts-01"]
    assert forgotten([*lines("base", 0), *lines("candidate", 0)], goldens=["facts-01"])[1] == []
