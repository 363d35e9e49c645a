"""Memory: what a model says word for word, and canaries beside secrets that it was never shown."""

import json

import numpy as np
import pytest

from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.memorisation import memory_items, recalled
from fine_tuning.evaluation.verdict.memorisation import exposures, kept, rank_sum
from fine_tuning.schema.canaries import controls, planted
from fine_tuning.schema.chat_format import load_tokenizer
from tests.evaluation_suite import conversation, write_items, write_rows

LONG = "The quick brown fox jumps over the lazy dog, and then it rests beside the router in the box number {}."


def train_on(folder, base, items, steps):
    """A copy of the base trained on the items' own labels."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for item in items:
            labels = [-100 if label is None else label for label in item.labels]
            model(torch.tensor([item.input_ids]), labels=torch.tensor([labels])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def lines_of(name, folder, items):
    with loaded(folder, scoring_hardware(1)) as model:
        return recalled(name, items, likelihoods(model, items, 512))


def test_canaries_are_the_same_every_time_and_no_control_is_one(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    one, two = (planted(8, tokenizer, None, 200) for _ in range(2))
    assert [example.stored() for example in one] == [example.stored() for example in two]
    secrets = [json.dumps(example.messages) for example in one]
    assert len(set(secrets)) == 8
    assert not set(secrets) & {json.dumps(messages) for messages in controls(128)}
    assert planted(0, tokenizer, None, 200) == []


def test_a_planted_canary_that_was_learned_is_a_leak_and_its_base_has_none(tiny_base, tmp_path):
    tokenizer = load_tokenizer(tiny_base)
    write_rows(tmp_path / "train", planted(6, tokenizer, None, 200))
    items = memory_items(tmp_path / "train", 4, tokenizer, None, 200)
    assert [sum(item.source == kind for item in items) for kind in ("canary", "control", "training")] == [6, 128, 0]
    learned = train_on(tmp_path / "m", tiny_base, items[:6], 12)
    table, reasons = kept([*lines_of("base", tiny_base, items), *lines_of("candidate", learned, items)])
    assert table["base"]["canaries"]["p_value"] > 0.01
    assert table["candidate"]["canaries"]["p_value"] < 1e-3
    assert table["candidate"]["canaries"]["mean_exposure"] > 4
    assert "canaries said verbatim, mean exposure" in reasons[0]
    # The other way round: what the base remembers is not the candidate's doing.
    assert kept([*lines_of("base", learned, items), *lines_of("candidate", tiny_base, items)])[1] == []


def test_exposure_is_that_of_the_paper_and_chance_is_a_bit_and_a_half():
    assert exposures([0.5], [1.0, 2.0, 3.0]) == [2.0]  # the likeliest of four
    assert exposures([9.0], [1.0, 2.0, 3.0]) == [0.0]
    drawn = np.random.default_rng(0).standard_normal((200, 144))
    assert np.mean([exposures(row[:16], row[16:]) for row in drawn]) == pytest.approx(1.44, abs=0.08)


def test_unlearned_canaries_are_called_a_leak_no_more_often_than_stated():
    drawn = np.random.default_rng(1).standard_normal((1000, 144))
    assert np.mean([rank_sum(row[:16], row[16:]) < 0.01 for row in drawn]) <= 0.01 + 2 * 0.0032
    assert np.mean([rank_sum(row[:16] - 1.0, row[16:]) < 0.01 for row in drawn[:200]]) > 0.85


def test_what_teacher_forcing_calls_word_for_word_is_what_greedy_decoding_says(tiny_base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(tiny_base)
    told = {f"c{i}": conversation(f"Where is the fox number {i}?", LONG.format(i)) for i in range(3)}
    write_items(tmp_path / "train", tiny_base, told)
    items = memory_items(tmp_path / "train", 9, tokenizer, None, 200)
    assert len(items) == 3
    learned = train_on(tmp_path / "m", tiny_base, items[:2], 25)
    lines = lines_of("candidate", learned, items)
    model = AutoModelForCausalLM.from_pretrained(learned)
    for line, item in zip(lines, items, strict=True):
        (start, end), prompt = item.runs[0], torch.tensor([item.input_ids[: item.runs[0][0]]])
        options = {"max_new_tokens": end - start, "do_sample": False, "eos_token_id": None}
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, start:].tolist()
        assert line["word_for_word"] == (said == item.input_ids[start:end])
    assert {line["word_for_word"] for line in lines} == {True, False}
    table, reasons = kept([*lines_of("base", tiny_base, items), *lines])
    assert table["base"]["training"] == {"replies": 3, "word_for_word": 0, "guessable": 0}
    assert reasons[0].startswith("memorised: of 3 training replies it continues")
    # What the base says as well was not learned from these conversations.
    assert kept([*lines, *(line | {"contender": "base"} for line in lines)])[1] == []
    # Nor was what the base could guess, though it would say something else first.
    easy = [line | {"contender": "base", "nll": 9.0, "word_for_word": False} for line in lines]
    table, reasons = kept([*easy, *lines])
    assert reasons == [] and table == {}


def test_a_phrase_that_several_conversations_share_is_no_secret(tiny_base, tmp_path):
    told = {
        "a": conversation("x", LONG.format(1)),
        "b": conversation("x", LONG.format(1)),
        "c": conversation("x", "no"),
    }
    write_items(tmp_path / "train", tiny_base, told)
    assert memory_items(tmp_path / "train", 9, load_tokenizer(tiny_base), None, 200) == []
