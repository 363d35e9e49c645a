"""Preference objectives: their losses by the papers' formulas, the same with and without acceleration, and training."""

import math
import random
import shutil

import pytest
import torch
from peft import PeftModel
from torch.nn import functional

from fine_tuning.common.records import read_json, read_jsonl
from fine_tuning.evaluation.suite.forgetting import SUITE, TEXTS
from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.hardware import detect_hardware
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.preferences import JudgedReply, Pair
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.acceleration.accelerate import accelerated
from fine_tuning.training.acceleration.micro_batches import split
from fine_tuning.training.model_card import model_card
from fine_tuning.training.objectives import retention
from fine_tuning.training.objectives.mixture import objective_for, own_items
from fine_tuning.training.objectives.retention import LIKELIEST, Retention, general_texts
from fine_tuning.training.objectives.token_losses import TokenLosses
from fine_tuning.training.run_report import preference_curve, quality
from tests.test_training import SETTINGS, make_rows

CPU = detect_hardware("float32", 2)
PREFERENCE = SETTINGS.preference.model_copy(update={"sft_weight": 0.0})
FIRST = SETTINGS.preference.model_copy(update={"order": "supervised_first"})


def reply(name: str, prompt: list[int], said: list[int]) -> PreparedRow:
    return PreparedRow(name, prompt + said, [NOT_TRAINED] * len(prompt) + said)


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Prompts of many lengths; the chosen reply ends with 7s, the rejected one with 8s."""
    chance, pairs = random.Random(seed), []
    for number in range(count):
        prompt = [3, 9, 27, *(chance.randint(9, 511) for _ in range(chance.randint(2, 30)))]
        said = [chance.randint(9, 511) for _ in range(chance.randint(1, 6))]
        chosen, rejected = (said + [end] * chance.randint(2, 8) for end in (7, 8))
        name = f"{seed}-{number}"
        pairs.append(Pair(name, reply(f"{name}/chosen", prompt, chosen), reply(f"{name}/rejected", prompt, rejected)))
    return pairs


def make_thumbs(count: int, seed: int = 0) -> list[JudgedReply]:
    """Every third one is liked."""
    pairs = make_pairs(count, seed)
    thumbs = []
    for number, (pair, other) in enumerate(zip(pairs, pairs[1:] + pairs[:1], strict=True)):
        liked = number % 3 == 0
        row = pair.chosen if liked else pair.rejected
        prompt = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == NOT_TRAINED]
        said = [label for label in other.chosen.labels if label != NOT_TRAINED]
        thumbs.append(JudgedReply(f"t{pair.id}", row, reply(f"t{pair.id}/other", prompt, said), liked))
    return thumbs


def adapted(base, seed: int):
    from fine_tuning.training.lora_trainer import attach_adapter

    model = attach_adapter(load_model(base, torch.float32), SETTINGS)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return model


def log_likelihood(model, row: PreparedRow) -> torch.Tensor:
    """Of the trained tokens, by a forward pass of one row."""
    logits = model(torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1)
    labels = torch.tensor(row.labels[1:])
    at = (labels != NOT_TRAINED).nonzero().flatten()
    return logits[at, labels[at]].sum()


def trained(row: PreparedRow) -> int:
    return sum(label != NOT_TRAINED for label in row.labels)


def loss_of_pairs(model, reference, pairs, settings) -> torch.Tensor:
    total = torch.zeros(())
    for pair in pairs:
        policy = [log_likelihood(model, row) for row in (pair.chosen, pair.rejected)]
        with torch.no_grad():
            before = [log_likelihood(reference, row) for row in (pair.chosen, pair.rejected)]
        up, down = (now - then for now, then in zip(policy, before, strict=True))
        if settings.loss == "sigmoid":
            z = settings.beta * (up - down)
            smooth = settings.label_smoothing
            loss = -(1 - smooth) * torch.log(torch.sigmoid(z)) - smooth * torch.log(torch.sigmoid(-z))
        elif settings.loss == "hinge":
            loss = torch.clamp(1 - settings.beta * (up - down), min=0)
        else:
            loss = (up / trained(pair.chosen) - down / trained(pair.rejected) - 1 / (2 * settings.beta)).square()
        total = total + loss - settings.sft_weight * policy[0] / trained(pair.chosen)
    return total / len(pairs)


def loss_of_thumbs(model, reference, thumbs, settings) -> torch.Tensor:
    def ratio(row):
        with torch.no_grad():
            before = log_likelihood(reference, row)
        return log_likelihood(model, row) - before

    with torch.no_grad():
        kl = torch.stack([ratio(thumb.mismatched) for thumb in thumbs]).mean().clamp(min=0)
    liked = [thumb for thumb in thumbs if thumb.liked]
    weight = (len(thumbs) - len(liked)) / len(liked)
    total = torch.zeros(())
    for thumb in thumbs:
        value = settings.beta * (ratio(thumb.reply) - kl)
        total = total + (weight * (1 - torch.sigmoid(value)) if thumb.liked else 1 - torch.sigmoid(-value))
    return total / len(thumbs)


CASES = [
    (make_pairs, {}),
    (make_pairs, {"label_smoothing": 0.2, "sft_weight": 0.5}),
    (make_pairs, {"loss": "hinge"}),
    (make_pairs, {"loss": "ipo", "beta": 0.3}),
    (make_thumbs, {}),
]


@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize(("make", "changes"), CASES)
def test_losses_and_gradients_are_those_of_the_formulas(tiny_base, make, changes, mode):
    settings = PREFERENCE.model_copy(update=changes)
    model, reference, items = adapted(tiny_base, 1), adapted(tiny_base, 2), make(6)
    expected = (loss_of_pairs if make is make_pairs else loss_of_thumbs)(model, reference, items, settings)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run = SETTINGS.model_copy(update={"acceleration": mode})
    with accelerated(reference, TokenLosses(0), tiny_base, make_rows(2), 64, run, CPU) as token_losses:
        (part,) = objective_for(
            items, [], token_losses, SETTINGS.model_copy(update={"preference": settings})
        ).parts.values()
        with torch.no_grad():
            values = part.log_likelihoods(reference, part.collate(items)).tolist()
    with accelerated(model, TokenLosses(0), tiny_base, make_rows(2), 64, run, CPU) as token_losses:
        objective = objective_for(items, [], token_losses, SETTINGS.model_copy(update={"preference": settings}))
        (part,) = objective.parts.values()
        part.references = {item.id: tuple(pair) for item, pair in zip(items, values, strict=True)}
        inputs = objective.collate(items)
        loss = objective.loss(model.train(), inputs) / objective.count(inputs)
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert found.keys() == gradients.keys() and len(found) == 28
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_liked_and_disliked_are_weighed_by_the_training_items_alone():
    liked, disliked = ([thumb for thumb in make_thumbs(30) if thumb.liked == side] for side in (True, False))
    (part,) = objective_for([*liked[:2], *disliked[:4]], liked, TokenLosses(0), SETTINGS).parts.values()
    assert part.class_weights == {True: 2.0, False: 1.0}


@pytest.mark.parametrize("every", [2, 4])
def test_a_batch_has_liked_and_disliked_replies_where_one_kind_is_shorter(every):
    judged = []
    for number, pair in enumerate(make_pairs(40)):
        liked = number % every == 0
        row = reply(pair.id, pair.chosen.input_ids, [7] * (3 if liked else 40))
        judged.append(JudgedReply(pair.id, row, row, liked))
    (part,) = objective_for(judged, [], TokenLosses(0), SETTINGS).parts.values()
    longest = max(len(item.input_ids) for item in judged)
    batches = part.batches(judged, 16 * longest, 2)  # eight items or more, of two rows each
    assert sorted(item.id for batch in batches for item in batch) == sorted(item.id for item in judged)
    for batch in batches:
        assert {item.liked for item in batch} == {True, False}
        assert 2 * len(batch) * max(len(item.input_ids) for item in batch) <= 16 * longest
        assert len(batch) % 2 == 0


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_general_text_adds_its_mean_divergence_from_the_base(tiny_base, mode, parts):
    base, model, rows = load_model(tiny_base, torch.float32).eval(), adapted(tiny_base, 1), make_rows(5)
    texts = general_texts(tiny_base, base, 512)[:7]
    total, positions = torch.zeros(()), 0
    for text in texts:
        before, now = (m(torch.tensor([text.input_ids])).logits[0, :-1].log_softmax(-1) for m in (base, model))
        likeliest = before.topk(LIKELIEST).indices
        p, q = (torch.cat([x.exp().gather(1, likeliest), 1 - x.exp().gather(1, likeliest).sum(1, True)], 1)
                for x in (before, now))  # fmt: skip
        total, positions = total + (p * (p / q).log()).sum(), positions + len(p)
    likelihood = sum(log_likelihood(model, row) for row in rows) / sum(map(trained, rows))
    expected = 3 * total / positions - likelihood
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run = SETTINGS.model_copy(update={"acceleration": mode, "retention": 3.0})
    with accelerated(model, TokenLosses(0), tiny_base, rows, 512, run, CPU) as token_losses:
        objective = objective_for(rows, [], token_losses, run, texts)
        inputs = objective.collate([*rows, *texts])
        loss = sum(objective.loss(model.train(), part) for part in split(inputs, parts)) / objective.count(inputs)
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)


def test_each_training_batch_gets_a_quarter_of_its_budget_in_general_text(tiny_base):
    texts = general_texts(tiny_base, load_model(tiny_base, torch.float32), 512)
    rows, run = make_rows(90), SETTINGS.model_copy(update={"retention": 1.0})
    objective = objective_for(rows, [], TokenLosses(0), run, texts)
    plain, batches = objective.batches(rows, 512), objective.training_batches(rows, 512)
    assert [own_items(batch) for batch in batches] == plain
    beside = [batch[len(own) :] for batch, own in zip(batches, plain, strict=True)]
    longest = [max(len(text.input_ids) for text in some) * len(some) for some in beside]
    assert all(length <= 128 or len(some) == 1 for length, some in zip(longest, beside, strict=True))
    assert len({text.id for some in beside for text in some}) >= len(batches)


def test_general_texts_share_nothing_with_what_forgetting_is_measured_on():
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    asked = [value for file in (SUITE, TEXTS) for line in read_jsonl(file) for value in line.values()]
    measured = set().union(*map(runs, asked))
    learned = [value for line in read_jsonl(retention.TEXTS) for value in line.values()]
    assert len(learned) > 100
    assert not [text for text in learned if runs(text) & measured or text in asked]


def test_with_general_text_a_model_stays_nearer_to_the_base(tiny_base, tmp_path):
    texts = general_texts(tiny_base, load_model(tiny_base, torch.float32), 60)

    def divergence(adapter) -> float:
        model = PeftModel.from_pretrained(load_model(tiny_base, torch.float32), adapter).eval()
        retention = Retention(texts, 1.0, 0)
        with torch.no_grad():
            return float(retention.loss(model, retention.collate(texts)))

    found = []
    for weight in (0.0, 100.0):
        folder = tmp_path / str(weight)
        train(tiny_base, folder, make_rows(40), make_rows(6, seed=1), retention=weight, learning_rate=0.02, epochs=4.0)
        found.append(divergence(folder / "adapter"))
    assert found[1] < found[0] / 2


def train(base, folder, items, validation, stop=None, **changes):
    from fine_tuning.training.lora_trainer import train_adapter

    settings = SETTINGS.model_copy(update={"threads": 1, "checkpoint_steps": 5} | changes)
    return train_adapter(
        base, "tiny", items, validation, settings, folder / "adapter", folder / "ck", stop, None, folder / "references"
    )


@pytest.mark.parametrize("make", [make_pairs, make_thumbs])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_was_preferred_becomes_likelier_on_prompts_that_were_not_trained(tiny_base, tmp_path, make, threads):
    result = train(tiny_base, tmp_path, make(60), make(20, seed=1), threads=threads, epochs=6.0)
    name = "pairs" if make is make_pairs else "thumbs"
    assert result.validation[f"eval_{name}_accuracy"] > 0.8
    assert result.validation[f"eval_{name}_margin"] > 0
    assert result.validation_loss < result.validation_loss_before


def test_two_micro_batches_of_judged_replies_have_the_losses_of_one(tiny_base, tmp_path):
    thumbs, validation, found = make_thumbs(24), make_thumbs(8, seed=1), []
    for threads in (1, 2):
        seen = []
        train(tiny_base, tmp_path / str(threads), thumbs, validation, seen.append, threads=threads, batch_tokens=4096)
        found.append([(values["loss"], values["grad_norm"]) for values in seen if "loss" in values])
    assert found[0] and found[1] == [pytest.approx(step, rel=1e-3) for step in found[0]]


def test_one_run_learns_from_rows_pairs_and_thumbs_and_says_what_each_measured(tiny_base, tmp_path):
    items = [*make_rows(30), *make_pairs(30), *make_thumbs(30)]
    result = train(tiny_base, tmp_path, items, [*make_rows(6, seed=1), *make_pairs(6, seed=1)], epochs=2.0)
    measured = result.validation
    assert {"eval_loss", "eval_sft_loss", "eval_pairs_loss", "eval_pairs_accuracy", "eval_pairs_chosen"} < set(measured)
    assert result.validation_loss == measured["eval_sft_loss"] < result.validation_loss_before
    assert quality(result)["validation_perplexity"] == pytest.approx(math.exp(result.validation_loss))


def test_the_loss_of_pairs_alone_has_no_perplexity(tiny_base, tmp_path):
    metrics = quality(train(tiny_base, tmp_path, make_pairs(20), make_pairs(6, seed=1)))
    assert "validation_loss" in metrics and "validation_perplexity" not in metrics
    base = {"model": "tiny", "license": "mit", "revision": None, "sha256": "0f"}
    assert "perplexity" not in model_card(base, {"method": "lora"}, metrics, {"train": "d1", "validation": "d2"})


def test_what_was_measured_on_pairs_and_thumbs_is_a_curve_by_step(tiny_base, tmp_path):
    validation = [*make_pairs(6, seed=1), *make_thumbs(6, seed=1)]
    columns, lines = preference_curve(train(tiny_base, tmp_path, [*make_pairs(20), *make_thumbs(20)], validation))
    assert len(lines) > 1 and all(isinstance(value, int | float) for line in lines for value in line)
    last = dict(zip(columns, lines[-1], strict=True))
    assert last["pairs_kl"] == pytest.approx(-(last["pairs_chosen"] + last["pairs_rejected"]) / 2)


@pytest.mark.parametrize("epochs", [1.0, 2.0])
def test_supervised_rows_come_first_in_each_epoch_in_an_order_of_its_own(tiny_base, tmp_path, monkeypatch, epochs):
    from fine_tuning.training.objectives.mixture import Mixture

    seen, loss = [], Mixture.loss

    def note(self, model, inputs):
        if torch.is_grad_enabled():
            seen.append((int(inputs["kind"][0]), inputs["input_ids"].sum().item()))
        return loss(self, model, inputs)

    monkeypatch.setattr(Mixture, "loss", note)
    items = [*make_rows(30), *make_pairs(20), *make_thumbs(20)]
    train(tiny_base, tmp_path, items, make_rows(6, seed=1), epochs=epochs, preference=FIRST)
    passes = [seen[start : start + int(len(seen) / epochs)] for start in range(0, len(seen), int(len(seen) / epochs))]
    for one in passes:
        kinds = [kind > 0 for kind, _ in one]
        assert kinds == sorted(kinds) and set(kinds) == {False, True}
        assert sorted(one) == sorted(passes[0]) and {1, 2} <= {kind for kind, _ in one}
    assert len(passes) == epochs and len({tuple(one) for one in passes}) == epochs


@pytest.mark.parametrize("order", ["together", "supervised_first"])
def test_a_run_that_was_cut_off_ends_with_the_bytes_of_one_that_was_not(tiny_base, tmp_path, order):
    items, validation = [*make_rows(30), *make_pairs(20), *make_thumbs(20)], make_rows(6, seed=1)
    settings = {"epochs": 2.0, "preference": SETTINGS.preference.model_copy(update={"order": order})}
    steps = train(tiny_base, tmp_path / "whole", items, validation, **settings).steps

    class CutOff(Exception):
        pass

    def stop(values):
        if values["step"] == steps - 2 and "loss" in values:  # in the second epoch
            raise CutOff

    with pytest.raises(CutOff):
        train(tiny_base, tmp_path / "cut", items, validation, stop, **settings)
    train(tiny_base, tmp_path / "cut", items, validation, **settings)
    whole, cut = ((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_reference_log_likelihoods_are_computed_once_and_kept_by_hash(tiny_base, tmp_path, monkeypatch):
    from fine_tuning.training.objectives.preference import Referenced

    calls, measure = [], Referenced.log_likelihoods

    def note(*arguments, **named):
        calls.append(torch.is_grad_enabled())
        return measure(*arguments, **named)

    monkeypatch.setattr(Referenced, "log_likelihoods", note)
    pairs, validation = make_pairs(10), make_rows(4, seed=1)
    train(tiny_base, tmp_path, pairs, validation, max_steps=1)
    (kept,) = (tmp_path / "references").glob("*.json")
    assert set(read_json(kept)) == {pair.id for pair in pairs}
    assert calls.count(False) > 0
    calls.clear()
    shutil.rmtree(tmp_path / "ck")
    other = PREFERENCE.model_copy(update={"beta": 0.5})
    train(tiny_base, tmp_path, pairs, validation, max_steps=1, preference=other)
    assert calls and calls.count(False) == 0
    shutil.rmtree(tmp_path / "ck")
    train(tiny_base, tmp_path, make_pairs(10, seed=4), validation, max_steps=1)
    assert len(list((tmp_path / "references").glob("*.json"))) == 2


def test_the_loss_starts_at_log_2_because_the_reference_is_the_model_before_training(tiny_base, tmp_path):
    seen = []
    pairs = make_pairs(8)
    train(tiny_base, tmp_path, pairs, make_pairs(4, seed=1), seen.append, max_steps=1, preference=PREFERENCE)
    assert seen[0]["loss"] == pytest.approx(float(-functional.logsigmoid(torch.zeros(()))), abs=1e-6)
