"""Drawings as SVG: in the report as part of the page, and as files of their own for `dvc plots`."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #1c1c1e; } .good { fill: #1a7f4b; stroke: #1a7f4b; } "
    ".bad { fill: #c0392b; stroke: #c0392b; } .open { fill: #888; stroke: #888; }"
)


def standalone(drawing: str, title: str) -> str:
    """A drawing as a file: with its own colours, a white ground and a title."""
    head, _, rest = drawing.partition(">")
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', head).groups())
    size = f'width="{width}" height="{height + 32}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -32 {width} {height + 32}" {size}><style>{STYLE}</style>'
        f'<rect y="-32" {size} fill="white"/><text x="0" y="-12" font-weight="bold">{escape(title)}</text>{rest}\n'
    )


def number(value: float | None) -> str:
    """Four digits, or a dash for what is undefined."""
    return "–" if value is None or value != value else f"{value:.4g}"


def interval_plot(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Each metric's difference with its interval on a scale of its own; zero is the line in the middle."""
    rows = []
    for name, found in differences.items():
        value, low, high = found["difference"], found["low"], found["high"]
        y = 28 * len(rows) + 20
        if value is None or low is None or high is None:
            shown = "undefined" if value is None else f"{value:+.3g}, no interval, n {found['n']}"
            rows.append(f'<text x="0" y="{y + 4}">{escape(name)}</text><text x="500" y="{y + 4}">{shown}</text>')
            continue
        widest = max(abs(low), abs(high), abs(value)) or 1.0
        left, centre, right = (330 + 140 * bound / widest for bound in (low, value, high))
        certain = found["better"] and not low <= 0 <= high
        kind = "open" if not certain else "good" if found["better"] * value > 0 else "bad"
        rows.append(
            f'<text x="0" y="{y + 4}">{escape(name)}</text>'
            f'<line class="{kind}" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke-width="3"/>'
            f'<circle class="{kind}" cx="{centre:.1f}" cy="{y}" r="5"/>'
            f'<text x="500" y="{y + 4}">{number(found["candidate"])} − {number(found["baseline"])} = {value:+.3g} '
            f"[{low:+.3g}, {high:+.3g}], n {found['n']}</text>"
        )
    height = 28 * len(rows) + 16
    zero = f'<line x1="330" x2="330" y1="4" y2="{height - 4}" stroke="#888" stroke-dasharray="3 3"/>'
    return _svg(920, height, "differences with intervals", zero + "".join(rows))


def curve(points: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity with its interval over the tokens that were trained on."""
    if not points:
        words = "not measured: python -m fine_tuning learning-curve --fractions 0.25,0.5,1"
        return _svg(620, 40, "learning curve", f'<text x="0" y="24">{words}</text>')
    most = max(point["tokens"] for point in points)
    top, bottom = max(point["high"] for point in points), min(point["low"] for point in points)
    scale = 200 / ((top - bottom) or 1.0)
    parts, corners = [], []
    for point in points:
        x = 80 + 440 * point["tokens"] / most
        low, middle, high = (20 + (top - point[key]) * scale for key in ("low", "perplexity", "high"))
        corners.append(f"{x:.1f},{middle:.1f}")
        parts.append(
            f'<line class="open" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke-width="2"/>'
            f'<circle class="good" cx="{x:.1f}" cy="{middle:.1f}" r="5"/>'
            f'<text x="{x + 8:.1f}" y="{middle - 6:.1f}">{number(point["perplexity"])}</text>'
            f'<text x="{x:.1f}" y="244" text-anchor="middle">{point["tokens"]}</text>'
        )
    line = f'<polyline points="{" ".join(corners)}" fill="none" stroke="#888"/>'
    axes = '<text x="300" y="264" text-anchor="middle">tokens trained on</text><text x="0" y="14">perplexity</text>'
    return _svg(620, 272, "learning curve", axes + line + "".join(parts))


def frontier(kinds: Mapping[str, Mapping[str, Any]], taken: str | None) -> str:
    """Mean KL divergence from the trained model over the size of the GGUF, a point for each kind."""
    sizes, divergences = ([row[key] for row in kinds.values()] for key in ("bytes", "mean_kl"))
    least, wide, top = min(sizes), (max(sizes) - min(sizes)) or 1, max(divergences) or 1.0
    parts = []
    for kind, row in kinds.items():
        x, y = 80 + 420 * (row["bytes"] - least) / wide, 230 - 200 * row["mean_kl"] / top
        parts.append(
            f'<circle class="{"good" if kind == taken else "open"}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text x="{x + 9:.1f}" y="{y - 6:.1f}">{escape(kind)}, {row["bytes"] / 1e6:.0f} MB</text>'
        )
    axes = (
        f'<text x="0" y="14">mean KL, nats</text><text x="0" y="34">{number(top)}</text><text x="0" y="234">0</text>'
        '<text x="290" y="264" text-anchor="middle">size of the GGUF</text>'
        '<line x1="70" x2="560" y1="238" y2="238" stroke="#888"/>'
    )
    return _svg(640, 272, "quantisations", axes + "".join(parts))


COLOURS = ("#1a7f4b", "#c0392b", "#2a6fb0", "#8e44ad", "#b9770e", "#16828a", "#7f8c8d", "#a04070")


def curves(series: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
    """Lines over a common axis, each named in a legend beside it with its lowest value.

    Args:
        series: (x, y) pairs by name, at least one each.
        label: what x counts.
    """
    points = [point for line in series.values() for point in line]
    right = max(x for x, _ in points) or 1.0
    bottom, top = min(y for _, y in points), max(y for _, y in points)
    scale = 240 / ((top - bottom) or 1.0)
    parts = []
    for index, (name, line) in enumerate(series.items()):
        colour, y = COLOURS[index % len(COLOURS)], 24 + 22 * index
        corners = " ".join(f"{60 + 460 * x / right:.1f},{16 + (top - value) * scale:.1f}" for x, value in line)
        lowest = number(min(value for _, value in line))
        parts.append(
            f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<line x1="540" x2="560" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>'
            f'<text x="568" y="{y}">{escape(name)}: {lowest}</text>'
        )
    height = max(292, 22 * len(series) + 30)
    axes = (
        f'<text x="0" y="20">{number(top)}</text><text x="0" y="260">{number(bottom)}</text>'
        f'<text x="60" y="280">0</text><text x="520" y="280" text-anchor="end">{escape(label)} {number(right)}</text>'
    )
    return _svg(920, height, "curves", axes + "".join(parts))


def _svg(width: int, height: int, label: str, body: str) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{label}">{body}</svg>'
