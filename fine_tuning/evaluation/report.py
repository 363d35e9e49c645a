"""The verdict as one HTML file that needs no network: intervals as inline SVG, tables, replies side by side."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fine_tuning.evaluation.slices import slices
from fine_tuning.records import replacing

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


def write_report(
    path: Path,
    comparison: dict[str, Any],
    evaluation: dict[str, Any],
    records: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
) -> None:
    """Write the report of one comparison.

    Args:
        comparison: content of metrics/comparison.json.
        evaluation: content of metrics/evaluation.json.
        records: lines of items.jsonl.
        answers: {"prompt", "replies": {contender: {"text", "finished"}}} for each test prompt.
    """
    table = {name: row for name, row in evaluation.items() if name != "suite"}
    verdict = comparison["verdict"]
    body = [
        f'<h1 class="{escape(verdict)}">{escape(verdict)}</h1>',
        f"<p>{comparison['n']} held-out conversations, {comparison['clusters']} of them different.</p>",
        bullets(comparison["reasons"]),
        *(
            part
            for rival, found in comparison["differences"].items()
            for part in (f"<h2>Candidate against {escape(rival)}</h2>", interval_plot(found))
        ),
        "<h2>Every metric</h2>",
        metric_table(table),
        quantising(comparison["quantisation"]),
        references(comparison["provenance"], comparison["primary"]["metric"]),
        "<h2>Forgetting</h2>",
        forgetting(comparison["forgetting"]),
        "<h2>Privacy</h2>",
        privacy(comparison["privacy"]),
        "<h2>Where</h2>",
        *(slice_table(dimension, found) for dimension, found in slices(records).items()),
        "<h2>Test prompts</h2>",
        *(answer_table(answer) for answer in answers),
        "<h2>Largest wins and losses</h2>",
        *(example(*pair) for pair in extremes(records)),
        f'<p class="dim">Suite {escape(evaluation["suite"]["sha256"][:16])}, adapter '
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


def number(value: float | None) -> str:
    """Four digits, or a dash for what is undefined."""
    return "–" if value is None or value != value else f"{value:.4g}"


def interval_plot(differences: dict[str, dict[str, Any]]) -> str:
    """Each metric's difference with its interval on a scale of its own; zero is the line in the middle."""
    rows = []
    for name, found in differences.items():
        value, low, high = found["difference"], found["low"], found["high"]
        y = 28 * len(rows) + 20
        if value is None or low is None or high is None:
            rows.append(f'<text x="0" y="{y + 4}">{escape(name)}</text><text x="500" y="{y + 4}">undefined</text>')
            continue
        widest = max(abs(low), abs(high), abs(value)) or 1.0
        left, centre, right = (330 + 140 * bound / widest for bound in (low, value, high))
        certain = found["better"] and not low <= 0 <= high
        kind = "open" if not certain else "good" if found["better"] * value > 0 else "bad"
        rows.append(
            f'<text x="0" y="{y + 4}">{escape(name)}</text>'
            f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke-width="3"/>'
            f'<circle class="{kind}" cx="{centre:.1f}" cy="{y}" r="5"/>'
            f'<text x="500" y="{y + 4}">{number(found["candidate"])} − {number(found["rival"])} = {value:+.3g} '
            f"[{low:+.3g}, {high:+.3g}], n {found['n']}</text>"
        )
    height = 28 * len(rows) + 16
    return (
        f'<div class="scroll"><svg viewBox="0 0 920 {height}" width="920" height="{height}" role="img" '
        'aria-label="differences with intervals">'
        f'<line x1="330" x2="330" y1="4" y2="{height - 4}" stroke="#888" stroke-dasharray="3 3"/>'
        f"{''.join(rows)}</svg></div>"
    )


