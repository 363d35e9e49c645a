"""Quicker forms of the operations that adapter training spends its time in, with the same results.

On a CPU four fifths of a step are matrix products with frozen weights; most of the rest is passes over activations
that autograd makes because it does not know that the weights are frozen and the adapter small. Each function here
computes in fewer passes what the modules of transformers and peft compute; tests compare values and gradients.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

HEAD_STRETCH = 1024  # rows of the vocabulary
PLAIN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + s (x A') B', with the low-rank product added in place, forward and backward.

    Products with the few columns of an adapter are written so that the few are rows: with 8 of them that takes a third
    of the time in MKL.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: Any, b: Any, scale: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = a @ flat.t()
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(low.t(), b.t(), alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        flat, low, weight, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dlow = b.t() @ dy.t()
        db = (low @ dy).t().mul(ctx.scale)
        da = (dlow @ flat).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dlow.t(), a, alpha=ctx.scale).view(ctx.shape)
        return dx, None, None, da, db, None


class _RmsNorm(torch.autograd.Function):
    """y = x / rms(x) * w with frozen w (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        normed, inverse, weight = ctx.saved_tensors
        d = dy * weight
        share = torch.linalg.vecdot(d, normed).unsqueeze(-1).div_(d.shape[-1])
        return d.addcmul_(normed, share, value=-1).mul_(inverse), None, None


class _LabelLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head, its gradient made in the forward pass in the logits' own memory."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # By stretches that the cache holds: over all of a large vocabulary the product is a third slower.
        logits = hidden.new_empty(len(hidden), len(weight))
        for start in range(0, len(weight), HEAD_STRETCH):
            stretch = slice(start, start + HEAD_STRETCH)
            logits[:, stretch] = hidden @ weight[stretch].t()
        logits.sub_(logits.amax(-1, keepdim=True))
        chosen = logits.gather(1, targets.unsqueeze(1)).sum()
        total = logits.exp_().sum(-1, keepdim=True)
        loss = total.log().sum() - chosen
        if ctx.needs_input_grad[0]:
            logits.div_(total)
            # The gradient of the logits is softmax - one_hot; its product with the frozen head is all that is needed.
            ctx.save_for_backward((logits @ weight).sub_(weight[targets]))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss, None, None


def summed_label_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods (nats) of `targets` (n) under logits `hidden` (n, h) @ `weight` (v, h)'."""
    return _LabelLoss.apply(hidden, weight, targets)


def has_plain_head(model: Any) -> bool:
    """Whether the model's logits are its hidden states times a frozen weight, and nothing more."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    changes = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and all(getattr(config, name, None) is None for name in changes)
    )


def fuse(model: nn.Module) -> int:
    """Give the modules of a float32 model with LoRA layers their quicker forms; returns how many were changed.

    A LoRA layer keeps its own form when it has dropout, DoRA, a quantised base or several adapters; a norm when its
    weight is trained or its form is not plain.
    """
    changed = 0
    for module in model.modules():
        if _is_plain_lora(module):
            module.forward = _lora_forward(module)
            changed += 1
        elif type(module).__name__ in PLAIN_NORMS and not module.weight.requires_grad:
            module.forward = _norm_forward(module)
            changed += 1
    return changed


def _is_plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or list(module.active_adapters) != ["default"]:
        return False
    return (
        type(module.base_layer) is nn.Linear
        and not module.base_layer.weight.requires_grad
        and isinstance(module.lora_dropout["default"], nn.Identity)
        and not module.use_dora["default"]
        and module.lora_B["default"].bias is None
        and not module.fan_in_fan_out
    )


def _lora_forward(module: Any) -> Any:
    base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    scale = module.scaling["default"]
    return lambda x, *_, **__: _LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, scale)


def _norm_forward(module: Any) -> Any:
    return lambda x: _RmsNorm.apply(x, module.weight, module.variance_epsilon)
