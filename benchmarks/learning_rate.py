"""The default learning rate, chosen on the validation split: several rates, several seeds each, mean and spread.

    make repro && python -m benchmarks.learning_rate [--rates 5.0e-4,1.0e-3,2.0e-3,4.0e-3] [--seeds 1,2,3]

Every run trains an adapter on data/prepared/train.parquet with the parameters of params.yaml but for the rate and the
seed, and measures the loss on data/prepared/validation.parquet, and beside it what is left of general knowledge: the
mean probability of the right answer on the general questions, of which the verdict allows 5 points to be lost. The test
split is not read. A seed decides the first weights of the adapter and the order of the batches; with one seed two rates
differ by chance as well, so the table has standard deviations over the seeds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.learning_curve import score_adapter
from fine_tuning.evaluation.records.measurements import right_probability
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.schema.chat_format import ChatSettings, load_tokenizer
from fine_tuning.schema.prepared import read_rows
from fine_tuning.training.lora_trainer import train_adapter
from fine_tuning.training.settings import TrainSettings

BASE = Path("models/base")
TRAIN, VALIDATION = Path("data/prepared/train.parquet"), Path("data/prepared/validation.parquet")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="5.0e-4,1.0e-3,2.0e-3,4.0e-3")
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    settings = read_params("train", TrainSettings)
    # Seeds outside, so that a run that is cut off has measured every rate equally often.
    found: dict[float, list[tuple[float, float]]] = {rate: [] for rate in rates}
    for seed in seeds:
        for rate in rates:
            loss, known = measure(settings.model_copy(update={"learning_rate": rate, "seed": seed}))
            found[rate].append((loss, known))
            said = f"seed {seed}, learning rate {rate:.1e}: validation loss {loss:.4f}, general knowledge {known:.4f}"
            print(said, file=sys.stderr, flush=True)
    print("| learning rate | validation loss | general knowledge | seeds |")
    print("|---|---|---|---|")
    for rate, measured in found.items():
        print(f"| {rate:.1e} | {' | '.join(map(spread, zip(*measured, strict=True)))} | {len(measured)} |")


def measure(settings: TrainSettings) -> tuple[float, float]:
    """Loss of the validation split, nats a trained token, and mean probability of right answers, after one training."""
    evaluate, chat = read_params("evaluate", EvaluateSettings), read_params("chat", ChatSettings)
    questions = general_items(load_tokenizer(BASE), chat.system_prompt, chat.max_length)
    name, rows, validation = read_base_card(BASE)["model"], read_rows(TRAIN), read_rows(VALIDATION)
    with tempfile.TemporaryDirectory() as folder:
        output, checkpoints = Path(folder) / "adapter", Path(folder) / "checkpoints"
        result = train_adapter(BASE, name, rows, validation, settings, output, checkpoints)
        scores = score_adapter(BASE, output, questions, evaluate.batch_tokens, evaluate.threads)
    known = [right_probability(line) for line in knowledge("candidate", questions, scores)]
    return result.validation_loss, statistics.mean(known)


def spread(values: tuple[float, ...]) -> str:
    """`1.832 ± 0.004`: mean and standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
