"""Writes the generated blocks of README.md and docs/: `python -m tests.reference`, which `make docs` runs.

A block lies between `<!-- generated: NAME -->` and `<!-- end -->`. Its content comes from params.yaml, `--help`, `make
help` or the summary of the committed metrics.
"""

import contextlib
import functools
import html
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from fine_tuning.__main__ import main as program
from fine_tuning.common.settings import read_comments

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SUMMARY_INPUTS = ("metrics/evaluation.json", "metrics/comparison.json", "metrics/prepare.json")
EXCERPT = ("perplexity", "nll_per_byte", "token_accuracy", "prompt_help", "general_knowledge", "general_text")


def trimmed(text: str) -> str:
    """The lines without spaces at their ends or empty lines around them."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def run(*command: str, cwd: Path = ROOT) -> str:
    """Output of a command."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return trimmed(done.stdout)


@functools.cache
def help_text(*command: str) -> str:
    """What `python -m fine_tuning COMMAND --help` prints, in lines of 100 characters without colours."""
    printed = io.StringIO()
    with (
        patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}),
        patch.object(sys, "argv", ["fine_tuning", *command, "--help"]),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        program()
    return trimmed(printed.getvalue())


def command_names() -> list[str]:
    """The commands of `python -m fine_tuning`, in the order of its help."""
    return re.findall(r"^\W{1,4}([a-z][a-z-]+)(?:\s{2,}\S.*)?$", help_text(), re.MULTILINE)


def commands() -> str:
    """The help of the program and of each command."""
    parts = [f"```text\n{help_text()}\n```"]
    parts += [f"### {name}\n\n```text\n{help_text(name)}\n```" for name in command_names()]
    return "\n\n".join(parts)


def make_targets() -> str:
    """What `make help` prints."""
    return f"```text\n{run('make', '--no-print-directory', 'help')}\n```"


def parameters() -> str:
    """Every parameter of params.yaml with its default and its comment."""
    comments, values = read_comments(ROOT / "params.yaml"), yaml.safe_load((ROOT / "params.yaml").read_text())
    parents = {name.rpartition(".")[0] for name in comments}
    parts = [entry(name.split("."), name in parents, comment, values) for name, comment in comments.items()]
    return "\n".join(parts).strip("\n")


def entry(path: list[str], is_parent: bool, comment: str, params: dict[str, Any]) -> str:
    """A heading for a section, a list item for any other key."""
    if len(path) == 1:
        return f"\n### {path[0]}\n"
    found: Any = params
    for key in path:
        found = found[key]
    default = "" if is_parent else f" = `{json.dumps(found, ensure_ascii=False)}`"
    pieces = comment.split("`")
    said = "`".join(piece if index % 2 else html.escape(piece, quote=False) for index, piece in enumerate(pieces))
    return f"- **`{'.'.join(path)}`**{default}" + (f"<br>\n  {said}" if said else "")


def metrics_of(revision: str | None) -> dict[str, bytes]:
    """The files that the summary reads: of the working tree, or of a commit."""
    if revision is None:
        return {name: (ROOT / name).read_bytes() for name in SUMMARY_INPUTS}
    shown = {
        name: subprocess.run(["git", "show", f"{revision}:{name}"], cwd=ROOT, capture_output=True, check=True)
        for name in SUMMARY_INPUTS
    }
    return {name: done.stdout for name, done in shown.items()}


def summary(metrics: dict[str, bytes]) -> str:
    """What `summary` prints of these metrics, up to the paths and commands at its end."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in metrics.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        return run(sys.executable, "-m", "fine_tuning", "summary", "--all", cwd=Path(folder)).split("\n\n")[0]


def excerpt(printed: str) -> str:
    """The rows of some metrics, the verdict and its first two reasons."""
    lines = printed.splitlines()
    verdict = next(number for number, line in enumerate(lines) if line.startswith("Verdict"))
    table = [line for line in lines if line[0] in "┏┃┡└" or (line[0] == "│" and line.split()[1] in EXCERPT)]
    return "\n".join([*table, *lines[verdict : verdict + 3]])


@functools.cache
def blocks(revision: str | None = None) -> dict[str, str]:
    """The content of every generated block by name."""
    printed = summary(metrics_of(revision))
    return {
        "summary": f"```\n{printed}\n```",
        "summary-excerpt": f"```\n{excerpt(printed)}\n```",
        "commands": commands(),
        "make-targets": make_targets(),
        "parameters": parameters(),
    }


def filled(text: str, content: dict[str, str]) -> str:
    """The page with its blocks written anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{content[match[2]]}\n{match[3]}", text)


def main() -> None:
    content = blocks()
    for page in PAGES:
        page.write_text(filled(page.read_text(), content))


if __name__ == "__main__":
    main()
