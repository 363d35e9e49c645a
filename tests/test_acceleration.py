"""`train.acceleration`: off is plain transformers and peft; auto has its losses and gradients, and undoes patches."""

import pytest
import torch
from torch.nn import functional

from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.hardware import Hardware
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import Row
from fine_tuning.training.acceleration.accelerate import accelerated
from fine_tuning.training.acceleration.micro_batches import count_micro_batches
from fine_tuning.training.objectives.sft import SupervisedFineTuning
from tests.test_training import SETTINGS, make_rows, train

CPU = Hardware("cpu", "float32", 2, "a CPU")
ROWS = [Row(row.id, [3, 9, 27, *row.input_ids], [NOT_TRAINED] * 3 + row.labels) for row in make_rows(6)]


def adapted(base):
    from fine_tuning.training.lora_trainer import attach_adapter

    model = attach_adapter(load_model(base, torch.float32), SETTINGS)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return model


def state_of(model) -> tuple:
    """What a patch would change: attributes of instances, hooks, the attention."""
    modules = dict(model.named_modules())
    replaced = {
        (path, name) for path, module in modules.items() for name, value in vars(module).items() if callable(value)
    }
    hooks = {path: len(module._forward_pre_hooks) for path, module in modules.items()}
    return replaced, hooks, model.config._attn_implementation


def run(model, base, mode: str, rows: list[Row]):
    """Loss and gradients of one batch, computed as with `train.acceleration: <mode>`; the model's state meanwhile."""
    settings, plain = SETTINGS.model_copy(update={"acceleration": mode}), SupervisedFineTuning(0)
    with accelerated(model, plain, base, rows, 64, settings, CPU) as objective:
        meanwhile = state_of(model)
        loss = objective.loss(model.train(), objective.collate(rows))
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, meanwhile


def test_auto_has_the_losses_and_gradients_of_off_which_are_those_of_plain_transformers_and_peft(tiny_base):
    model = adapted(tiny_base)
    untouched = state_of(model)
    fast, fast_gradients, patched = run(model, tiny_base, "auto", ROWS)
    assert patched[0] - untouched[0] and patched[1] != untouched[1] and patched[2] != untouched[2]
    assert state_of(model) == untouched
    plain, gradients, meanwhile = run(model, tiny_base, "off", ROWS)
    assert meanwhile == untouched

    total = sum(
        functional.cross_entropy(
            model(torch.tensor([row.input_ids])).logits[0, :-1], torch.tensor(row.labels[1:]), reduction="sum"
        )
        for row in ROWS
    )
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 28  # A and B of seven modules in two layers
    for loss, found in ((fast, fast_gradients), (plain, gradients)):
        torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=1e-4)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_off_computes_a_batch_as_a_whole():
    assert count_micro_batches(SETTINGS, CPU) == 2
    assert count_micro_batches(SETTINGS.model_copy(update={"acceleration": "off"}), CPU) == 1


@pytest.mark.parametrize("changes", [{"threads": 2}, {"gradient_accumulation": 2}, {"packing": True}], ids=str)
def test_a_run_without_acceleration_measures_what_one_with_it_does(tiny_base, tmp_path, changes):
    changes = changes | {"schedule": "constant", "optimizer": "sgd", "learning_rate": 1.0, "batch_tokens": 200}
    auto, off = (
        train(tiny_base, tmp_path / mode, tmp_path / f"ck-{mode}", acceleration=mode, **changes)
        for mode in ("auto", "off")
    )
    assert auto.steps == off.steps
    assert abs(auto.validation_loss - auto.validation_loss_before) > 1e-3
    norms = [[entry["grad_norm"] for entry in result.history if "grad_norm" in entry] for result in (auto, off)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert off.validation_loss == pytest.approx(auto.validation_loss, abs=1e-4)
