"""How often the verdict is wrong: simulations from the records of a real evaluation, printed as Markdown tables.

    python -m benchmarks.verdict                        # every simulation
    python -m benchmarks.verdict intervals own-words    # some of them; --list names them
    python -m benchmarks.verdict --runs 4000            # more runs of each: surer rates, more time

It needs the records of `dvc repro` (data/evaluation). Runs with the same seed print the same numbers.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fine_tuning.errors import UserError, run
from fine_tuning.evaluation.evaluate_settings import IntervalSettings
from fine_tuning.evaluation.metrics import load_metric
from fine_tuning.records import read_jsonl

MODULES = Path(__file__).parents[1] / "fine_tuning/evaluation/metric_modules"


@dataclass(frozen=True)
class Context:
    """What a simulation may use. `runs` is the number of simulated comparisons a row; `seed` makes them repeatable."""

    folder: Path
    runs: int
    seed: int
    intervals: IntervalSettings

    def rng(self, *keys: int) -> np.random.Generator:
        """A generator of its own for a simulation, or a row of one."""
        return np.random.default_rng([self.seed, *keys])

    def records(self, *contenders: str) -> list[dict[str, Any]]:
        """Lines of items.jsonl, of the contenders named (all if none is)."""
        lines = read_lines(self.folder / "items.jsonl")
        return [line for line in lines if not contenders or line["contender"] in contenders]


Row = dict[str, Any]
SIMULATIONS: dict[str, Callable[[Context], list[Row]]] = {}


def simulation(name: str) -> Callable[[Callable[[Context], list[Row]]], Callable[[Context], list[Row]]]:
    """Register a function that returns the rows of one table; its docstring stands above the table."""

    def register(function: Callable[[Context], list[Row]]) -> Callable[[Context], list[Row]]:
        SIMULATIONS[name] = function
        return function

    return register


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of the evaluation.

    Raises:
        UserError: there has been no evaluation.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro evaluate`, or `dvc pull` where it was made elsewhere")
    return list(read_jsonl(path))


def metrics(*names: str) -> list[Any]:
    """The metric modules of these names."""
    return [load_metric(name, MODULES) for name in names]


# -----------------------------------------------------------------------------
# output


def percent(share: float) -> str:
    """A rate with one decimal."""
    return f"{100 * share:.1f} %"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; columns in the order in which rows name them first."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="simulations to run; all if none is named")
    parser.add_argument("--list", action="store_true", help="name the simulations")
    parser.add_argument("--folder", type=Path, default=Path("data/evaluation"), help="records of an evaluation")
    parser.add_argument("--runs", type=int, default=1000, help="simulated comparisons a row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - SIMULATIONS.keys():
        raise UserError(f"no simulation is named {', '.join(sorted(unknown))}: choose from {', '.join(SIMULATIONS)}")
    if arguments.list:
        print("\n".join(SIMULATIONS))
        return
    intervals = IntervalSettings(draws=1000, confidence=0.95, seed=arguments.seed)
    context = Context(arguments.folder, arguments.runs, arguments.seed, intervals)
    for name in arguments.names or SIMULATIONS:
        text = " ".join((SIMULATIONS[name].__doc__ or "").split())
        print(f"\n**{name}.** {text}\n\n{markdown(SIMULATIONS[name](context))}", flush=True)


if __name__ == "__main__":
    run(main)
