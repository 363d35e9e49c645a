"""What one model makes of the suite: how likely it finds the references, and what it replies itself."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fine_tuning.evaluation.records.record_types import Item, Likelihood, Reply, finite
from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.hardware import Hardware, detect_hardware
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import batch_by_tokens, collate

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LEAST_SHARED = 8  # tokens: below that, computing a common beginning once saves nothing


def scoring_hardware(threads: int | None) -> Hardware:
    """bfloat16 on NVIDIA's or Intel's GPU that computes in it, else float32: scores are then the same on any CPU."""
    found = detect_hardware("auto", threads)
    return found if found.device in ("cuda", "xpu") else replace(found, precision="float32")


@contextlib.contextmanager
def loaded(folder: Path, hardware: Hardware, adapter: Path | None = None) -> Iterator["PreTrainedModel"]:
    """A model folder in memory, with an adapter merged into it, ready to score. Raises UserError if the folder holds no
    model that transformers can load."""
    import torch

    torch.set_num_threads(hardware.threads)
    model = load_model(folder, getattr(torch, hardware.precision))
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    try:
        yield model.to(hardware.device).eval()
    finally:
        del model
        if hardware.device != "cpu":
            torch.accelerator.empty_cache()


def likelihoods(
    model: "PreTrainedModel", items: Sequence[Item], batch_tokens: int, on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """Teacher-forced scores of the items' replies, in the order of `items`.

    Batches hold items of like length and at most `batch_tokens` padded tokens. What all items begin with, such as a
    system prompt, is computed once. The output head sees the positions before replies alone. Sums are taken in float64,
    so that the order of batches does not show.
    """
    import torch
    from torch.nn import functional

    found: dict[str, Likelihood] = {}
    positions: list[torch.Tensor] = []

    def select(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][positions[-1]].unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with torch.inference_mode():
            shared = shared_beginning(items)
            positions[:] = [torch.zeros((1, len(shared)), dtype=torch.bool)]
            beginning = computed_once(model, shared)
            start = len(shared) if beginning is not None else 0
            for batch in batch_by_tokens(items, batch_tokens):
                tensors = {name: tensor.to(model.device) for name, tensor in collate(batch, 0).items()}
                labels = tensors["labels"][:, start + 1 :]
                wanted = torch.zeros_like(tensors["labels"][:, start:], dtype=torch.bool)
                wanted[:, :-1] = labels != NOT_TRAINED
                positions[:] = [wanted]
                logits = model(
                    input_ids=tensors["input_ids"][:, start:],
                    attention_mask=tensors["attention_mask"],
                    past_key_values=repeated(beginning, len(batch)),
                ).logits[0]
                targets = labels[wanted[:, :-1]]
                nll = functional.cross_entropy(logits.float(), targets, reduction="none").double().cpu()
                first = (logits.argmax(dim=-1) == targets).cpu()
                taken = 0
                for item in batch:
                    turns = []
                    for begin, end in item.runs:
                        part = slice(taken, taken + end - begin)
                        turns.append((finite(float(nll[part].sum())), end - begin, int(first[part].sum())))
                        taken = part.stop
                    found[item.id] = turns
                if on_done is not None:
                    on_done(len(batch))
    finally:
        hook.remove()
    return [found[item.id] for item in items]


def shared_beginning(items: Sequence[Item]) -> list[int]:
    """The tokens that all items begin with, up to the one before the first reply."""
    if len(items) < 2:
        return []
    prompts = [item.input_ids[: item.runs[0][0] - 1] for item in items]
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]


def computed_once(model: "PreTrainedModel", ids: Sequence[int]) -> "Cache | None":
    """Keys and values of a beginning; None where it is too short to matter or the model keeps something else."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if len(ids) < LEAST_SHARED:
        return None
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None  # windows and states that cannot be repeated for a batch
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def repeated(cache: "Cache | None", rows: int) -> "Cache | None":
    """A copy of a beginning for each row of a batch."""
    if cache is None:
        return None
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    return own


def quantised_likelihoods(
    engine: LlamaEngine, items: Sequence[Item], on_done: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """The same for a GGUF in llama.cpp, token by token: slow, and exactly what will be served."""
    pairs = [(item.input_ids[:start], item.input_ids[start:end]) for item in items for start, end in item.runs]
    scores = iter(engine.score_many(pairs, on_done))
    return [
        [
            (finite(-sum(score.logprob for score in turn)), len(turn), sum(score.first for score in turn))
            for turn in (next(scores) for _ in item.runs)
        ]
        for item in items
    ]


# -----------------------------------------------------------------------------
# replies


def replies(
    engine: LlamaEngine, prompts: Sequence[Sequence[int]], max_tokens: int, on_done: Callable[[int], None] | None = None
) -> list[Reply]:
    """Greedy replies to prompts of token ids, capped at `max_tokens`."""
    done = engine.complete_many(prompts, max_tokens, on_done)
    return [Reply(completion.text.strip(), len(completion.ids), completion.finished) for completion in done]
