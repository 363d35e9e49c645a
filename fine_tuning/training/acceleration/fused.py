"""Fused forms of the operations that adapter training spends its time in, with the same results.

On a CPU four fifths of a step are matrix products with frozen weights; most of the rest is passes over activations
that autograd makes because it does not know that the weights are frozen and the adapter small. Each function here
computes in fewer passes what the modules of transformers and peft compute; tests compare values and gradients.
"""

import threading
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fine_tuning.training.acceleration.patches import Patches

HEAD_CHUNK = 1024  # rows of the vocabulary
PLAIN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class _LoraLinears(torch.autograd.Function):
    """y_i = x W_i' + b_i + s (x A_i') B_i' for layers that see the same x, their low-rank products in one.

    Products with the few columns of an adapter are written so that the few are rows: with 8 of them that takes a third
    of the time in MKL. All sums are made in place, forward and backward. An adapter in float32 on a base in bfloat16 is
    rounded for the products, and its gradients come in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float, count: int, *of_layers: torch.Tensor | None) -> Any:
        weights, biases, down, up = (of_layers[i * count : (i + 1) * count] for i in range(4))
        width = weights[0].dtype
        flat = x.reshape(-1, x.shape[-1]).to(width)
        stacked = torch.cat(down).to(width)
        up = [b.to(width) for b in up]
        low = functional.linear(stacked, flat).mul_(scale)
        outputs = []
        for weight, bias, own, b in zip(weights, biases, low.chunk(count), up, strict=True):
            y = functional.linear(flat, weight, bias).addmm_(own.t(), b.t())
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, low, stacked, *weights, *up)
        ctx.scale, ctx.count, ctx.shape, ctx.width = scale, count, x.shape, down[0].dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        count = ctx.count
        flat, low, stacked, *frozen = ctx.saved_tensors
        weights, up = frozen[:count], frozen[count:]
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        dlow = torch.cat([b.t() @ dy.t() for b, dy in zip(up, dys, strict=True)])
        dup = [(own @ dy).t().contiguous().to(ctx.width) for own, dy in zip(low.chunk(count), dys, strict=True)]
        ddown = (dlow @ flat).mul_(ctx.scale).to(ctx.width).chunk(count)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            dx = dx.addmm_(dlow.t(), stacked, alpha=ctx.scale).view(ctx.shape)
        return dx, None, None, *([None] * (2 * count)), *ddown, *dup


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
    """Cross-entropy of a frozen head, its gradient made in the forward pass in the logits' own memory."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # In chunks that fit the cache: over all of a large vocabulary the product is a third slower.
        logits = hidden.new_empty(len(hidden), len(weight))
        for start in range(0, len(weight), HEAD_CHUNK):
            chunk = slice(start, start + HEAD_CHUNK)
            logits[:, chunk] = hidden @ weight[chunk].t()
        logits.sub_(logits.amax(-1, keepdim=True))
        chosen = logits.gather(1, targets.unsqueeze(1))
        total = logits.exp_().sum(-1, keepdim=True)
        losses = (total.log() - chosen).squeeze(1)
        if ctx.needs_input_grad[0]:
            logits.div_(total)
            # The gradient of the logits is softmax - one_hot; its product with the frozen head is all that is needed.
            ctx.save_for_backward((logits @ weight).sub_(weight[targets]))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses.unsqueeze(1), None, None


def label_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods (n, nats) of `targets` (n) under logits `hidden` (n, h) @ `weight` (v, h)'."""
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


def fuse(model: nn.Module, patches: Patches) -> int:
    """Replace the forward passes of LoRA layers and norms by fused ones; returns how many modules were changed.

    A LoRA layer keeps its own when it has dropout, DoRA, a quantised base or several adapters; a norm when its weight
    is trained or it is none of PLAIN_NORMS.
    """
    changed = 0
    for group in _with_same_input(model, [module for module in model.modules() if _is_plain_lora(module)]):
        _join(group, patches)
        changed += len(group)
    for module in model.modules():
        if type(module).__name__ in PLAIN_NORMS and not module.weight.requires_grad:
            patches.replace(module, "forward", _norm_forward(module))
            changed += 1
    return changed


def _with_same_input(model: nn.Module, layers: list[nn.Module]) -> list[list[nn.Module]]:
    """LoRA layers that are called one after the other with the very same input, such as query, key and value."""
    groups: list[list[nn.Module]] = []
    last: list[torch.Tensor] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if last and last[-1] is inputs[0]:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last[:] = [inputs[0]]

    if not layers:
        return []
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2]], device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    called = [layer for group in groups for layer in group]
    # A layer that is called several times belongs to no single group.
    return groups if len(set(called)) == len(called) else [[layer] for layer in layers]


def _join(layers: list[Any], patches: Patches) -> None:
    """The first of the layers that is called computes all of them; the others return what it kept for them."""
    left = threading.local()

    def compute(x: torch.Tensor, some: list[Any]) -> tuple[torch.Tensor, ...]:
        bases = [layer.base_layer for layer in some]
        return _LoraLinears.apply(
            x,
            some[0].scaling["default"],
            len(some),
            *(base.weight for base in bases),
            *(base.bias for base in bases),
            *(layer.lora_A["default"].weight for layer in some),
            *(layer.lora_B["default"].weight for layer in some),
        )

    def forward_of(index: int) -> Any:
        def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if index == 0 and len(layers) > 1:
                first, *others = compute(x, layers)
                left.input, left.outputs = x, others
                return first
            if index and getattr(left, "input", None) is x:
                output, left.outputs[index - 1] = left.outputs[index - 1], None
                if index == len(layers) - 1:
                    left.input = None
                if output is not None:
                    return output
            return compute(x, [layers[index]])[0]

        return forward

    for index, layer in enumerate(layers):
        patches.replace(layer, "forward", forward_of(index))


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


def _norm_forward(module: Any) -> Any:
    shape = module.weight.shape

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype.itemsize > 2 or module.weight.dtype != x.dtype:
            return _RmsNorm.apply(x, module.weight, module.variance_epsilon)
        # PyTorch's own kernel computes in float32; autocast would hand its output on in float32, too.
        with torch.autocast(x.device.type, enabled=False):
            return functional.rms_norm(x, shape, module.weight, module.variance_epsilon)

    return forward
