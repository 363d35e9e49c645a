"""The common prefix of rows is computed once, and every row continues from it: the same loss in less time.

Chats begin with the same system prompt, a third of the tokens of short ones, and the two replies of a pair answer one
prompt. Keys and values there depend on nothing that comes later, so rows can share them, as servers do at inference
(Yao et al. 2024, "DeFT", for trees of continuations). Gradients add up at what is shared, as they would over copies.
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
    del laid_out["labels"], laid_out["row_of"]
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


def lay_out(inputs: dict[str, torch.Tensor], together: int | None = None) -> dict[str, Any]:
    """A padded batch as one row: of each group of rows their common prefix, then the rest of each row.

    Args:
        inputs: input_ids, attention_mask and labels, each (rows, longest), padded on the right.
        together: rows of a group, such as the 2 of a pair; None: all rows are one group.

    Returns:
        input_ids, position_ids, labels and row_of, each (1, tokens); `row_of` is the number of the row that a token
        belongs to. A label stands where its token does; the first token of a rest bears none: what stands before it is
        another row's. `segments` is for the attention: (tokens of the prefix, rows, tokens of each rest) of a group.
    """
    parts: dict[str, list[torch.Tensor]] = {"input_ids": [], "position_ids": [], "labels": [], "row_of": []}
    segments = []
    rows = len(inputs["input_ids"])
    for start in range(0, rows, together or rows):
        ids, mask, labels = (
            inputs[name][start : start + (together or rows)] for name in ("input_ids", "attention_mask", "labels")
        )
        if together:  # of like length, but not as long as the batch
            longest = int(mask.sum(1).max())
            ids, mask, labels = ids[:, :longest], mask[:, :longest], labels[:, :longest]
        prefix = _common_prefix(ids, mask, labels)
        count, longest = ids.shape
        positions = torch.arange(longest, device=ids.device)
        numbers = torch.arange(start, start + count, device=ids.device)
        for name, first, rest in (
            ("input_ids", ids[0, :prefix], ids[:, prefix:]),
            ("position_ids", positions[:prefix], positions[prefix:].repeat(count, 1)),
            ("labels", labels[0, :prefix], labels[:, prefix:]),
            ("row_of", numbers[:1].repeat(prefix), numbers.unsqueeze(1).repeat(1, longest - prefix)),
        ):
            parts[name] += [first, rest.flatten()]
        segments.append((prefix, count, longest - prefix))
    return {name: torch.cat(tensors).unsqueeze(0) for name, tensors in parts.items()} | {"segments": segments}


def _common_prefix(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> int:
    """Tokens that all rows begin with, up to the last before any that is trained, and within the shortest row."""
    if len(ids) < 2:
        return 0
    shared = (ids == ids[0]).all(0) & (labels == NOT_TRAINED).all(0) & mask.bool().all(0)
    prefix = int(shared.long().cumprod(0).sum())
    while prefix and (prefix == ids.shape[1] or (labels[:, prefix] != NOT_TRAINED).any()):
        prefix -= 1
    return prefix


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: list[tuple[int, int, int]] | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within a prefix, and of each rest to its prefix and to itself.

    Args:
        query: (1, heads, tokens, width); key and value: (1, heads or a divisor of them, tokens, width). Without
            `segments` there may be several in the place of the 1.
        segments: as `lay_out` gives them. None: rows padded on the right, no batch that `lay_out` made.

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

    if segments is None:
        return attend(query, key, value).transpose(1, 2).contiguous(), None
    found, start = [], 0
    for prefix, rows, rest in segments:
        end = start + prefix + rows * rest
        own = [states[:, :, start : start + prefix] for states in (query, key, value)]
        q, k, v = (
            states[0, :, start + prefix : end].unflatten(1, (rows, rest)).transpose(0, 1)
            for states in (query, key, value)
        )
        start, mask = end, None
        if prefix:
            found.append(attend(*own)[0].transpose(0, 1))
            k, v = (
                torch.cat((shared.expand(rows, -1, -1, -1), states), 2)
                for shared, states in zip(own[1:], (k, v), strict=True)
            )
            mask = torch.ones(rest, prefix + rest, dtype=torch.bool, device=q.device).tril(prefix)
        found.append(attend(q, k, v, mask).transpose(1, 2).flatten(0, 1))
    return torch.cat(found).unsqueeze(0), None


def _has_flash(query: torch.Tensor) -> bool:
    """Whether FlashAttention takes queries of this kind, with gradients, on all GPUs from Ampere on."""
    return query.dtype.itemsize == 2 and query.shape[-1] <= 192 and torch.cuda.get_device_capability() >= (8, 0)
