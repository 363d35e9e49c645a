"""The default learning rate, chosen on the validation split: several rates, several seeds each, mean and spread.

    make repro && python -m benchmarks.learning_rate [--rates 5.0e-4,1.0e-3,2.0e-3] [--seeds 1,2,3]

Every run trains an adapter on data/prepared/train.parquet with the parameters of params.yaml but for the rate and the
seed, and measures the loss on data/prepared/validation.parquet. The test split is not read. A seed decides the first
weights of the adapter and the order of the batches; with one seed two rates differ by chance as well, so the table has
the standard deviation over the seeds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from fine_tuning.settings import read_params
from fine_tuning.training.base_model import read_base_card
from fine_tuning.training.lora_trainer import train_adapter
from fine_tuning.training.training_utils import TrainSettings, read_rows

BASE = Path("models/base")
TRAIN, VALIDATION = Path("data/prepared/train.parquet"), Path("data/prepared/validation.parquet")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="5.0e-4,1.0e-3,2.0e-3")
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    settings = read_params("train", TrainSettings)
    # Seeds outside, so that a run that is cut off has measured every rate equally often.
    losses: dict[float, list[float]] = {rate: [] for rate in rates}
    for seed in seeds:
        for rate in rates:
            losses[rate].append(validation_loss(settings.model_copy(update={"learning_rate": rate, "seed": seed})))
            print(f"seed {seed}, learning rate {rate:.1e}: validation loss {losses[rate][-1]:.4f}", file=sys.stderr)
    print("| learning rate | validation loss, mean | standard deviation | seeds |")
    print("|---|---|---|---|")
    for rate, found in losses.items():
        spread = f"{statistics.stdev(found):.4f}" if len(found) > 1 else "-"
        print(f"| {rate:.1e} | {statistics.mean(found):.4f} | {spread} | {len(found)} |")


def validation_loss(settings: TrainSettings) -> float:
    """Mean loss of the validation split, nats a trained token, after one training run."""
    name = read_base_card(BASE)["model"]
    with tempfile.TemporaryDirectory() as folder:
        output, checkpoints = Path(folder) / "adapter", Path(folder) / "checkpoints"
        rows, validation = read_rows(TRAIN), read_rows(VALIDATION)
        return train_adapter(BASE, name, rows, validation, settings, output, checkpoints).validation_loss


if __name__ == "__main__":
    main()
