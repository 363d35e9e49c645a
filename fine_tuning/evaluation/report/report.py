"""The verdict as one HTML file that needs no network: intervals as inline SVG, tables, replies side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fine_tuning.common.errors import count_of
from fine_tuning.common.records import replacing
from fine_tuning.evaluation.report.charts import curve, interval_plot, number
from fine_tuning.schema.reasons import in_words

EXAMPLES = 5  # largest wins, and as many losses
CONTENDERS = ("base", "champion", "candidate")
COUNTING = ("perplexity", "token_accuracy")  # metrics that count tokens


@dataclass(frozen=True)
class Findings:
    """All that the report shows.

    `comparison` and `evaluation` are the contents of the files of these names in metrics/, `records` the lines of
    items.jsonl, `answers` {"prompt", "replies": {contender: {"text", "finished"}}} for each test prompt, `slices` and
    `data_changes` what the functions of these names return (None: there is no champion to compare with),
    `learning_curve` and `preparation` the contents of metrics/learning_curve.json and metrics/prepare.json.
    """

    comparison: dict[str, Any]
    evaluation: dict[str, Any]
    records: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    slices: dict[str, Any] = field(default_factory=dict)
    data_changes: dict[str, Any] | None = None
    learning_curve: dict[str, Any] = field(default_factory=lambda: {"points": []})
    preparation: dict[str, Any] = field(default_factory=dict)


def write_report(path: Path, found: Findings) -> None:
    """Write the report of one comparison."""
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
    }
    page = environment.get_template("report.html.jinja").render(
        comparison,
        COUNTING=COUNTING,
        evaluation=table,
        every_metric=list(dict.fromkeys(name for row in table.values() for name in row)),
        signatures=[f"{name}: {signature}" for name, signature in suite.get("signatures", {}).items()],
        suite=suite["sha256"],
        adapter=comparison.get("adapter_sha256", ""),
        prompting_lines=list(prompting_baselines(comparison)),
        quantising=quantising(comparison["quantisation"]),
        reference_lines=list(references(comparison)),
        slice_tables=[slice_table(dimension, names) for dimension, names in found.slices.items()],
        examples=extremes(found.records),
        answers=found.answers,
        forgetting_lines=list(forgetting(comparison)),
        prompt_help=prompt_help(comparison["prompt_help"]),
        memory_lines=list(memory(comparison["memory"])),
        privacy_lines=list(privacy(comparison["privacy"])),
        preparation=list(in_words(found.preparation)),
        data_changes=found.data_changes,
        learning_curve=found.learning_curve,
    )
    with replacing(path) as file:
        file.write(page.encode("utf-8", "replace"))


def prompting_baselines(comparison: dict[str, Any]) -> Iterator[str]:
    """What the base does with another prompt instead of training."""
    for row in comparison["prompting_baselines"].values():
        yield (
            f"{row['what']}: {comparison['primary']['metric']} {number(row['baseline'])}, the candidate "
            f"{number(row['candidate'])} on the same {count_of(row['n'], 'conversation')}, a difference of "
            f"{with_bounds(row)}"
        )


def quantising(found: dict[str, Any]) -> str:
    """One line on what the GGUF loses."""
    lost = found.get("perplexity_lost")
    if lost is None:
        return "The GGUF was not scored."
    perplexity, bounds = found["perplexity"], (found["low"], found["high"])
    interval = "" if None in bounds else f" [{bounds[0]:+.2%}, {bounds[1]:+.2%}]"
    return (
        f"Quantised as it is shipped, the candidate has perplexity {number(perplexity['candidate'])} instead of "
        f"{number(perplexity['baseline'])} on {count_of(perplexity['n'], 'conversation')}: {lost:+.2%}{interval}."
    )


def references(comparison: dict[str, Any]) -> Iterator[str]:
    """Whose words the models were compared with, and what counting models' own words would have shown."""
    found = comparison["provenance"]
    yield f"references, by people or by models that evaluate.references names: {found['references']}"
    if found["left_out"]:
        yield f"no references, since a model's own words: {found['left_out']}, {found['liked']} of them liked"
    for name, counted in (("with_liked", "the liked ones"), ("with_own_words", "all of them")):
        if biased := found.get(name):
            yield (
                f"counting {counted}, {comparison['primary']['metric']} would differ from the base's by "
                f"{with_bounds(biased)}: that is bias, not evidence"
            )


def forgetting(comparison: dict[str, Any]) -> Iterator[str]:
    """What the candidate still knows of the general questions, and how it reads general text."""
    for baseline, row in comparison["forgetting"].items():
        yield (
            f"general questions, mean probability of the right answer against the {baseline}: {paired(row)}; the "
            f"candidate prefers the right answer to {row['candidate_knows']} of {row['n']}, the {baseline} to "
            f"{row['baseline_knows']}; gained {len(row['gained'])}, lost {len(row['lost'])} "
            f"({', '.join(row['lost']) or 'none'}), of {row['goldens']} golden ones lost {len(row['goldens_lost'])}"
        )
    for baseline, row in comparison["general_text"].items():
        yield f"general text, nats a byte against the {baseline}: {paired(row)}"


def prompt_help(found: dict[str, Any]) -> str:
    """Whether the candidate keeps the required share of the base's help of the prompt."""
    if not found:
        return "Not measured."
    return (
        f"Nats by which its own prompt makes a reply likelier than other prompts do, against {found['share']:g} "
        f"times the base's: {paired(found)}, {count_of(found['clusters'], 'different conversation')}."
    )


def paired(row: dict[str, Any]) -> str:
    """Candidate and baseline, and their difference with its interval."""
    return f"{number(row['candidate'])} against {number(row['baseline'])}, {with_bounds(row)}"


def with_bounds(row: dict[str, Any]) -> str:
    """A difference with its interval."""
    return f"{number(row['difference'])} [{number(row['low'])}, {number(row['high'])}]"


def privacy(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """How many generated replies hold personal data that their prompts did not."""
    for contender, row in found.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in row["types"].items())
        counts = f"personal data in {row['with_personal_data']} of {row['replies']} replies"
        yield f"{contender}: {counts}" + (f" ({kinds})" if kinds else "")


def memory(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Verbatim training replies of base and candidate, and the exposure of canaries."""
    for contender, row in found.items():
        if kept := row.get("training"):
            guessable = f", {kept['guessable']} more could be guessed and prove nothing" if kept["guessable"] else ""
            yield (
                f"{contender}: continues {kept['word_for_word']} of {kept['replies']} training replies verbatim"
                f"{guessable}"
            )
        if kept := row.get("canaries"):
            yield (
                f"{contender}: {kept['word_for_word']} of {kept['planted']} canaries said verbatim, mean exposure "
                f"{kept['mean_exposure']:.2f} bits, highest {kept['highest_exposure']:.2f}; chance gives 1.44 on "
                f"average (p = {kept['p_value']:.2g} against {kept['controls']} secrets never shown)"
            )
    if not any("canaries" in row for row in found.values()):
        yield "no canaries were planted: dvc exp run -S prepare.canaries=16"


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
