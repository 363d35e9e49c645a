"""Batches of like length take one shape, and what a GPU launches for a shape is recorded: the same losses, sooner."""

import copy

import pytest
import torch

from fine_tuning.runtime.hardware import Hardware
from fine_tuning.schema.prepared import PreparedRow, batch_by_tokens, collate
from fine_tuning.training import lora_trainer
from fine_tuning.training.acceleration import cuda_graphs
from fine_tuning.training.acceleration.accelerate import AcceleratedTokenLosses
from fine_tuning.training.acceleration.patches import Patches
from fine_tuning.training.acceleration.shared_prefix import share_prefixes
from fine_tuning.training.memory import Shape
from fine_tuning.training.objectives.sft import SupervisedFineTuning
from fine_tuning.training.objectives.token_losses import TokenLosses
from tests.test_training import SETTINGS, make_rows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
GPU = Hardware("cuda", "bfloat16", 1, "a GPU")


def rows_of(*lengths: int) -> list[PreparedRow]:
    return [PreparedRow(str(i), [3 + i % 7] * n, [-100] + [3 + i % 7] * (n - 1)) for i, n in enumerate(lengths)]


def test_a_batch_takes_the_next_length_and_all_rows_that_the_budget_holds():
    assert cuda_graphs.shape_of(rows_of(9, 17), 256) == (8, 32)
    assert cuda_graphs.shape_of(rows_of(9, 16), 256) == (16, 16)
    assert cuda_graphs.shape_of(rows_of(400), 256) == (1, 448)


def test_lengths_have_four_classes_an_octave():
    classes = {cuda_graphs.length_class(length) for length in range(1, 1025)}
    assert sorted(classes) == [*range(16, 129, 16), 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert all(length <= cuda_graphs.length_class(length) < max(length + 16, 1.25 * length) for length in range(1, 999))


def test_batches_stay_within_the_budget_when_their_lengths_are_rounded_up():
    rows = make_rows(200)
    batches = batch_by_tokens(rows, 256, padded=cuda_graphs.length_class)
    assert sorted(row.id for batch in batches for row in batch) == sorted(row.id for row in rows)
    shapes = [cuda_graphs.shape_of(batch, 256) for batch in batches]
    assert all(count * length <= 256 for count, length in shapes)
    assert all(len(batch) <= count for batch, (count, _) in zip(batches, shapes, strict=True))


def test_shapes_are_recorded_that_are_used_often():
    batches = [rows_of(30, 30)] * 2 + [rows_of(50)] + [rows_of(9)] * 5
    assert cuda_graphs.frequent_shapes(batches, 64, 1, most=9) == {(4, 16)}
    assert cuda_graphs.frequent_shapes(batches, 64, 2, most=9) == {(4, 16), (2, 32)}
    assert cuda_graphs.frequent_shapes(batches, 64, 4, most=9) == {(4, 16), (2, 32), (1, 64)}
    assert cuda_graphs.frequent_shapes(batches, 64, 4, most=2) == {(4, 16), (2, 32)}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": SETTINGS.lora.model_copy(update={"dropout": 0.1})},
        {"neftune_alpha": 5.0},
        {"packing": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation": 2},
        {"method": "qlora"},
    ],
)
def test_steps_of_another_kind_are_not_recorded(changes):
    assert cuda_graphs.may_record(SETTINGS, GPU)
    assert not cuda_graphs.may_record(SETTINGS.model_copy(update=changes), GPU)
    assert not cuda_graphs.may_record(SETTINGS, Hardware("cpu", "float32", 1, "a CPU"))


@pytest.mark.parametrize(
    ("parameters", "batch_tokens", "gigabytes", "least", "most"),
    [
        (134_515_008, 8192, 80, 30, 32),
        (134_515_008, 8192, 48, 10, 30),
        (134_515_008, 8192, 24, 0, 0),  # three times the activations of a batch do not fit
        (134_515_008, 512, 4, 1, 4),
        (7_000_000_000, 8192, 80, 0, 0),  # products that take longer than their launches
    ],
)
def test_as_many_shapes_are_recorded_as_the_memory_of_the_gpu_holds(parameters, batch_tokens, gigabytes, least, most):
    base = Shape(parameters, 28_311_552, layers=30, hidden=576, vocabulary=49152)
    settings = SETTINGS.model_copy(update={"batch_tokens": batch_tokens})
    assert least <= cuda_graphs.shapes_to_record(base, settings, GPU, 2_442_240, gigabytes * 10**9) <= most