def metric_table(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row a metric, one column a contender, with intervals and the number of conversations."""
    names = dict.fromkeys(name for row in table.values() for name in row)
    head = "".join(f"<th>{escape(contender)}</th>" for contender in table)
    rows = []
    for name in names:
        cells = []
        for row in table.values():
            found = row.get(name)
            cells.append(
                f"<td>{number(found['value'])} <small>[{number(found['low'])}, {number(found['high'])}] "
                f"n {found['n']}</small></td>"
                if found
                else "<td>–</td>"
            )
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr><th>metric</th>{head}</tr>{"".join(rows)}</table></div>'


def quantising(found: dict[str, Any]) -> str:
    """One line on what the GGUF loses."""
    lost = found.get("perplexity_lost")
    if lost is None:
        return "<p>The GGUF was not scored.</p>"
    perplexity = found["perplexity"]
    return (
        f"<p>Quantised as it is shipped, the candidate has perplexity {number(perplexity['candidate'])} instead of "
        f"{number(perplexity['rival'])} on {perplexity['n']} conversations: {lost:+.2%}.</p>"
    )


def references(found: dict[str, Any], metric: str) -> str:
    """One line on whose words the models were compared with."""
    words = f"<p>{found['references']} replies that a person wrote or chose are the references"
    if not found["left_out"]:
        return words + ".</p>"
    words += f"; {found['left_out']} that are a model's own words are left out"
    if biased := found.get("with_own_words"):
        words += (
            f": counting them, {escape(metric)} would differ from the base's by {number(biased['difference'])} "
            f"[{number(biased['low'])}, {number(biased['high'])}]"
        )
    return words + ".</p>"


def forgetting(found: dict[str, dict[str, Any]]) -> str:
    """What the candidate still knows of the general questions."""
    if not found:
        return "<p>Not measured.</p>"
    rows = "".join(
        f"<tr><td>{escape(rival)}</td><td>{row['rival_knows']} of {row['questions']}</td>"
        f"<td>{row['candidate_knows']}</td><td>{len(row['lost'])} <small>{escape(', '.join(row['lost']))}</small></td>"
        f"<td>{len(row['gained'])}</td><td>{row['p_value']:.2g}</td></tr>"
        for rival, row in found.items()
    )
    head = "<tr><th>rival</th><th>it knows</th><th>candidate knows</th><th>lost</th><th>gained</th><th>p</th></tr>"
    return f'<div class="scroll"><table>{head}{rows}</table></div>'


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


def slice_table(dimension: str, found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Perplexity and token accuracy of every contender in every slice of one dimension."""
    contenders = list(dict.fromkeys(name for row in found.values() for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in contenders)
    rows = []
    for name, row in found.items():
        most = max(cell["replies"] for cell in row.values())
        cells = "".join(
            f"<td>{number(row[contender]['perplexity'])} <small>{row[contender]['token_accuracy']:.1%}</small></td>"
            if contender in row
            else "<td>–</td>"
            for contender in contenders
        )
        rows.append(f"<tr><td>{escape(name)} <small>{most:g} replies</small></td>{cells}</tr>")
    title = f"<th>{escape(dimension)} <small>perplexity, token accuracy</small></th>"
    return f'<div class="scroll"><table><tr>{title}{head}</tr>{"".join(rows)}</table></div><br>'


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


def extremes(records: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(heading, base's record, candidate's record) of the largest gains and losses in likelihood a token."""
    base, candidate = (
        {
            line["id"]: line
            for line in records
            if line["contender"] == name and line.get("nll") is not None and "predictions" in line
        }
        for name in ("base", "candidate")
    )

    def gain(id: str) -> float:
        return (base[id]["nll"] - candidate[id]["nll"]) / base[id]["tokens"]

    ranked = sorted(base.keys() & candidate.keys(), key=lambda id: (-gain(id), id))
    wins = [id for id in ranked[:EXAMPLES] if gain(id) > 0]
    losses = [id for id in ranked[::-1][:EXAMPLES] if gain(id) < 0]
    return [(f"{gain(id):+.2f} nats a token", base[id], candidate[id]) for id in (*wins, *losses)]


def example(heading: str, base: dict[str, Any], candidate: dict[str, Any]) -> str:
    """One held-out conversation: the reference and both replies."""
    rows = [("reference", text(base["references"]))]
    rows += [(line["contender"], text(line["predictions"], line["finished"])) for line in (base, candidate)]
    table = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows)
    return (
        f"<details><summary>{heading} <small>{escape(base['source'])}</small></summary><table>{table}</table></details>"
    )
