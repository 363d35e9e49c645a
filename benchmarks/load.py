"""Time and memory of intake, clean, export and prepare as conversations grow a hundredfold, and of a thousand more.

    python -m benchmarks.load [--sizes 10000 100000 1000000] [--more 1000] [--before CHECKOUT] [--folder DIR]
    python -m benchmarks.load --sizes 100000 --links copy hardlink,copy
    python -m benchmarks.load --sizes 1000 100000 --daily

For each size a checkout of its own is made in a temporary folder (of DIR), the stages run in it as `dvc repro` runs
them, each in a process of its own; again after a shard of a thousand new conversations has arrived ("new"); and again
after one of which 5 % are newer versions of earlier conversations and 2 % delete one ("mixed"). Printed are wall and
CPU seconds, the peak of the memory of the stage's processes together (PSS, looked at five times a second) and what they
wrote; with --before, the code of another checkout runs on the same data first, and the ratio of CPU seconds, which
other users of the machine disturb less, is printed. Half of the conversations have one exchange, the others two or
three; 15 % hold personal data, 5 % are exact duplicates and 5 % near-duplicates of another. With `--engine` the workers
of a Dask cluster clean, export and prepare, and their CPU seconds are printed apart from those of the stages. `--links`
gives the shards to DVC and runs the four stages by `dvc repro`, with each of these values of DVC's `cache.type`, and
prints what DVC adds and what lies on disk. `--daily` prints what each command of a day takes in a checkout of which the
four stages have run, with nothing new and with a thousand new conversations.
"""

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from benchmarks.cleaning import FOREIGN, PERSONAL
from fine_tuning.common.records import read_object, write_jsonl
from fine_tuning.common.stage_times import TIMES
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shards import write_shard
from tests.servers import s3

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


def write_checkout(folder: Path, root: Path, base: Path, count: int, engine: str | None) -> None:
    """The parameters of the checkout `root`, the tokenizer of `base` and shards with `count` conversations."""
    folder.mkdir(parents=True)
    shutil.copy(root / "dvc.yaml", folder)
    params = yaml.safe_load((root / "params.yaml").read_bytes())
    params["intake"]["sample"] = False
    if engine:
        for stage in ("clean", "export", "prepare"):
            params[stage]["engine"] = engine
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "models/base").mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copy(base / name, folder / "models/base")
    for start in range(0, count, SHARD):
        add_shard(folder, start, conversations(start, min(start + SHARD, count)))


def add_shard(folder: Path, number: int, talks: Iterable[dict]) -> None:
    """Write conversations as the next shard."""
    write_shard(folder / "data/conversations", f"20260101T{number:09d}-import", talks)


def mixed(start: int, end: int) -> Iterator[dict]:
    """`conversations`, but of a hundred five are longer versions of earlier ones, and two delete one."""
    for number, talk in enumerate(conversations(start, end)):
        if number % 100 < 7:
            earlier = random.Random(number).randrange(start)
            if number % 100 < 2:
                yield next(conversations(earlier, earlier + 1)) | {"messages": [], "deleted": True}
                continue
            longer = talk["messages"]
            talk = next(conversations(earlier, earlier + 1))
            talk["messages"] += longer
        yield talk


# -----------------------------------------------------------------------------
# measuring


class Measured(NamedTuple):
    """What a stage took."""

    wall: float  # seconds
    cpu: float
    peak: float  # MB
    written: float  # MB
    workers: float  # CPU seconds of the workers of the engine


def run_stage(folder: Path, root: Path, stage: str, engine: str | None) -> Measured:
    """Run a stage of the checkout `root` in a folder."""
    return run_measured(folder, [sys.executable, "-m", f"stages.{stage}"], engine, PYTHONPATH=str(root))


def run_measured(folder: Path, command: list[str], engine: str | None = None, **environment: str) -> Measured:
    start, before = time.perf_counter(), _workers_cpu(engine)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"} | environment
    with open(folder / "errors.txt", "wb") as errors:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    peak, ended = 0, 0
    while not ended:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
    if status:
        sys.exit((folder / "errors.txt").read_text()[-2000:])
    cpu = used.ru_utime + used.ru_stime
    wall = time.perf_counter() - start
    return Measured(wall, cpu, peak / 1e6, used.ru_oublock * 512 / 1e6, _workers_cpu(engine) - before)


def _workers_cpu(engine: str | None) -> float:
    if engine is None:
        return 0.0
    from distributed import Client

    with Client(engine.partition("?")[0], set_as_default=False) as client:
        return sum(client.run(time.process_time).values())