def test_rows_and_columns_of_padding_change_no_loss_and_no_gradient(tiny_base):
    from fine_tuning.runtime.base_model import load_model

    plain = lora_trainer.attach_adapter(load_model(tiny_base, torch.float32), SETTINGS)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.1)
    causal = copy.deepcopy(plain)
    assert share_prefixes(causal, 64, Patches())
    rows = make_rows(5)
    shape = 8, max(len(row.input_ids) for row in rows) + 9
    found = []
    for model, inputs in ((plain, collate(rows, 0)), (causal, collate(rows, 0, shape))):
        objective = SupervisedFineTuning(
            AcceleratedTokenLosses(model, TokenLosses(0), 512, False, set(), False, Patches())
        )
        loss = objective.loss(model.train(), inputs)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), objective.count(inputs), gradients))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    for expected, gradient in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_recording_gives_the_loss_and_the_gradients_of_the_layers(tiny_base, precision):
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.training.acceleration.fused import fuse

    plain = lora_trainer.attach_adapter(load_model(tiny_base, precision), SETTINGS).cuda().train()
    fuse(plain, Patches())
    assert share_prefixes(plain, 64, Patches())
    recorded = copy.deepcopy(plain)
    fuse(recorded, Patches())
    cuda_graphs.record_layers(recorded, {(8, 32), (4, 48)}, Patches())
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (plain, recorded)]
    for step, shape in enumerate([(8, 32), (8, 32), (4, 48), (8, 32), (4, 48), (2, 16)]):
        torch.manual_seed(step)
        ids = torch.randint(3, 500, shape, device="cuda")
        found = []
        for model, optimizer in zip((plain, recorded), optimizers, strict=True):
            optimizer.zero_grad()
            logits = model(input_ids=ids).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
            optimizer.step()
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
        for expected, gradient in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0.02, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_recorded_steps_train_what_others_train_and_the_same_bytes_every_time(
    tiny_base, tmp_path, monkeypatch, precision
):
    made = []
    record = cuda_graphs._recording
    monkeypatch.setattr(cuda_graphs, "_recording", lambda *arguments: made.append(1) or record(*arguments))

    def run(name: str):
        rows = make_rows(30)
        settings = SETTINGS.model_copy(update={"precision": precision, "epochs": 20.0, "learning_rate": 1e-2})
        return lora_trainer.train_adapter(
            tiny_base, "tiny", rows, rows, settings, tmp_path / name, tmp_path / f"c{name}"
        )

    first = run("a")
    assert made
    assert first.validation_loss < first.validation_loss_before - 0.3
    assert run("b").validation_loss == first.validation_loss
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b
    made.clear()
    monkeypatch.setattr(cuda_graphs, "LEAST_USES", 10**9)
    assert run("c").validation_loss == pytest.approx(first.validation_loss, rel=0.05)
    assert not made


@needs_gpu
def test_layers_that_cannot_be_recorded_go_on_as_they_are(tiny_base, tmp_path, monkeypatch, capsys):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    turn = LlamaRotaryEmbedding.forward

    def look(self, x, position_ids):
        assert float(position_ids.max()) >= 0  # waits for the GPU, which a recording must not
        return turn(self, x, position_ids)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", look)
    rows = make_rows(30)
    settings = SETTINGS.model_copy(update={"epochs": 20.0, "learning_rate": 1e-2})
    result = lora_trainer.train_adapter(tiny_base, "tiny", rows, rows, settings, tmp_path / "a", tmp_path / "ca")
    assert result.validation_loss < result.validation_loss_before - 0.3
    assert capsys.readouterr().out.count("without CUDA graphs") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_base_without_deterministic_kernels_is_trained_all_the_same(tiny_base, tmp_path, monkeypatch, capsys):
    from fine_tuning.training.label_trainer import LabelTrainer

    measure = LabelTrainer.validate
    errors = [RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")]

    def refuse_once(self):
        if errors:
            raise errors.pop()
        return measure(self)

    monkeypatch.setattr(LabelTrainer, "validate", refuse_once)
    rows = make_rows(4)
    settings = SETTINGS.model_copy(update={"threads": 1})
    lora_trainer.train_adapter(tiny_base, "tiny", rows, rows, settings, tmp_path / "a", tmp_path / "ca")
    assert "no deterministic kernels" in capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()
