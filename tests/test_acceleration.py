"""`train.acceleration`: off is plain transformers and peft; auto has its losses and gradients, and undoes patches."""

import pytest
import torch
from torch.nn import functional

from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.hardware import Hardware
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import PreparedRow, collate
from fine_tuning.training.acceleration.accelerate import accelerated
from fine_tuning.training.acceleration.micro_batches import count_micro_batches
from fine_tuning.training.objectives.mixture import Mixture
from fine_tuning.training.objectives.sft import SupervisedFineTuning
from fine_tuning.training.objectives.token_losses import TokenLosses
from tests.test_training import SETTINGS, make_rows, train

CPU = Hardware("cpu", "float32", 2, "a CPU")
ROWS = [PreparedRow(row.id, [3, 9, 27, *row.input_ids], [NOT_TRAINED] * 3 + row.labels) for row in make_rows(6)]


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


def run(model, base, mode: str, rows: list[PreparedRow]):
    """Loss and gradients of one batch, computed as with `train.acceleration: <mode>`; the model's state meanwhile."""
    settings, plain = SETTINGS.model_copy(update={"acceleration": mode}), TokenLosses(0)
    with accelerated(model, plain, base, rows, 64, settings, CPU) as token_losses:
        objective = SupervisedFineTuning(token_losses)
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


# Two micro-batches divide the rows otherwise: there an epoch is one batch.
CHANGES = [{"threads": 2, "batch_tokens": 8192, "epochs": 10.0}, {"gradient_accumulation": 2}, {"packing": True}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_run_without_acceleration_measures_what_one_with_it_does(tiny_base, tmp_path, changes):
    changes = {"schedule": "constant", "optimizer": "sgd", "learning_rate": 1.0, "batch_tokens": 200} | changes
    auto, off = (
        train(tiny_base, tmp_path / mode, tmp_path / f"ck-{mode}", acceleration=mode, **changes)
        for mode in ("auto", "off")
    )
    assert auto.steps == off.steps
    assert abs(auto.validation_loss - auto.validation_loss_before) > 1e-3
    norms = [[entry["grad_norm"] for entry in result.history if "grad_norm" in entry] for result in (auto, off)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert off.validation_loss == pytest.approx(auto.validation_loss, abs=1e-4)


class MeanOfRows:
    """An objective whose unit is a row: the mean negative log-likelihood of its trained tokens."""

    def batches(self, rows, budget, multiple=1):
        return [list(rows[start : start + 2]) for start in range(0, len(rows), 2)]

    def collate(self, rows):
        inputs = collate(rows, 0)
        return {"ids": inputs["input_ids"], "wanted": inputs["labels"]}

    def count(self, inputs):
        return torch.tensor(len(inputs["ids"]))

    def loss(self, model, inputs):
        scores = torch.log_softmax(model(input_ids=inputs["ids"]).logits[:, :-1].float(), -1)
        labels = inputs["wanted"][:, 1:]
        chosen = scores.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        trained = labels != NOT_TRAINED
        return -((chosen * trained).sum(1) / trained.sum(1)).sum()

    def measure(self, model, inputs):
        return {"loss": self.loss(model, inputs)}


def test_another_objective_is_trained_by_the_same_loop_and_weighs_its_own_units(tiny_base, tmp_path):
    from fine_tuning.training.label_trainer import LabelTrainer
    from fine_tuning.training.lora_trainer import training_arguments

    changes = {"gradient_accumulation": 2, "max_steps": 1, "optimizer": "sgd", "learning_rate": 1.0}
    changes |= {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1e9}
    settings, model = SETTINGS.model_copy(update=changes), adapted(tiny_base)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    # Four rows in two batches of one step: each row weighs a quarter, however many of its tokens are trained.
    expected = sum(MeanOfRows().loss(model, MeanOfRows().collate([row])) for row in ROWS[:4]) / 4
    gradients = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    with accelerated(model, TokenLosses(0), tiny_base, ROWS, 64, settings, CPU):
        objective = Mixture({PreparedRow: MeanOfRows()})
        batches = objective.batches(ROWS[:4], 64)
        trainer = LabelTrainer(
            objective=objective,
            model=model,
            args=training_arguments(settings, CPU, tmp_path, len(batches)),
            train_dataset=batches,
            eval_dataset=batches,
        )
        assert trainer.validate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
        trainer.train()
    for (name, old), gradient in zip(before.items(), gradients, strict=True):
        torch.testing.assert_close(old - model.get_parameter(name), gradient, rtol=1e-3, atol=1e-5)