def _memory(pid: int) -> int:
    total = 0
    try:
        for process in (top := psutil.Process(pid), *top.children(recursive=True)):
            total += process.memory_full_info().pss
    except (psutil.Error, OSError):
        pass
    return total


def measure(folder: Path, root: Path, count: int, options: argparse.Namespace) -> dict[str, dict[str, Measured]]:
    """What arrived → stage → what it took, the code being that of the checkout `root`."""
    write_checkout(folder, root, options.base, count, options.engine)
    found = {"all": {stage: run_stage(folder, root, stage, options.engine) for stage in STAGES}}
    for number, (name, talks) in enumerate((("new", conversations), ("mixed", mixed)), start=1):
        first = count + (number - 1) * options.more
        add_shard(folder, first, talks(first, first + options.more))
        found[name] = {stage: run_stage(folder, root, stage, options.engine) for stage in STAGES}
    for stages in found.values():
        every = list(stages.values())
        walls, cpus, peaks, written, workers = zip(*every, strict=True)
        stages["together"] = Measured(sum(walls), sum(cpus), max(peaks), sum(written), sum(workers))
    return found


# -----------------------------------------------------------------------------
# with DVC


def write_repository(folder: Path, links: str, count: int, options: argparse.Namespace) -> None:
    """A checkout with its code, under git and DVC."""
    write_checkout(folder, ROOT, options.base, count, options.engine)
    for room in ("fine_tuning", "stages"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "data/forgotten.jsonl", folder / "data")
    for words in (["git", "init"], ["dvc", "init"], ["dvc", "config", "cache.type", links]):
        subprocess.run([*words, "-q"] if words[1] == "init" else words, cwd=folder, check=True)
    shutil.copy(ROOT / ".dvcignore", folder)


def measure_repro(folder: Path, links: str, count: int, options: argparse.Namespace) -> None:
    """Print what `dvc add` of the shards and `dvc repro` take, and what the stages' own commands take of that."""
    write_repository(folder, links, count, options)
    for number, (name, talks) in enumerate(
        (("all", None), ("new", conversations), ("mixed", mixed), ("nothing", None))
    ):
        if talks:
            first = count + (number - 1) * options.more
            add_shard(folder, first, talks(first, first + options.more))
        add = run_measured(folder, ["dvc", "add", "-q", "data/conversations"])
        repro = run_measured(folder, ["dvc", "repro", "-q", "-s", *STAGES])
        own = sum(read_object(folder / TIMES).values()) if name != "nothing" else 0
        size, linked = disk(folder), disk(folder / ".dvc/cache")
        print(
            f"| {count:,} | {links} | {name} | {add.wall:.1f} | {add.cpu:.1f} | {repro.wall:.1f} | {repro.cpu:.1f} | "
            f"{own:.1f} | {add.written + repro.written:.0f} | {size:.0f} | {linked:.0f} |",
            flush=True,
        )


