"""Time and memory of intake, clean, export and prepare as conversations grow a hundredfold, and of a thousand more.

    python -m benchmarks.load [--sizes 10000 100000 1000000] [--more 1000] [--folder DIR] [--engine ADDRESS]

For each size a checkout of its own is made in a temporary folder (of DIR), the stages run in it as `dvc repro` runs
them, each in a process of its own, and again after a shard of a thousand conversations has arrived. Printed are wall
and CPU seconds and the peak of the memory of the stage's processes together (PSS, looked at five times a second). Half
of the conversations have one exchange, the others two or three; 15 % hold personal data, 5 % are exact duplicates and
5 % near-duplicates of another. `--engine` cleans and tokenises on the Dask cluster at that address.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from benchmarks.cleaning import FOREIGN, PERSONAL
from fine_tuning.data_collection.storage.shards import write_shard

ROOT = Path(__file__).parents[1]
STAGES = ("intake", "clean", "export", "prepare")
SHARD = 20_000  # conversations
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve zu".split()  # noqa: SIM905


def conversations(start: int, end: int) -> Iterator[dict]:
    """Conversations `start` to `end` of an endless list that is always the same."""
    for number in range(start, end):
        draw = random.Random(number)
        kind = draw.random()
        texts = _texts(draw.randrange(number) if number and kind < 0.1 else number)
        if 0.05 <= kind < 0.1:
            texts[-1] += " Good luck!"
        messages = [
            {"id": f"g{number}-{index}", "role": ("user", "assistant")[index % 2], "content": text}
            for index, text in enumerate(texts)
        ]
        minute = number // 10
        yield {
            "id": f"g{number:08d}",
            "source": "generated",
            "started_at": f"2026-{minute // 43200 % 12 + 1:02d}-{minute // 1440 % 28 + 1:02d}T{minute // 60 % 24:02d}:"
            f"{minute % 60:02d}:00.000Z",
            "messages": messages,
            "feedback": [],
            "metadata": {},
        }


def _texts(number: int) -> list[str]:
    draw = random.Random(f"text {number}")
    texts = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        texts.append(_sentence(draw, 5, 16)[:-1] + "?")
        texts.append(" ".join(_sentence(draw, 6, 20) for _ in range(draw.randint(1, 5))))
    if draw.random() < 0.15:
        texts[0] += " " + draw.choice(PERSONAL)(draw)
    if draw.random() < 0.03:
        texts[-1] += " " + draw.choice(FOREIGN)
    return texts


def _sentence(draw: random.Random, least: int, most: int) -> str:
    """Made-up words, short ones more often, as in a language."""
    words = (
        "".join(draw.choices(SYLLABLES, k=1 + int(3 * draw.random() ** 2))) for _ in range(draw.randint(least, most))
    )
    return " ".join(words).capitalize() + "."


# -----------------------------------------------------------------------------
# a checkout


def write_checkout(folder: Path, base: Path, count: int, engine: str | None) -> None:
    """Parameters, the tokenizer of `base` and shards with `count` conversations."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "dvc.yaml", folder)
    params = yaml.safe_load((ROOT / "params.yaml").read_bytes())
    params["intake"]["sample"] = False
    if engine:
        params["clean"]["engine"] = params["prepare"]["engine"] = engine
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "models/base").mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copy(base / name, folder / "models/base")
    for start in range(0, count, SHARD):
        add_shard(folder, start, min(start + SHARD, count))


def add_shard(folder: Path, start: int, end: int) -> None:
    """Write the conversations `start` to `end` as the next shard."""
    write_shard(folder / "data/conversations", f"20260101T{start:09d}-import", conversations(start, end))


# -----------------------------------------------------------------------------
# measuring


def run_stage(folder: Path, stage: str) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB of all its processes) of a stage."""
    before, start = os.times(), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.2)
    wall, after = time.perf_counter() - start, os.times()
    if process.returncode:
        sys.exit(process.stderr.read().decode()[-2000:])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu, peak / 1e6


def _memory(pid: int) -> int:
    total = 0
    try:
        for process in (top := psutil.Process(pid), *top.children(recursive=True)):
            total += process.memory_full_info().pss
    except (psutil.Error, OSError):
        pass
    return total


def measure(folder: Path, label: str, count: int) -> list[float]:
    """Run the stages, print a line for each; their wall seconds."""
    walls = []
    for stage in STAGES:
        wall, cpu, peak = run_stage(folder, stage)
        walls.append(wall)
        print(
            f"{label:>12} {stage:<9}{wall:9.1f} s{cpu:9.1f} s CPU{1e6 * cpu / count:9.0f} us each{peak:8.0f} MB",
            flush=True,
        )
    return walls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--more", type=int, default=1000, help="conversations that arrive afterwards")
    parser.add_argument("--base", type=Path, default=Path("models/base"), help="folder with a tokenizer")
    parser.add_argument("--folder", type=Path, help="where to work; needs 8 GB for a million")
    parser.add_argument("--engine", help="address of a Dask scheduler; without one, processes of this machine")
    options = parser.parse_args()
    for count in options.sizes:
        with tempfile.TemporaryDirectory(prefix="load-", dir=options.folder) as name:
            folder = Path(name) / "checkout"
            write_checkout(folder, options.base, count, options.engine)
            size = sum(path.stat().st_size for path in (folder / "data/conversations").iterdir())
            print(f"{count:,} conversations, {size / 1e6:.0f} MB, {len(os.sched_getaffinity(0))} cores", flush=True)
            whole = sum(measure(folder, f"{count:,}", count))
            add_shard(folder, count, count + options.more)
            more = sum(measure(folder, f"+{options.more:,}", count))
            clean, prepare = (json.loads((folder / f"metrics/{s}.json").read_text()) for s in ("clean", "prepare"))
            print(
                f"{count:,}: {whole:.1f} s; {options.more:,} more: {more:.1f} s, {100 * more / whole:.0f} % of it; "
                f"{clean['kept']:,} kept in {clean['clusters']:,} clusters, {prepare['splits']['train']['tokens']:,} "
                "tokens to train on",
                flush=True,
            )


if __name__ == "__main__":
    main()
