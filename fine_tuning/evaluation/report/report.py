"""The verdict as one HTML file that needs no network: intervals as inline SVG, tables, replies side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import count_of
from fine_tuning.common.records import replacing
from fine_tuning.evaluation.report.charts import curve, interval_plot, number
from fine_tuning.schema.reasons import in_words

STYLE = """
:root { color-scheme: light dark; --good: #1a7f4b; --bad: #c0392b; --dim: #8884; --ink: light-dark(#1c1c1e, #eee); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink); }
h1 { font-size: 2rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--dim); }
.PROMOTE { color: var(--good); } .HOLD { color: var(--bad); } .INCONCLUSIVE { color: #b7791f; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--dim); vertical-align: top; }
small, .dim { opacity: .7; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit; }
details { margin: .5rem 0; } svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 13px; }
.good { fill: var(--good); stroke: var(--good); } .bad { fill: var(--bad); stroke: var(--bad); }
.open { fill: #888; stroke: #888; } .scroll { overflow-x: auto; }
"""
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
    verdict = comparison["verdict"]
    body = [
        f'<h1 class="{escape(verdict)}">{escape(verdict)}</h1>',
        f"<p>Held-out conversations or windows of them: {comparison['n']}, {comparison['clusters']} different.</p>",
        bullets(comparison["reasons"]),
        *(
            part
            for rival, differences in comparison["differences"].items()
            for part in (f"<h2>Candidate against {escape(rival)}</h2>", interval_plot(differences))
        ),
        "<h2>Without training</h2>",
        cheaper_roads(comparison["cheaper_roads"], comparison["primary"]["metric"]),
        "<h2>Every metric</h2>",
        metric_table(found.evaluation, comparison["other_tokens"]),
        bullets(f"{name}: {signature}" for name, signature in suite.get("signatures", {}).items()),
        quantising(comparison["quantisation"]),
        references(comparison["provenance"], comparison["primary"]["metric"]),
        "<h2>Where</h2>",
        *(slice_table(dimension, names) for dimension, names in found.slices.items()),
        "<h2>Largest wins and losses</h2>",
        *(example(*pair) for pair in extremes(found.records)),
        "<h2>Test prompts</h2>",
        *(answer_table(answer) for answer in found.answers),
        "<h2>Forgetting</h2>",
        forgetting(comparison["forgetting"], comparison["general_text"]),
        "<h2>Do replies fit their prompts?</h2>",
        prompt_help(comparison["prompt_help"]),
        "<h2>Memory and privacy</h2>",
        memory(comparison["memory"]),
        privacy(comparison["privacy"]),
        "<h2>Training data</h2>",
        bullets(in_words(found.preparation)),
        "<h2>Training data since the champion</h2>",
        data_table(found.data_changes),
        "<h2>Would more conversations help?</h2>",
        curve(found.learning_curve["points"]),
        bullets([found.learning_curve["note"]] if "note" in found.learning_curve else []),
        f'<p class="dim">Suite {escape(suite["sha256"][:16])}, adapter '
        f"{escape(comparison.get('adapter_sha256', '')[:16])}.</p>",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(verdict)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode("utf-8", "replace"))


def bullets(lines: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def metric_table(evaluation: dict[str, Any], other_tokens: Sequence[str] = ()) -> str:
    """One row a metric, one column a contender, with intervals and the number of conversations."""
    table = {name: row for name, row in evaluation.items() if name != "suite"}
    names = dict.fromkeys(name for row in table.values() for name in row)
    head = "".join(f"<th>{escape(contender.replace('_', ' '))}</th>" for contender in table)
    rows = []
    for name in names:
        cells = []
        for contender, row in table.items():
            mark = " †" if contender in other_tokens and name in COUNTING else ""
            cells.append(f"<td>{measured(row.get(name))}{mark}</td>")
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    note = "<p>† in tokens of its own: not comparable with the other columns.</p>" if other_tokens else ""
    return f'<div class="scroll"><table><tr><th>metric</th>{head}</tr>{"".join(rows)}</table></div>{note}'


def measured(found: dict[str, Any] | None) -> str:
    """A value with its interval and the number of conversations."""
    if not found:
        return "–"
    interval = f"[{number(found['low'])}, {number(found['high'])}]"
    if found.get("clusters") == 1:
        interval = "one conversation group,"
    return f"{number(found['value'])} <small>{interval} n {found['n']}</small>"


def cheaper_roads(found: dict[str, dict[str, Any]], metric: str) -> str:
    """What the base does when it is told or shown what to do instead of trained."""
    lines = [
        f"{row['what']}: {metric} {number(row['rival'])}, the candidate {number(row['candidate'])} on the same "
        f"{count_of(row['n'], 'conversation')}, a difference of {number(row['difference'])} [{number(row['low'])}, "
        f"{number(row['high'])}]"
        for row in found.values()
    ]
    return bullets(lines) if lines else "<p>Not measured.</p>"


def quantising(found: dict[str, Any]) -> str:
    """One line on what the GGUF loses."""
    lost = found.get("perplexity_lost")
    if lost is None:
        return "<p>The GGUF was not scored.</p>"
    perplexity, bounds = found["perplexity"], (found["low"], found["high"])
    interval = "" if None in bounds else f" [{bounds[0]:+.2%}, {bounds[1]:+.2%}]"
    return (
        f"<p>Quantised as it is shipped, the candidate has perplexity {number(perplexity['candidate'])} instead of "
        f"{number(perplexity['rival'])} on {count_of(perplexity['n'], 'conversation')}: {lost:+.2%}{interval}.</p>"
    )


def references(found: dict[str, Any], metric: str) -> str:
    """Whose words the models were compared with, and what counting models' own words would have shown."""
    lines = [f"references, by people or by models that evaluate.references names: {found['references']}"]
    if found["left_out"]:
        lines.append(f"no references, since a model's own words: {found['left_out']}, {found['liked']} of them liked")
    for name, counted in (("with_liked", "the liked ones"), ("with_own_words", "all of them")):
        if biased := found.get(name):
            lines.append(
                f"counting {counted}, {metric} would differ from the base's by {number(biased['difference'])} "
                f"[{number(biased['low'])}, {number(biased['high'])}]: that is bias, not evidence"
            )
    return bullets(lines)


def forgetting(questions: dict[str, dict[str, Any]], texts: dict[str, dict[str, Any]]) -> str:
    """What the candidate still knows of the general questions, and how it reads general text."""
    lines = [
        f"general questions, mean probability of the right answer against the {rival}: {paired(row)}; the candidate "
        f"prefers the right answer to {row['candidate_knows']} of {row['n']}, the {rival} to {row['rival_knows']}; "
        f"gained {len(row['gained'])}, lost {len(row['lost'])} ({', '.join(row['lost']) or 'none'}), of "
        f"{row['goldens']} golden ones lost {len(row['goldens_lost'])}"
        for rival, row in questions.items()
    ]
    lines += [f"general text, nats a byte against the {rival}: {paired(row)}" for rival, row in texts.items()]
    return bullets(lines) if lines else "<p>Not measured.</p>"


def prompt_help(found: dict[str, Any]) -> str:
    """Whether the candidate keeps the required share of the base's help of the prompt."""
    if not found:
        return "<p>Not measured.</p>"
    return (
        f"<p>Nats by which its own prompt makes a reply likelier than other prompts do, against {found['share']:g} "
        f"times the base's: {paired(found)}, {count_of(found['clusters'], 'different conversation')}.</p>"
    )


def paired(row: dict[str, Any]) -> str:
    """Candidate and rival, and their difference with its interval."""
    low, high = number(row["low"]), number(row["high"])
    return f"{number(row['candidate'])} against {number(row['rival'])}, {number(row['difference'])} [{low}, {high}]"


def privacy(found: dict[str, dict[str, Any]]) -> str:
    """How many generated replies hold personal data that their prompts did not."""
    lines = []
    for contender, row in found.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in row["types"].items())
        lines.append(
            f"{contender}: personal data in {row['with_personal_data']} of {row['replies']} replies"
            + (f" ({kinds})" if kinds else "")
        )
    return bullets(lines) if lines else "<p>Nothing was generated.</p>"