def measure_daily(folder: Path, count: int, options: argparse.Namespace) -> None:
    """Print what the commands of a day take."""
    write_repository(folder, "hardlink,copy", count, options)
    stages = yaml.safe_load((folder / "dvc.yaml").read_bytes())["stages"]  # without training
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {name: stages[name] for name in STAGES}}))
    subprocess.run(
        ["dvc", "remote", "add", "-q", "-d", "storage", str(folder.parent / "remote")], cwd=folder, check=True
    )
    for words in (["add", "-q", "data/conversations"], ["repro", "-q"], ["push", "-q"]):
        run_measured(folder, ["dvc", *words])
    for name in (".gitignore", "models/champion.json"):
        shutil.copy(ROOT / name, folder / name)
    for words in (["add", "-A"], ["-c", "user.name=load", "-c", "user.email=load@localhost", "commit", "-qm", "All"]):
        subprocess.run(["git", *words], cwd=folder, check=True)

    def row(what: str, *words: str) -> None:
        command = list(words) if words[0] == "dvc" else [sys.executable, "-m", "fine_tuning", *words]
        found = run_measured(folder, command)
        print(f"| {count:,} | {what} | {found.wall:.1f} | {found.cpu:.1f} | {found.peak:.0f} |", flush=True)

    def new(name: str, first: int) -> str:
        path = folder.parent / "exports" / name
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, conversations(first, first + options.more))
        return str(path)

    identity = f"g{count // 2:08d}"
    row("dvc status", "dvc", "status", "-q")
    row("dvc push of nothing", "dvc", "push", "-q")
    row("import", "import", new("a.jsonl", count))
    row("import of the same", "import", new("a.jsonl", count))
    row("import --follow", "import", "--follow", str(folder.parent / "exports"))
    new("b.jsonl", count + options.more)
    row("import --follow of a new file", "import", "--follow", str(folder.parent / "exports"))
    row("import --follow of nothing new", "import", "--follow", str(folder.parent / "exports"))
    logger = ConversationLogger(folder / "inbox/conversations.jsonl", durable=False)
    for number in range(options.more):
        logger.log_conversation(f"Question {number}?", f"Answer {number}.", {"session_id": f"s{number}", "model": "m"})
    row("stats", "stats")
    row("seal", "seal")
    row("stats after a seal", "stats")
    row("stats --all", "stats", "--all")
    row("lineage of a conversation", "lineage", identity)
    row("rounds", "rounds")
    row("dvc repro", "dvc", "repro", "-q")
    row("dvc push", "dvc", "push", "-q")
    with s3(folder.parent / "s3") as remote:
        remote.add_to(folder, "s3", "local")
        run_measured(folder, ["dvc", "push", "-q", "-r", "s3"])
        row("import", "import", new("d.jsonl", count + 3 * options.more))
        run_measured(folder, ["dvc", "repro", "-q"])
        row("dvc push to S3", "dvc", "push", "-q", "-r", "s3")
        row("dvc push to S3 of nothing", "dvc", "push", "-q", "-r", "s3")
    run_measured(folder, ["dvc", "remote", "remove", "--local", "s3"])
    row("verify --local", "verify", "--local")
    row("verify", "verify")
    row("forget", "forget", identity, "--yes")
    row("import after it", "import", new("c.jsonl", count + 2 * options.more))


def disk(folder: Path) -> float:
    """MB of all that lies in a folder; a file that is linked there more than once counts once."""
    found = {(s.st_dev, s.st_ino): s.st_blocks for p in folder.rglob("*") if (s := p.lstat())}
    return sum(found.values()) * 512 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--more", type=int, default=1000, help="conversations that arrive afterwards")
    parser.add_argument("--before", type=Path, help="a checkout of other code to compare with")
    parser.add_argument("--base", type=Path, default=Path("models/base"), help="folder with a tokenizer")
    parser.add_argument("--folder", type=Path, help="where to work; needs 16 GB for a million")
    parser.add_argument("--engine", help="address of a Dask scheduler; without one, processes of this machine")
    parser.add_argument("--links", nargs="+", help="values of DVC's cache.type: run by `dvc repro` with each")
    parser.add_argument("--daily", action="store_true", help="the commands of a day instead of the stages")
    options = parser.parse_args()
    if options.daily:
        columns = ["of", "command", "s", "CPU s", "MB of memory"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        for count in options.sizes:
            with tempfile.TemporaryDirectory(prefix="load-", dir=options.folder) as name:
                measure_daily(Path(name) / "checkout", count, options)
        return
    if options.links:
        columns = ["of", "links", "arrived", "add s", "CPU s", "repro s", "CPU s", "stages s"]
        columns += ["MB written", "MB", "cache"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        for count, links in itertools.product(options.sizes, options.links):
            with tempfile.TemporaryDirectory(prefix="load-", dir=options.folder) as name:
                measure_repro(Path(name) / "checkout", links, count, options)
        return
    columns = ["of", "arrived", "stage", "s", "CPU s", "workers' CPU s", "MB of memory", "MB written"]
    columns += ["CPU of all", "before", "ratio"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for count in options.sizes:
        runs = []
        for root in filter(None, (options.before and options.before.resolve(), ROOT)):
            with tempfile.TemporaryDirectory(prefix="load-", dir=options.folder) as name:
                runs.append(measure(Path(name) / "checkout", root, count, options))
        for arrived, stages in runs[-1].items():
            for stage, now in stages.items():
                share = now.cpu / runs[-1]["all"][stage].cpu
                earlier = runs[0][arrived][stage].cpu
                compared = f"{earlier:.1f} | {now.cpu / earlier:.2f}" if options.before else " | "
                print(
                    f"| {count:,} | {arrived} | {stage} | {now.wall:.1f} | {now.cpu:.1f} | {now.workers:.1f} | "
                    f"{now.peak:.0f} | {now.written:.0f} | {share:.0%} | {compared} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
