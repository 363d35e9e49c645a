"""Prompting baselines: the same replies after another system prompt, or after similar training exchanges."""

import pytest

from fine_tuning.evaluation.suite.examples import Exchange, Exchanges
from fine_tuning.evaluation.suite.items import read_items
from fine_tuning.evaluation.suite.prompting_baselines import context, with_messages
from fine_tuning.schema.chat_format import load_tokenizer
from tests.evaluation_suite import conversation, evaluator_of, write_items

EXCHANGES = [
    Exchange("How do I restart the router?", "Pull the plug."),
    Exchange("What is the capital of France?", "Paris."),
    Exchange("Is the router new?", "Yes."),
    Exchange("你好吗？", "很好。"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def items_of(tiny_base, folder, conversations, max_length=200):
    return read_items(write_items(folder / "test", tiny_base, conversations, max_length), load_tokenizer(tiny_base))


def test_the_most_similar_questions_are_found_in_any_script():
    found = Exchanges(EXCHANGES)
    assert found.most_similar("restart my router please", 2) == [EXCHANGES[0], EXCHANGES[2]]
    assert found.most_similar("France?", 3) == [EXCHANGES[1]]
    assert found.most_similar("你好", 1) == [EXCHANGES[3]]
    assert found.most_similar("zebra", 3) == found.most_similar("", 3) == Exchanges([]).most_similar("router", 1) == []


def test_training_exchanges_are_those_worth_imitating(tiny_base, tmp_path):
    told = {
        "a": [
            *conversation("one", "good"),
            *conversation("two", "disliked", rating=-1),
            *conversation("three", "fine"),
        ],
        "b": [*conversation("four", "brok", incomplete=True), *conversation("five", "whole", model="m")],
    }
    write_items(tmp_path / "train", tiny_base, told)
    assert [exchange.answer for exchange in Exchanges.read(tmp_path / "train").exchanges] == [
        "good", "fine", "whole",
    ]  # fmt: skip


def test_another_system_prompt_changes_the_prompt_and_no_reply(tiny_base, tokenizer, tmp_path):
    told = {"x": conversation("a", "b"), "y": [{"role": "system", "content": "Own."}, *conversation("a", "c d")]}
    items = items_of(tiny_base, tmp_path, told)
    for item, other in zip(items, with_messages(items, context("Be short."), tokenizer, 400), strict=True):
        assert other.texts == item.texts
        assert [other.labels[p] for s, e in other.runs for p in range(s, e)] == [
            item.labels[p] for s, e in item.runs for p in range(s, e)
        ]
        assert "Be short." in tokenizer.decode(other.input_ids)
        assert "Own." not in tokenizer.decode(other.input_ids)


def test_examples_stand_before_the_conversation_and_are_no_references(tiny_base, tokenizer, tmp_path):
    items = items_of(tiny_base, tmp_path, {"x": conversation("Where is the router?", "Here.")})
    (item,) = with_messages(items, context(None, Exchanges(EXCHANGES), 2), tokenizer, 400)
    text = tokenizer.decode(item.input_ids)
    assert text.index("Pull the plug.") < text.index("Where is the router?")
    assert len(item.runs) == 1
    assert tokenizer.decode(item.input_ids[slice(*item.runs[0])]).startswith("Here.")
    prompt = tokenizer.decode(items[0].input_ids)
    assert prompt.startswith(text[: text.index("<|im_start|>user")])


def test_examples_that_do_not_fit_are_left_out_and_never_the_conversation(tiny_base, tokenizer, tmp_path):
    items = items_of(tiny_base, tmp_path, {"x": conversation("Where is the router?", "Here.")})
    length = len(items[0].input_ids)
    before = context(None, Exchanges(EXCHANGES), 2)
    few, none = (with_messages(items, before, tokenizer, length + room)[0] for room in (40, 0))
    assert length < len(few.input_ids) <= length + 40
    assert none.input_ids == items[0].input_ids


def test_baselines_are_scored_on_the_same_replies(tiny_base, tmp_path):
    told = {f"c{i}": conversation(f"Where is the {i}?", f"Here, {i}.") for i in range(5)}
    items = items_of(tiny_base, tmp_path, told)
    write_items(tmp_path / "train", tiny_base, {"t": conversation("Where is the fox?", "There.")})
    from fine_tuning.evaluation.suite.contenders import Contender

    base = Contender("base", tiny_base, tmp_path / "none.gguf")
    evaluator = evaluator_of(items, tiny_base, tmp_path / "memo")
    records = evaluator.score_prompting_baselines(base, tmp_path / "train")
    plain = {item.id: item for item in items}
    counts = {name: sum(line["contender"] == name for line in records) for name in ("base_prompted", "base_few_shot")}
    assert counts == {"base_prompted": 5, "base_few_shot": 3}
    assert all(line["tokens"] == sum(e - s for s, e in plain[line["id"]].runs) for line in records)
    assert len({round(line["nll"], 6) for line in records if line["id"] == records[-1]["id"]}) == 2
