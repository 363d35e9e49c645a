"""`summary`: the result of the last `dvc repro` on one screen."""

import argparse
from pathlib import Path
from typing import Any

from fine_tuning.common.dvc_files import LOCK, locked_md5, md5_path, read_lock
from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import COMPARISON, EVALUATION
from fine_tuning.common.records import read_json, read_object
from fine_tuning.evaluation.looks import looked_at
from fine_tuning.evaluation.records.record_types import COUNTING
from fine_tuning.evaluation.report.report import quantised_as
from fine_tuning.schema.reasons import in_words

PREPARED, PACKAGE = Path("metrics/prepare.json"), Path("metrics/package.json")
ADAPTER = Path("models/adapter/adapter_model.safetensors")
MODELFILE = Path("models/package/Modelfile")
PAGES = (Path("metrics/report.html"), Path("metrics/side_by_side.md"))
ORDER = (
    "perplexity", "nll_per_byte", "token_accuracy", "prompt_help", "general_knowledge", "general_text", "bleu", "chrf",
    "rouge1", "rouge2", "rougeL", "exact_match",
)  # fmt: skip
GUARDS = ("prompt_help", "general_knowledge", "general_text")
COLOURS = {"PROMOTE": "green", "HOLD": "red", "INCONCLUSIVE": "yellow"}


def summary(arguments: argparse.Namespace) -> None:
    """Print the metrics that decide, or all, the verdict with its reasons, and what to type next."""
    from rich.console import Console

    evaluation, comparison = read_result(EVALUATION), looked_at(read_result(COMPARISON))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    decide = {comparison["primary"]["metric"], *comparison["secondary"], *GUARDS}
    shown = {name for name in evaluation["candidate"] if arguments.all or name in decide or "/" in name}
    metrics = sorted(shown, key=place)
    console.print(metric_table(evaluation, comparison, metrics))
    verdict = comparison["verdict"]
    colour = COLOURS.get(verdict, "default")
    for row in comparison.get("prompting_baselines", {}).values() if arguments.all else ():
        value, metric = with_interval(row, "difference", "+"), comparison["primary"]["metric"]
        console.print(f"{row['what']}: {metric} {row['baseline']:.3g}, candidate {value} on {row['n']}", markup=False)
    for line in in_words(read_object(PREPARED))[: None if arguments.all else 1]:
        console.print(line, markup=False)
    package = read_object(PACKAGE)
    if taken := quantised_as(package):
        row, count = package["quantisations"][taken], len(package["quantisations"])
        cost = f"{row['bytes'] / 1e6:.1f} MB, perplexity {row['perplexity_increase']:+.1%}"
        console.print(f"GGUF in {taken}: {cost}, the smallest of {count} within the bounds", markup=False)
    if len(metrics) < len(evaluation["candidate"]):
        console.print("`summary --all` prints the other metrics and what was left out", markup=False)
    console.print(f"Verdict: [bold {colour}]{verdict}[/]")
    for reason in [*outdated(), *comparison["reasons"]]:
        console.print(f"  - {reason}", markup=False)
    console.print()
    for label, text in next_steps("champion" if comparison.get("champion") else verdict):
        console.print(f"{label:<22}{text}", markup=False, soft_wrap=True)


def outdated() -> list[str]:
    """A note where part of the pipeline ran after `compare`, which read other files by its entry in dvc.lock."""
    compared = {"compare": read_lock().get("compare", {})} if LOCK.is_file() else {}
    locked = {path: locked_md5(compared, path, "deps") for path in (PREPARED, EVALUATION, ADAPTER)}
    changed = [str(path) for path, md5 in locked.items() if md5 and path.is_file() and md5_path(path) != md5]
    return [f"of an earlier run: {', '.join(changed)} changed since; `dvc repro` compares again"] if changed else []


def read_result(path: Path) -> dict[str, Any]:
    try:
        return {} | read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`") from None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: `dvc repro` writes it again") from None


def metric_table(evaluation: dict[str, Any], comparison: dict[str, Any], metrics: list[str]) -> Any:
    """One row a metric: each contender with its interval, and the candidate's difference to its strongest baseline."""
    from rich.table import Table

    contenders = [name for name in ("base", "champion", "candidate") if name in evaluation]
    baseline = contenders[-2]
    suite = evaluation["suite"]
    table = Table(title=count_of(suite["conversations"], "held-out conversation"), title_justify="left")
    table.add_column("metric")
    for name in (*contenders, f"candidate - {baseline}"):
        table.add_column(name, justify="right")
    table.add_column("n", justify="right")
    others = comparison.get("other_tokens", [])
    if others:
        table.caption = "† in tokens of its own: not comparable with the other columns"
    for metric in metrics:
        found = [evaluation[name].get(metric) for name in contenders]
        marks = [" †" if name in others and metric in COUNTING else "" for name in contenders]
        difference = comparison["differences"].get(baseline, {}).get(metric)
        primary = " *" if metric == comparison["primary"]["metric"] else ""
        values = (with_interval(cell, "value") + mark for cell, mark in zip(found, marks, strict=True))
        cells = [f"{metric}{primary}", *values]
        table.add_row(*cells, with_interval(difference, "difference", "+"), str(evaluation["candidate"][metric]["n"]))
    return table


def place(metric: str) -> tuple[int, str]:
    """Sorting key: the metrics that people know first, then the others by name."""
    return (ORDER.index(metric) if metric in ORDER else len(ORDER), metric)


def with_interval(cell: dict[str, Any] | None, key: str, sign: str = "") -> str:
    """`9.21 (8.4 to 10.1)`, with a dash for what is undefined."""
    if cell is None or cell[key] is None:
        return "-"
    if cell["low"] is None:
        return f"{cell[key]:{sign}.3g}"
    return f"{cell[key]:{sign}.3g} ({cell['low']:{sign}.3g} to {cell['high']:{sign}.3g})"


def next_steps(verdict: str) -> list[tuple[str, str]]:
    """(label, path or command) lines after a verdict, or after "champion": the candidate is it already."""
    pages = [("Modelfile", MODELFILE)]
    pages += [("Report" if page.suffix == ".html" else "Replies side by side", page) for page in PAGES]
    # A clone has the numbers from git, and the files only after `dvc pull`.
    steps = [(label, str(page)) for label, page in pages if page.is_file()]
    if verdict == "champion":
        steps.append(("Put it on Ollama", "python -m fine_tuning deploy"))
    elif verdict == "PROMOTE":
        steps.append(("Make it the champion", "make promote"))
    else:
        steps.append(("Try other parameters", "dvc exp run -S train.epochs=2"))
    steps.append(("Talk to it", "make chat"))
    return steps
