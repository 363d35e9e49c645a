"""The defaults of learning rate and retention, chosen on the validation split: several seeds each, mean and spread.

    make repro && python -m benchmarks.learning_rate
    python -m benchmarks.learning_rate --rates 2.0e-3,2.0e-2 --retention 0,1,10 --seeds 1

Every run trains an adapter on data/prepared/train with the parameters of params.yaml but for the rate, the
weight of retention and the seed, and measures the loss on data/prepared/validation, and beside it what is left
of what the base knew: the mean probability of the right answer on the general questions, of which the verdict allows 5
points to be lost, and nats a byte of general text. The test split is not read. A seed decides the first weights of the
adapter and the order of the batches; with one seed two rates differ by chance as well, so the table has standard
deviations over the seeds.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.records.measurements import nats_per_byte, right_probability
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge, reading, text_items
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.schema.chat_format import ChatSettings, load_tokenizer
from fine_tuning.schema.prepared import PreparedRow, read_rows
from fine_tuning.training.lora_trainer import train_adapter
from fine_tuning.training.settings import TrainSettings

BASE = Path("models/base")
TRAIN, VALIDATION = Path("data/prepared/train"), Path("data/prepared/validation")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="5.0e-4,1.0e-3,2.0e-3,4.0e-3")
    parser.add_argument("--retention", default="0")
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    rates, weights = ([float(value) for value in each.split(",")] for each in (arguments.rates, arguments.retention))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    settings = read_params("train", TrainSettings)
    # Seeds outside, so that a run that is cut off has measured every rate equally often.
    found: dict[tuple[float, float], list[tuple[float, ...]]] = {}
    for seed in seeds:
        for rate, weight in product(rates, weights):
            changes = {"learning_rate": rate, "retention": weight, "seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(settings.model_copy(update=changes), read_rows(TRAIN), Path(folder) / "adapter")
            found.setdefault((rate, weight), []).append(measured)
            said = ", ".join(f"{value:.4f}" for value in measured)
            print(f"seed {seed}, learning rate {rate:.1e}, retention {weight:g}: {said}", file=sys.stderr, flush=True)
    print("| learning rate | retention | validation loss | general knowledge | general text | seeds |")
    print("|---|---|---|---|---|---|")
    for (rate, weight), runs in found.items():
        print(f"| {rate:.1e} | {weight:g} | {' | '.join(map(spread, zip(*runs, strict=True)))} | {len(runs)} |")


def measure(
    settings: TrainSettings, rows: Sequence[PreparedRow], output: Path, start_from: Path | None = None
) -> tuple[float, float, float]:
    """Train an adapter into the folder `output`.

    Returns:
        Loss of the validation split (nats a trained token), mean probability of right answers, and nats a byte of
        general text.
    """
    evaluate, chat = read_params("evaluate", EvaluateSettings), read_params("chat", ChatSettings)
    tokenizer = load_tokenizer(BASE)
    questions, texts = general_items(tokenizer, chat.system_prompt, chat.max_length), text_items(tokenizer)
    name, validation, checkpoints = read_base_card(BASE)["model"], read_rows(VALIDATION), output.with_suffix(".saved")
    result = train_adapter(BASE, name, rows, validation, settings, output, checkpoints, start_from=start_from)
    with loaded(BASE, scoring_hardware(evaluate.threads), output) as model:
        known = knowledge("candidate", questions, likelihoods(model, questions, evaluate.batch_tokens))
        read = reading("candidate", texts, likelihoods(model, texts, evaluate.batch_tokens))
    means = statistics.mean(map(right_probability, known)), statistics.mean(map(nats_per_byte, read))
    return result.validation_loss, *means


def spread(values: tuple[float, ...]) -> str:
    """`1.832 ± 0.004`: mean and standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