def memory(found: dict[str, dict[str, Any]]) -> str:
    """What base and candidate say word for word of the training data, and the exposure of canaries."""
    lines = []
    for contender, row in found.items():
        if "training" in row:
            kept = row["training"]
            lines.append(
                f"{contender}: goes on word for word with {kept['word_for_word']} of {kept['replies']} training replies"
                + (f", {kept['guessable']} more could be guessed and prove nothing" if kept["guessable"] else "")
            )
        if "canaries" in row:
            kept = row["canaries"]
            lines.append(
                f"{contender}: {kept['word_for_word']} of {kept['planted']} canaries said word for word, mean exposure "
                f"{kept['mean_exposure']:.2f} bits, highest {kept['highest_exposure']:.2f}; chance gives 1.44 on "
                f"average (p = {kept['p_value']:.2g} against {kept['controls']} secrets never shown)"
            )
    if not any("canaries" in row for row in found.values()):
        lines.append("no canaries were planted: dvc exp run -S prepare.canaries=16")
    return bullets(lines)


def data_table(found: dict[str, dict[str, Any]] | None) -> str:
    """Conversations and tokens that were added and removed, a source a row."""
    if found is None:
        return "<p>There is no champion, or it was promoted before its training data were recorded.</p>"
    kinds = ("added", "removed", "kept")
    rows = "".join(
        f"<tr><td>{escape(source)}</td>"
        + "".join(
            f"<td>{row[kind]['conversations']} <small>{row[kind]['tokens']} tokens</small></td>" for kind in kinds
        )
        + "</tr>"
        for source, row in found.items()
    )
    head = "<tr><th>source</th>" + "".join(f"<th>{kind}</th>" for kind in kinds) + "</tr>"
    return f'<div class="scroll"><table>{head}{rows}</table></div>'


