"""`package.quantisation: auto`: the smallest GGUF that stays within the bounds, measured in llama.cpp."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import cores
from fine_tuning.model_management.packaging.model_package import (
    PackageSettings,
    Quantisation,
    load_float32,
    log_probabilities,
    measure_predictions,
    reply_passages,
    sample_evenly,
    write_weights,
)
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import ChatSettings
from fine_tuning.schema.prepared import PreparedRow

CHOICES: tuple[Quantisation, ...] = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
TIMED_TOKENS = 64


def choose_quantisation(
    merged_dir: Path,
    package_dir: Path,
    conversations: Sequence[PreparedRow],
    train: Path,
    settings: PackageSettings,
    chat: ChatSettings,
    converter: str | None = None,
) -> tuple[PackageSettings, dict[Quantisation, dict[str, float]]]:
    """The settings with the smallest of CHOICES that stays within `package.parity`, and what each was measured at.

    Measured are bytes, tokens/s of a reply, mean KL (nats) and agreement with the merged model on the beginnings of
    validation replies, and by how much their perplexity is larger than the merged model's, as a fraction. Raises
    UserError if none stays within the bounds, or llama.cpp's quantiser is missing.
    """
    if not conversations:
        raise UserError("there is no prepared conversation to choose a quantisation on: run `dvc repro prepare`")
    parity = settings.parity
    measured: dict[Quantisation, dict[str, float]] = {}
    passages = reply_passages(sample_evenly(conversations, parity.conversations), parity.positions)
    reference = log_probabilities(load_float32(merged_dir), passages)
    targets = [token for passage in passages for token in passage.ids[passage.start :]]
    merged = float(reference[range(len(targets)), targets].mean())
    for kind in CHOICES:
        with TemporaryDirectory(dir=package_dir.parent) as folder:
            path = Path(folder) / "model.gguf"
            write_weights(merged_dir, path, settings.model_copy(update={"quantisation": kind}), train, converter)
            context, threads = max(chat.max_length, 512) + 64, settings.threads or cores()
            with LlamaEngine(path, context=context, threads=threads) as engine:
                found = measure_predictions(engine, passages, reference)
                scores = [
                    engine.score(passage.ids[: passage.start], passage.ids[passage.start :]) for passage in passages
                ]
                mean = sum(score.logprob for row in scores for score in row) / len(targets)
                measured[kind] = {
                    "bytes": path.stat().st_size,
                    "tokens_per_second": _speed(engine, passages[0].ids[: passages[0].start]),
                    "mean_kl": found["mean_kl"],
                    "top1": found["top1"],
                    "perplexity_increase": math.exp(merged - mean) - 1,
                }
    good = [
        kind
        for kind in CHOICES
        if measured[kind]["mean_kl"] <= parity.max_kl.get(kind, 0)
        and measured[kind]["top1"] >= parity.min_top1.get(kind, 1)
        and measured[kind]["perplexity_increase"] <= parity.max_perplexity_increase
    ]
    if not good:
        raise UserError(
            f"none of {', '.join(CHOICES)} stays within the bounds of package.parity: set package.quantisation to F16, "
            "or raise a bound"
        )
    smallest = min(good, key=lambda kind: measured[kind]["bytes"])
    return settings.model_copy(update={"quantisation": smallest}), measured


def _speed(engine: LlamaEngine, prompt: list[int]) -> float:
    """Tokens/s of a reply whose prompt llama.cpp has read already."""
    engine.complete(prompt, 1)
    start = time.perf_counter()
    reply = engine.complete(prompt, TIMED_TOKENS, ignore_eos=True)
    return len(reply.ids) / (time.perf_counter() - start)
