"""Rounds on growing data: every round trained from the base, against every round continued from the one before.

    make repro && python -m benchmarks.start_from [--rounds 10] [--tokens 10000] [--retention 0]

Round k of n trains on the first k/n of that many tokens of the training split (all if left out), as `dvc repro` does
when conversations arrive: once as a new adapter, and once with `train.start_from`, the adapter of round k - 1. Printed
for both after each round: the loss of the validation split, the mean probability of the right answers to the general
questions, nats a byte of general text.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.learning_rate import TRAIN, measure
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.learning_curve import share
from fine_tuning.schema.prepared import read_rows
from fine_tuning.training.settings import TrainSettings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, help="of the last round; all if left out")
    parser.add_argument("--retention", type=float, default=0.0)
    arguments = parser.parse_args()
    # The loss of the end is what counts; measuring it on the way takes a third of the time.
    changes = {"retention": arguments.retention, "validations": 1}
    settings, rows = read_params("train", TrainSettings).model_copy(update=changes), read_rows(TRAIN)
    if arguments.tokens:
        rows = share(rows, arguments.tokens / sum(len(row.input_ids) for row in rows))
    print("| round | conversations | trained from | validation loss | general knowledge | general text |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        last: Path | None = None
        for number in range(1, arguments.rounds + 1):
            some = share(rows, number / arguments.rounds)
            place = Path(folder) / str(number)
            place.mkdir()
            found = {"the base": measure(settings, some, place / "new")}
            # The first round has nothing to go on from: both are the same.
            found["the round before"] = (
                measure(settings, some, place / "continued", last) if last else found["the base"]
            )
            last = place / ("continued" if last else "new")
            for start, values in found.items():
                print(f"| {number} | {len(some)} | {start} | {' | '.join(f'{v:.3f}' for v in values)} |", flush=True)


if __name__ == "__main__":
    main()
