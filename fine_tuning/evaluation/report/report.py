"""The verdict as one HTML file that needs no network: intervals as inline SVG, tables, replies side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fine_tuning.common.records import write_text
from fine_tuning.evaluation.records.record_types import COUNTING
from fine_tuning.evaluation.report.charts import curve, curves, frontier, interval_plot, number
from fine_tuning.evaluation.report.red_flags import red_flags
from fine_tuning.schema.reasons import in_words

EXAMPLES = 5  # largest wins, and as many losses
CONTENDERS = ("base", "champion", "candidate")


@dataclass(frozen=True)
class Findings:
    """All that the report shows.

    `comparison` and `evaluation` are the contents of the files of these names in metrics/, `records` the lines of
    items.jsonl, `answers` {"prompt", "replies": {contender: {"text", "finished"}}} for each test prompt, `slices` and
    `data_changes` what the functions of these names return (None: there is no champion to compare with),
    `learning_curve`, `preparation` and `training` the contents of metrics/learning_curve.json, prepare.json and
    train.json, `base` that of models/base/base.json, `losses` (step, nats a token) by name, `package` the content of
    metrics/package.json.
    """

    comparison: dict[str, Any]
    evaluation: dict[str, Any]
    records: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    slices: dict[str, Any] = field(default_factory=dict)
    data_changes: dict[str, Any] | None = None
    learning_curve: dict[str, Any] = field(default_factory=lambda: {"points": []})
    preparation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    package: dict[str, Any] = field(default_factory=dict)


def write_report(path: Path, found: Findings) -> None:
    """Write the report of one comparison."""
    from fine_tuning.evaluation.verdict.judge import RATES  # imports PyTorch, which takes seconds

    comparison, suite = found.comparison, found.evaluation["suite"]
    table = {name: row for name, row in found.evaluation.items() if name != "suite"}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True,
        trim_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "interval_plot": lambda differences: Markup(interval_plot(differences)),
        "curve": lambda points: Markup(curve(points)),
        "curves": lambda series, label: Markup(curves(series, label)),
        "frontier": lambda kinds, taken: Markup(frontier(kinds, taken)),
        "one_reply": lambda item: (item[0], item[1]["text"], item[1]["finished"]),
        "one_record": lambda line: (line["contender"], line["predictions"], line["finished"]),
    }
    page = environment.get_template("report.html.jinja").render(
        comparison,
        COUNTING=COUNTING,
        RATES=RATES,
        evaluation=table,
        every_metric=list(dict.fromkeys(name for row in table.values() for name in row)),
        signatures=[f"{name}: {signature}" for name, signature in suite.get("signatures", {}).items()],
        suite=suite["sha256"],
        adapter=comparison.get("adapter_sha256", ""),
        slice_tables=[slice_table(dimension, names) for dimension, names in found.slices.items()],
        examples=extremes(found.records),
        answers=found.answers,
        preparation=list(in_words(found.preparation)),
        baseline=next(reversed(comparison["differences"]), "base"),
        base=found.base,
        training=found.training,
        flags=list(red_flags(comparison, table, found.records, found.answers)),
        losses=found.losses,
        quantisations=found.package.get("quantisations", {}),
        quantised_as=quantised_as(found.package),
        data_changes=found.data_changes,
        learning_curve=found.learning_curve,
    )
    write_text(path, page)


def quantised_as(package: dict[str, Any]) -> str | None:
    """The kind that `package.quantisation: auto` took of those measured, None where nothing was measured."""
    kinds = package.get("quantisations", {})
    return next((kind for kind, row in kinds.items() if row["bytes"] == package["gguf_bytes"]), None)


def slice_table(dimension: str, found: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> tuple[str, list, list, list]:
    """(dimension, contenders, rows of the likelihood, rows of every metric); a row is (slice, metric, cells)."""
    contenders = [name for name in CONTENDERS if any(name in row for row in found.values())]
    every = list(dict.fromkeys(metric for row in found.values() for cell in row.values() for metric in cell))

    def rows(metrics: Sequence[str]) -> list[tuple[str, str, list]]:
        cells = (
            (name, metric, [row.get(contender, {}).get(metric) for contender in contenders])
            for name, row in found.items()
            for metric in metrics
        )
        return [row for row in cells if any(row[2])]

    return dimension, contenders, rows([metric for metric in COUNTING if metric in every] or every[:1]), rows(every)


def extremes(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, each contender's record) of the largest gains and losses in likelihood a token against the base."""
    by_id: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in CONTENDERS}
    for line in records:
        if line["contender"] in by_id and "predictions" in line:
            by_id[line["contender"]][line["id"]] = line

    def gain(id: str) -> float:
        base, candidate = by_id["base"][id], by_id["candidate"][id]
        return (base["nll"] - candidate["nll"]) / base["tokens"]

    known = [
        id
        for id in by_id["base"].keys() & by_id["candidate"].keys()
        if all(by_id[name][id].get("nll") is not None for name in ("base", "candidate"))
    ]
    ranked = sorted(known, key=lambda id: (-gain(id), id))
    wins = [id for id in ranked[:EXAMPLES] if gain(id) > 0]
    losses = [id for id in ranked[::-1][:EXAMPLES] if gain(id) < 0]
    return [
        (f"{gain(id):+.2f} nats a token", [by_id[name][id] for name in CONTENDERS if id in by_id[name]])
        for id in (*wins, *losses)
    ]
