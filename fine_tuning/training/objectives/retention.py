"""Retention of what the base knew: on general text the model stays near the base's predictions.

The term is the Kullback-Leibler divergence of the model from the base, a token, as in learning without forgetting (Li
and Hoiem 2016) with the base as the teacher. The texts beside this file were written for this project and share nothing
with those that `evaluate` measures forgetting on. The base's predictions are computed once, before training.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fine_tuning.common.records import read_jsonl
from fine_tuning.schema.chat_format import encode_conversation, load_tokenizer
from fine_tuning.schema.prepared import batch_by_tokens, collate
from fine_tuning.training.objectives.objective import Batch

TEXTS = Path(__file__).with_name("retention_texts.jsonl")
LIKELIEST = 64  # tokens of which the base's probability is kept; the others count as one


@dataclass(frozen=True, eq=False)
class GeneralText:
    """A text with the base's predictions: of each position the `LIKELIEST` next tokens and their log-probabilities."""

    id: str
    input_ids: list[int]
    labels: list[int]
    likeliest: torch.Tensor  # (tokens - 1, LIKELIEST), ids
    log_probabilities: torch.Tensor  # (tokens - 1, LIKELIEST), nats


def general_texts(base: Path, model: Any, max_length: int) -> list[GeneralText]:
    """Every text with the predictions of `model`, the base without an adapter; those of at most `max_length` tokens."""
    tokenizer, found = load_tokenizer(base), []
    for number, text in enumerate(read_jsonl(TEXTS)):
        if "prompt" in text:
            said = [{"role": "user", "content": text["prompt"]}, {"role": "assistant", "content": text["text"]}]
            ids = encode_conversation(tokenizer, said, None, max_length).input_ids
        else:
            ids = tokenizer(text["text"])["input_ids"]
        if 1 < len(ids) <= max_length:
            found.append(_with_predictions(model, f"general-{number}", ids))
    return found


@torch.no_grad()
def _with_predictions(model: Any, name: str, ids: list[int]) -> GeneralText:
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float()
    values, likeliest = logits.log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1] - 1))
    return GeneralText(name, ids, ids, likeliest.cpu(), values.cpu())


@dataclass
class Retention:
    """`weight` times the mean divergence (nats a token) from the base, which each batch of another objective is given.

    Both are in one step: apart, clipping would give them the same length whatever the weight.
    """

    texts: Sequence[GeneralText]
    weight: float
    pad_token_id: int

    def beside(self, batches: list[list[Any]], budget: int) -> list[list[Any]]:
        """The batches, each followed by texts of at most a quarter of `budget` tokens, at least one."""
        texts = batch_by_tokens(self.texts, budget // 4)  # type: ignore[type-var]
        random.Random(0).shuffle(texts)
        return [batch + texts[number % len(texts)] for number, batch in enumerate(batches)]

    def collate(self, items: Sequence[GeneralText]) -> Batch:
        """input_ids, attention_mask and labels as of rows; `likeliest` and `log_probabilities`, padded with 0."""
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return collate(items, self.pad_token_id) | {
            "likeliest": padded([item.likeliest for item in items]),
            "log_probabilities": padded([item.log_probabilities for item in items]),
        }

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Divergence (nats), summed over the positions."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        there = inputs["attention_mask"][:, 1:].bool()
        known = inputs["log_probabilities"][there]
        ours = logits[there].float().log_softmax(-1).gather(-1, inputs["likeliest"][there])
        return (known.exp() * (known - ours)).sum() + _of_rest(known, ours).sum()


def _of_rest(known: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The term of all other tokens, which count as one."""
    least = torch.finfo(known.dtype).eps
    base, model = ((1 - values.exp().sum(-1)).clamp(min=least) for values in (known, ours))
    return base * (base.log() - model.log())