def slice_table(dimension: str, found: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> str:
    """Likelihood of every contender in every slice of one dimension, and every metric to unfold."""
    present = {name for row in found.values() for name in row}
    contenders = [name for name in CONTENDERS if name in present]
    head = "".join(f"<th>{escape(name)}</th>" for name in contenders)

    def table(metrics: Sequence[str]) -> str:
        rows = [
            f"<tr><td>{escape(name)}</td><td>{escape(metric)}</td>"
            + "".join(f"<td>{measured(row.get(contender, {}).get(metric))}</td>" for contender in contenders)
            + "</tr>"
            for name, row in found.items()
            for metric in metrics
            if any(metric in row.get(contender, {}) for contender in contenders)
        ]
        return (
            f'<div class="scroll"><table><tr><th>{escape(dimension)}</th><th>metric</th>{head}</tr>'
            f"{''.join(rows)}</table></div>"
        )

    every = list(dict.fromkeys(metric for row in found.values() for cell in row.values() for metric in cell))
    first = [metric for metric in COUNTING if metric in every] or every[:1]
    return f"{table(first)}<details><summary>every metric by {escape(dimension)}</summary>{table(every)}</details><br>"


def answer_table(answer: dict[str, Any]) -> str:
    """One test prompt and all replies to it."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{text(reply['text'], reply['finished'])}</td></tr>"
        for name, reply in answer["replies"].items()
    )
    return f"<details open><summary>{escape(answer['prompt'])}</summary><table>{rows}</table></details>"


def text(words: str, finished: bool = True) -> str:
    """A reply as it is, with a mark where it was cut."""
    shown = escape(words) if words else '<span class="dim">(nothing)</span>'
    return f"<pre>{shown}{'' if finished else ' <small>(cut off)</small>'}</pre>"


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


def example(heading: str, lines: Sequence[dict[str, Any]]) -> str:
    """One held-out conversation: what was asked, the reference and every reply."""
    first = lines[0]
    rows = [("asked", text(first.get("prompt", ""))), ("reference", text(first["references"]))]
    rows += [(line["contender"], text(line["predictions"], line["finished"])) for line in lines]
    table = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows)
    return (
        f"<details><summary>{heading} <small>{escape(first['source'])}</small></summary><table>{table}</table>"
        "</details>"
    )
