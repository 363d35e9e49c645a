"""`experiments`: what was tried, as a table and as one drawing of the validation losses; neither needs the net."""

import argparse
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import root, run_command
from fine_tuning.common.records import csv_pairs
from fine_tuning.evaluation.report.charts import curves, number, standalone
from fine_tuning.integration.runs_view import Line, dvc_lines, record_lines

CURVE = "metrics/plots/validation_loss.csv"
DRAWING = Path("metrics/experiments.svg")
METRICS = {
    "validation loss": "train.validation_loss",
    "perplexity": "evaluation.candidate.perplexity.value",
    "verdict": "comparison.verdict",
}


def experiments(arguments: argparse.Namespace) -> None:
    """Print workspace, commits and experiments, the best first, and draw their validation losses by step."""
    from rich.console import Console

    lines = finished_first(dvc_lines(root()))
    if not any(line.kind == "experiment" for line in lines):
        raise UserError("there is no experiment yet: `dvc exp run -S train.learning_rate=5.0e-4` makes one")
    record_lines(lines)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table(lines))
    losses = {line.name: curve for line in lines if (curve := loss_curve(line))}
    if losses:
        DRAWING.write_text(standalone(curves(losses, "step"), "Validation loss"))
        console.print(f"{'Losses by step':<22}{DRAWING}", markup=False, soft_wrap=True)


def finished_first(lines: list[Line]) -> list[Line]:
    """Each line once, by its validation loss; last what has none."""
    by_name = {line.name: line for line in reversed(lines)}
    return sorted(by_name.values(), key=lambda line: line.metrics.get(METRICS["validation loss"], float("inf")))


def table(lines: list[Line]) -> Any:
    """One row a line: its name, the parameters that are not the same in all, its metrics, how far it has come. The
    parameters share a column, each on a line of its own: a table of 80 columns can be read."""
    from rich.table import Table

    varied = varied_parameters(lines)
    shown = Table(show_lines=True)
    for name in ("experiment", "parameters"):
        shown.add_column(name, overflow="fold")
    for name in (*METRICS, "state"):
        shown.add_column(name, justify="right")
    for line in lines:
        parameters = "\n".join(f"{name} {line.params.get(name, '-')}" for name in varied)
        measured = [line.metrics.get(key) for key in METRICS.values()]
        cells = [number(value) if isinstance(value, float) else str(value or "-") for value in measured]
        shown.add_row(line.name.replace(" ", "\n"), parameters, *cells, line.status)
    return shown


def varied_parameters(lines: list[Line]) -> list[str]:
    """Names of the parameters that differ between any two lines."""
    names = sorted({name for line in lines for name in line.params})
    return [name for name in names if len({str(line.params.get(name)) for line in lines}) > 1]


def loss_curve(line: Line) -> list[tuple[float, float]]:
    """(step, validation loss) pairs as the line's commit has them; none where it has not come so far."""
    if not line.metrics:
        return []
    try:
        show = "git", "show", f"{line.name.split()[-1]}:{CURVE}"
        text = Path(CURVE).read_text() if line.kind == "workspace" else run_command(*show)
    except (FileNotFoundError, UserError):
        return []
    return csv_pairs(text, "step", "validation_loss")
