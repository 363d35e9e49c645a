"""What all rows of a batch begin with is computed once, and every row goes on from it: the same loss, in less time.

Chats begin with the same system prompt, a third of the tokens of short ones. Keys and values there depend on nothing
that comes later, so the rows of a batch can share them, as servers do at inference (Yao et al. 2024, "DeFT", for trees
of continuations). Gradients add up at what is shared, as they would over copies of it.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fine_tuning.training.training_utils import IGNORED_LABEL

NAME = "shared_prefix"
LARGEST_DIFFERENCE = 1e-3  # of logits in float32; another order of additions makes a few millionths
LARGEST_ROUNDING = 8  # units of the last place of the largest logit, in shorter formats


def share_prefixes(model: Any, longest: int) -> bool:
    """Let the attention of a model read batches that `lay_out` made; False, and no change, where it cannot.

    A model that limits attention to a window shorter than the `longest` row (tokens) is left as it is, and so is one
    whose logits for two short rows are not the same in both forms. Batches that are padded on the right it reads as
    before, without a mask: attention is causal, so no token sees the padding after it.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and window < longest:
        return False
    before = model.config._attn_implementation
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]], device=next(model.parameters()).device)
    mask = torch.ones_like(ids)
    labels = torch.where(torch.arange(4) < 3, IGNORED_LABEL, ids.cpu()).to(ids.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 2:].flatten(0, 1)
        try:
            model.set_attn_implementation(NAME)
            laid_out = lay_out({"input_ids": ids, "attention_mask": mask, "labels": labels})
            labels = laid_out.pop("labels")
            found = model(**laid_out).logits[0, 2:]
        except (TypeError, ValueError, RuntimeError):
            found = None
    model.train(was_training)
    unit = torch.finfo(expected.dtype).eps * expected.abs().max()
    allowed = max(LARGEST_DIFFERENCE, LARGEST_ROUNDING * float(unit))
    if found is not None and labels.shape == (1, 6) and (found - expected).abs().max() < allowed:
        return True
    model.set_attn_implementation(before)
    return False


def lay_out(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A padded batch as one row: what all rows begin with, then the rest of each.

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
        shared = (ids == ids[0]).all(0) & (labels == IGNORED_LABEL).all(0) & inputs["attention_mask"].bool().all(0)
        prefix = int(shared.long().cumprod(0).sum())
        while prefix and (prefix == longest or (labels[:, prefix] != IGNORED_LABEL).any()):
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
        query: (1, heads, tokens, width); key and value: (1, heads or a divisor of them, tokens, width).
        prefix: tokens that all rows begin with.
        rows: how many rests of one length follow them. None: no batch that `lay_out` made.

    Returns:
        (1, tokens, heads, width), and no weights.
    """
    if rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **arguments
        )
    grouped = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}

    def rests(states: torch.Tensor) -> torch.Tensor:
        return states[0, :, prefix:].unflatten(1, (rows, -1)).transpose(0, 1)

    q, k, v = rests(query), rests(key), rests(value)
    if not prefix:
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        return found.transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    first = [states[:, :, :prefix] for states in (query, key, value)]
    own = functional.scaled_dot_product_attention(*first, is_causal=True, **grouped)
    k, v = (
        torch.cat((shared.expand(rows, -1, -1, -1), rest), 2) for shared, rest in zip(first[1:], (k, v), strict=True)
    )
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
    found = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, **grouped)
    return torch.cat((own[0].transpose(0, 1), found.transpose(1, 2).flatten(0, 1))).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
