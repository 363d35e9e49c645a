"""What all rows of a batch begin with is computed once, and nothing else changes: not a loss, not a gradient."""

import copy

import pytest
import torch

from fine_tuning.training.shared_prefix import lay_out, share_prefixes
from fine_tuning.training.training_utils import IGNORED_LABEL, Row, collate
from tests.test_training import SETTINGS, make_rows, train

PROMPT = [3, 9, 27, 81]


def rows_after(prefix: list[int], *rests: list[int], untrained: int = 1) -> list[Row]:
    """Rows that begin alike; of each rest the first `untrained` tokens are prompt."""
    return [
        Row(str(i), prefix + rest, [IGNORED_LABEL] * (len(prefix) + untrained) + rest[untrained:])
        for i, rest in enumerate(rests)
    ]


def test_the_common_beginning_stands_once_and_every_rest_goes_on_from_it():
    laid_out = lay_out(collate(rows_after(PROMPT, [5, 6, 7], [8, 9]), 0))
    assert (laid_out["prefix"], laid_out["rows"]) == (4, 2)
    assert laid_out["input_ids"].tolist() == [[3, 9, 27, 81, 5, 6, 7, 8, 9, 0]]
    assert laid_out["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]]
    assert laid_out["labels"].tolist() == [[-100] * 5 + [6, 7] + [-100, 9, -100]]


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        (rows_after(PROMPT, [5, 6], [8, 9]), 4),
        (rows_after(PROMPT, [5, 6], [5, 9]), 4),  # the next token is predicted from the last of the prefix
        (rows_after(PROMPT, [5, 6, 7], [5, 6, 9], untrained=2), 5),
        (rows_after(PROMPT, [5, 6], [8, 9], untrained=0), 3),  # what is trained needs a predecessor of its own
        (rows_after(PROMPT, [5, 6]), 0),
        (rows_after([], [5, 6], [8, 9]), 0),
        ([*rows_after(PROMPT, [5, 6]), Row("short", [3, 9], [-100, 9])], 0),
    ],
)
def test_a_prefix_ends_before_anything_that_is_trained(rows, prefix):
    assert lay_out(collate(rows, 0))["prefix"] == prefix


@pytest.mark.parametrize("prefix", [PROMPT, []])
def test_losses_and_gradients_are_those_of_the_padded_batch(tiny_base, prefix):
    from fine_tuning.training.base_model import load_model
    from fine_tuning.training.label_trainer import LabelTrainer
    from fine_tuning.training.lora_trainer import attach_adapter, detect_hardware, training_arguments

    padded = attach_adapter(load_model(tiny_base, torch.float32), SETTINGS)
    torch.manual_seed(1)
    for name, parameter in padded.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    sharing = copy.deepcopy(padded)
    assert share_prefixes(sharing, 64)
    rows = rows_after(prefix, [5, 6, 7, 11, 12], [8, 9], [5, 6, 7], [5, 13, 4, 4])
    found = []
    for model in (padded, sharing):
        arguments = training_arguments(SETTINGS, detect_hardware("float32", 1), tiny_base.parent / "unused", 1)
        trainer = LabelTrainer(
            model=model, args=arguments, train_dataset=[rows], eval_dataset=[rows], shared_prefixes=model is sharing
        )
        loss, count = trainer.summed_loss(model, collate(rows, 0))
        loss.backward()
        found.append((loss.detach(), count, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert found[0][1] == found[1][1] == sum(len(row.input_ids) - len(prefix) - 1 for row in rows)
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_model_with_shorter_windows_of_attention_is_left_as_it_is(tiny_base):
    from fine_tuning.training.base_model import load_model

    model = load_model(tiny_base, torch.float32)
    before = model.config._attn_implementation
    model.config.sliding_window = 16
    assert not share_prefixes(model, 17)
    assert model.config._attn_implementation == before
    assert share_prefixes(model, 16)


def test_a_model_that_the_shared_form_gives_other_logits_is_left_as_it_is(tiny_base):
    from fine_tuning.training.base_model import load_model

    model = load_model(tiny_base, torch.float32)
    before = model.config._attn_implementation
    # An attention of the model's own kind, which knows nothing of prefixes.
    for layer in model.model.layers:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, attend=attend, **named: attend(
            *args, **{**named, "prefix": 0, "rows": None}
        )
    assert not share_prefixes(model, 64)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("threads", [1, 2])
def test_training_with_a_system_prompt_gives_the_same_bytes_every_time(tiny_base, tmp_path, monkeypatch, threads):
    rows = [Row(row.id, PROMPT + row.input_ids, [IGNORED_LABEL] * 4 + row.labels) for row in make_rows(60)]
    monkeypatch.setattr("tests.test_training.make_rows", lambda count, seed=0: rows[:count])
    for name in ("first", "again"):
        train(tiny_base, tmp_path / name, tmp_path / f"{name}-checkpoints", threads=threads)
    first, again = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "again"))
    assert first == again
