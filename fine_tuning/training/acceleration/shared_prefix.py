"""The common prefix of a batch's rows is computed once, and every row continues from it: the same loss in less time.

Chats begin with the same system prompt, a third of the tokens of short ones. Keys and values there depend on nothing
that comes later, so the rows of a batch can share them, as servers do at inference (Yao et al. 2024, "DeFT", for trees
of continuations). Gradients add up at what is shared, as they would over copies of it.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.training.acceleration.patches import Patches

NAME = "shared_prefix"
LARGEST_DIFFERENCE = 1e-3  # of logits in float32; another order of additions changes a few millionths
LARGEST_ROUNDING = 8  # units of the last place of the largest logit, in shorter formats


def share_prefixes(model: Any, longest: int, patches: Patches) -> bool:
    """Let the attention of a model read batches that `lay_out` made; False, and no change, where it cannot.

    Batches that are padded on the right it reads as before, without a mask: attention is causal, so no token sees the
    padding after it. A model is left as it is that limits attention to a window shorter than the `longest` row
    (tokens), whose rows or tokens see others that they should not, or whose logits for two short rows differ by more
    than rounding.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(limit is not None and limit < longest for limit in limits):
        return False
    AttentionInterface.register(NAME, _attention)
    before = model.config._attn_implementation
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = _logits_of_rows(model, False, [7, 8], [9, 10])
        try:
            model.set_attn_implementation(NAME)
            same = all(
                _same(_logits_of_rows(model, shared, [7, 8], [9, 10]), expected) and _apart(model, shared)
                for shared in (True, False)
            )
        except (TypeError, ValueError, RuntimeError):
            same = False
    model.train(was_training)
    if same:
        patches.callback(model.set_attn_implementation, before)
    else:
        model.set_attn_implementation(before)
    return same


def _logits_of_rows(model: Any, shared: bool, *rests: list[int]) -> torch.Tensor:
    """Logits (rows, 2, vocabulary) at two tokens after two that all rows begin with, in one form or the other."""
    ids = torch.tensor([[5, 6, *rest] for rest in rests], device=next(model.parameters()).device)
    if not shared:
        return model(input_ids=ids).logits[:, 2:]
    labels = torch.where(torch.arange(4, device=ids.device) < 3, NOT_TRAINED, ids)
    laid_out = lay_out({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    del laid_out["labels"]
    return model(**laid_out).logits[0, 2:].unflatten(0, (len(rests), 2))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    unit = torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool((found - expected).abs().max() < max(LARGEST_DIFFERENCE, LARGEST_ROUNDING * float(unit)))


def _apart(model: Any, shared: bool) -> bool:
    """Whether logits are the same to the last bit when the other row changes, or a later token."""
    found = _logits_of_rows(model, shared, [7, 8], [9, 10])
    first, second = (_logits_of_rows(model, shared, *rests) for rests in (([11, 12], [9, 10]), ([7, 8], [11, 12])))
    end = _logits_of_rows(model, shared, [7, 13], [9, 10])
    return torch.equal(found[1], first[1]) and torch.equal(found[0], second[0]) and torch.equal(found[0, 0], end[0, 0])


def lay_out(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A padded batch as one row: the common prefix, then the rest of each row.

    Args:
        inputs: input_ids, attention_mask and labels, each (rows, longest), padded on the right.

    Returns:
        input_ids, position_ids and labels, each (1, prefix + rows * (longest - prefix)), `prefix` and `rows`. A label
        stands where its token does; the first token of a rest bears none: what stands before it is another row's.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    rows, longest = ids.shape
    prefix = 0
    if rows > 1:
        # Up to the last token before any that is trained, and within the shortest row.
        shared = (ids == ids[0]).all(0) & (labels == NOT_TRAINED).all(0) & inputs["attention_mask"].bool().all(0)
        prefix = int(shared.long().cumprod(0).sum())
        while prefix and (prefix == longest or (labels[:, prefix] != NOT_TRAINED).any()):
            prefix -= 1
    positions = torch.arange(longest, device=ids.device)

    def joined(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return torch.cat((first, rest.flatten())).unsqueeze(0)

    return {
        "input_ids": joined(ids[0, :prefix], ids[:, prefix:]),
        "position_ids": joined(positions[:prefix], positions[prefix:].repeat(rows, 1)),
        "labels": joined(labels[0, :prefix], labels[:, prefix:]),
        "prefix": prefix,
        "rows": rows,
    }


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix: int = 0,
    rows: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within a prefix, and of each rest to the prefix and to itself.

    Args:
        query: (1, heads, tokens, width); key and value: (1, heads or a divisor of them, tokens, width). Without `rows`
            there may be several in the place of the 1.
        prefix: tokens that all rows begin with.
        rows: how many rests of one length follow them. None: rows padded on the right, no batch that `lay_out` made.

    Returns:
        (1, tokens, heads, width), and no weights.

    Raises:
        ValueError: the model's attention is of another kind; `share_prefixes` finds out.
    """
    if any(arguments.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("attention with more than products of queries and keys")
    causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError("attention to later tokens")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and q.is_cuda and not (mask is None and _has_flash(q)):
            # The only kernel left on a GPU would materialise the matrix of all scores.
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            groups = 1
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=groups > 1
        )

    if rows is None:
        return attend(query, key, value).transpose(1, 2).contiguous(), None

    def rests(states: torch.Tensor) -> torch.Tensor:
        return states[0, :, prefix:].unflatten(1, (rows, -1)).transpose(0, 1)

    q, k, v = rests(query), rests(key), rests(value)
    if not prefix:
        return attend(q, k, v).transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    first = [states[:, :, :prefix] for states in (query, key, value)]
    own = attend(*first)
    k, v = (
        torch.cat((shared.expand(rows, -1, -1, -1), rest), 2) for shared, rest in zip(first[1:], (k, v), strict=True)
    )
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
    found = attend(q, k, v, seen)
    return torch.cat((own[0].transpose(0, 1), found.transpose(1, 2).flatten(0, 1))).unsqueeze(0), None


def _has_flash(query: torch.Tensor) -> bool:
    """Whether FlashAttention takes queries of this kind, with gradients, on all GPUs from Ampere on."""
    return query.dtype.itemsize == 2 and query.shape[-1] <= 192 and torch.cuda.get_device_capability() >= (8, 0)
