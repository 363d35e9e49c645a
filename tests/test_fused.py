"""The quicker forms give the values and gradients of the forms they stand in for."""

import copy

import pytest
import torch
from torch.nn import functional

from fine_tuning.training.acceleration import fused
from fine_tuning.training.acceleration.patches import Patches
from tests.test_training import SETTINGS


def test_the_label_loss_is_cross_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(2500, 16, dtype=torch.float64), torch.randint(0, 2500, (7,))
    expected = functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(3 * expected, hidden)
    loss = fused.label_losses(hidden, weight, targets).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, hidden)[0], gradient)


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"target_modules": "attention"}, {"top_layers": 1}])
def test_a_fused_model_has_the_losses_and_gradients_of_the_plain_one(tiny_base, changes):
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.training.lora_trainer import attach_adapter

    settings = SETTINGS.model_copy(update={"lora": SETTINGS.lora.model_copy(update=changes)})
    plain = attach_adapter(load_model(tiny_base, torch.float64), settings).double()
    torch.manual_seed(1)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    quick = copy.deepcopy(plain)
    assert fused.fuse(quick, Patches()) > 0
    ids = torch.randint(3, 500, (3, 11))
    results = []
    for model in (plain, quick):
        logits = model(input_ids=ids).logits
        functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    # transformers takes the norm in float32 whatever the model's type.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_a_fused_model_is_as_near_to_the_exact_one_as_the_plain_one(tiny_base):
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.training.lora_trainer import attach_adapter

    exact = attach_adapter(load_model(tiny_base, torch.float64), SETTINGS).double()
    torch.manual_seed(1)
    for name, parameter in exact.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    plain, quick = (attach_adapter(load_model(tiny_base, torch.bfloat16), SETTINGS) for _ in range(2))
    for model in (plain, quick):
        assert all("lora_" in name for name in model.load_state_dict(exact.state_dict(), strict=False).missing_keys)
    fused.fuse(quick, Patches())
    ids = torch.randint(3, 500, (3, 11))
    found = []
    for model in (exact, plain, quick):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            logits = model(input_ids=ids).logits
        functional.cross_entropy(logits.double().flatten(0, 1), ids.flatten(), reduction="sum").backward()
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad and model is not exact)
    far, near = ((other - found[0]).norm() / found[0].norm() for other in found[1:])
    assert near < max(1.1 * far, 0.01)


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"dora": True}])
def test_layers_of_another_kind_keep_their_own_form(tiny_base, changes):
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.training.lora_trainer import attach_adapter

    settings = SETTINGS.model_copy(update={"lora": SETTINGS.lora.model_copy(update=changes)})
    model = attach_adapter(load_model(tiny_base, torch.float32), settings)
    fused.fuse(model, Patches())
    assert not any("forward" in vars(module) for name, module in model.named_modules() if name.endswith("_proj"))


def test_layers_with_same_input_input_are_found(tiny_base):
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.training.lora_trainer import attach_adapter

    model = attach_adapter(load_model(tiny_base, torch.float32), SETTINGS)
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    layers = [module for module in model.modules() if fused._is_plain_lora(module)]
    groups = [[names[id(layer)] for layer in group] for group in fused._with_same_input(model, layers)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_a_layer_of_a_group_that_is_called_by_itself_gives_its_own_output(tiny_base):
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.training.lora_trainer import attach_adapter

    plain = attach_adapter(load_model(tiny_base, torch.float32), SETTINGS)
    quick = copy.deepcopy(plain)
    fused.fuse(quick, Patches())
    x, other = torch.randn(5, 64), torch.randn(3, 64)
    expected, attention = (model.base_model.model.model.layers[0].self_attn for model in (plain, quick))
    attention.q_proj(x)
    for layer, given in (("v_proj", other), ("k_proj", x), ("k_proj", x), ("v_proj", x)):
        torch.testing.assert_close(getattr(attention, layer)(given), getattr(expected, layer)(given))
