"""Kill the logger, seal, import, promote and whole pipeline runs at random moments, and check what is left each time.

    python -m benchmarks.faults (--minutes 60 | --kills 10000) [--seed 0] [--only logger seal import promote pipeline]
                                [--target prepare] [--folder DIR]

Everything happens in temporary checkouts (below DIR) on the tiny base model of the tests, with real git, DVC and
SQLite. The victims get equal shares of the time. Each round starts one, ends it with SIGKILL after a random part of the
time that it usually takes (a pipeline with all its processes), runs the same again to its end, and checks:

    logger    every id that was acknowledged is in the log, none twice, and the log goes on
    seal      every conversation is in exactly one shard, DVC's cache holds the shards, nothing is left in the inbox
    import    every conversation of the file is in exactly one shard, and DVC's cache holds the shards
    promote   one version is registered, it is the champion, and DVC has its files
    pipeline  `dvc repro TARGET` succeeds and writes the bytes of a run that nobody killed

Printed is a line for each finding, and a table at the end: rounds, kills (the others ended before), runs after a kill
that refused to start or failed, and broken promises. The exit status is 1 where there was any of the last two.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from fine_tuning.common.records import read_json, read_jsonl, write_jsonl
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shards import shard_paths
from tests.project import conversations, new_project, outputs
from tests.registered import here, write_project
from tests.strike import acknowledged_before_a_kill, in_child
from tests.tiny import write_tiny_base

INBOX = "inbox/conversations.jsonl"
SHARDS = "data/conversations"
RENEWED = 50  # rounds after which a victim gets a fresh checkout, so that a round stays as long as it was


class Refused(Exception):
    """The run after a kill did not succeed."""


class Broken(Exception):
    """Something acknowledged is lost or doubled, or other bytes came out."""


class Victim(ABC):
    """What is killed. `round` works in the current folder, a checkout of its own."""

    renewed = RENEWED
    usual = 0.0  # seconds of a run that nobody kills

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds = self.kills = self.refused = self.broken = 0
        self.spent, self.left = 0.0, 0

    @abstractmethod
    def prepare(self) -> None:
        """Make the checkout in the current folder."""

    @abstractmethod
    def round(self, draw: random.Random) -> bool:
        """One round; whether the kill came before the end. Raises Refused or Broken."""

    def run(self, draw: random.Random) -> None:
        """A round in the checkout, counted."""
        start = time.monotonic()
        if self.left == 0:
            self.left = self.renewed
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with contextlib.chdir(self.folder):
                self.prepare()
        self.rounds, self.left = self.rounds + 1, self.left - 1
        problem = None
        try:
            with contextlib.chdir(self.folder):
                self.kills += self.round(draw)
        except Refused as error:
            problem, self.refused, self.kills = f"refused: {error}", self.refused + 1, self.kills + 1
        except Broken as error:
            problem, self.broken, self.kills = f"BROKEN: {error}", self.broken + 1, self.kills + 1
        if problem:
            print(f"{type(self).__name__.lower()}, round {self.rounds}: {problem}", flush=True)
            self.left = 0
        self.spent += time.monotonic() - start


class Logger(Victim):
    """A process that logs without end."""

    def prepare(self) -> None:
        self.acknowledged: set[str] = set()

    def round(self, draw: random.Random) -> bool:
        self.acknowledged |= set(acknowledged_before_a_kill(draw.random() / 5))
        logger = ConversationLogger(INBOX)
        self.acknowledged.add(logger.log_conversation("after", "the kill"))
        logged = [event["id"] for event in logger.read_events() if event["event"] == "exchange"]
        if lost := self.acknowledged - set(logged):
            raise Broken(f"{len(lost)} of {len(self.acknowledged)} acknowledged exchanges are gone")
        if len(logged) != len(set(logged)):
            raise Broken(f"{len(logged) - len(set(logged))} exchanges are there twice")
        self.acknowledged = set(logged)  # what was on disk before the kill and not yet acknowledged counts from now on
        return True


class Forked(Victim):
    """A command that runs in a forked child: what it imports is imported once."""

    def __init__(self, folder: Path, template: Path) -> None:
        super().__init__(folder)
        self.template = template

    def prepare(self) -> None:
        shutil.copytree(self.template, Path(), symlinks=True, dirs_exist_ok=True)
        self.told = sealed()

    def killed(self, draw: random.Random, called) -> bool:
        """Call it and kill it, then call it to the end; whether the kill came before the end."""
        if self.usual == 0:
            start = time.monotonic()
            self.to_the_end(called)
            self.usual = time.monotonic() - start
            return False
        killed = os.WIFSIGNALED(in_child(quiet, called, draw.uniform(0, 1.1 * self.usual)))
        self.to_the_end(called)
        return killed

    def to_the_end(self, called) -> None:
        if status := in_child(quiet, called):
            raise Refused(f"status {os.waitstatus_to_exitcode(status)}: {Path('said').read_text()[-400:]!r}")

    def check_shards(self) -> None:
        """What was acknowledged is in one shard each, and the shards are in DVC's cache."""
        found = sealed()
        if found != self.told:
            raise Broken(f"{sum((self.told - found).values())} lost, {sum((found - self.told).values())} doubled")
        (out,) = yaml.safe_load(Path(f"{SHARDS}.dvc").read_bytes())["outs"]
        listed = {entry["relpath"]: entry["md5"] for entry in read_json(cached(out["md5"]))}
        if set(listed) != {path.name for path in shard_paths(SHARDS)} or not all(map(exists, listed.values())):
            raise Broken("DVC's cache does not hold the shards")


def sealed() -> Counter[str]:
    """The questions with which the conversations in the shards begin; each is asked once."""
    return Counter(record["messages"][0]["content"] for path in shard_paths(SHARDS) for record in read_jsonl(path))


def cached(md5: str) -> Path:
    return Path(".dvc/cache/files/md5", md5[:2], md5[2:])


def exists(md5: str) -> bool:
    return cached(md5).is_file()


def quiet() -> None:
    """Let a child write into a file what it has to say."""
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)


class Seal(Forked):
    """`python -m fine_tuning seal`."""

    def round(self, draw: random.Random) -> bool:
        from fine_tuning.commands.conversations import seal

        logger = ConversationLogger(INBOX)
        for _ in range(5):
            question = f"What is {draw.getrandbits(64)}?"
            logger.log_conversation(question, "A number.")
            self.told[question] += 1
        killed = self.killed(draw, lambda: seal(None))
        self.check_shards()
        if any(Path("inbox").glob("*.jsonl")) and list(logger.read_events()):
            raise Broken("something is left in the inbox")
        return killed


class Import(Forked):
    """`python -m fine_tuning import FILE`."""

    def round(self, draw: random.Random) -> bool:
        from fine_tuning.commands.conversations import import_files

        questions = [f"What is {draw.getrandbits(64)}?" for _ in range(20)]
        write_jsonl("../imported.jsonl", [{"prompt": question, "completion": "A number."} for question in questions])
        self.told.update(questions)
        files = argparse.Namespace(files=[Path("../imported.jsonl")], model=None)
        killed = self.killed(draw, lambda: import_files(files))
        self.check_shards()
        return killed


class Promote(Forked):
    """`python -m fine_tuning promote`."""

    renewed = 1

    def prepare(self) -> None:
        shutil.copytree(self.template, Path(), symlinks=True, dirs_exist_ok=True)

    def round(self, draw: random.Random) -> bool:
        killed = self.killed(draw, lambda: here("promote"))
        in_child(quiet, print_versions)
        if (versions := Path("said").read_text().split()) != ["1"]:
            raise Broken(f"the versions {' '.join(versions)} are registered")
        if read_json("models/champion.json")["version"] != 1:
            raise Broken("version 1 is not the champion")
        (out,) = yaml.safe_load(Path("models/champion.dvc").read_bytes())["outs"]
        if not all(exists(entry["md5"]) for entry in read_json(cached(out["md5"]))):
            raise Broken("DVC's cache does not hold the champion")
        return killed


def print_versions() -> None:
    """The numbers of the registered versions."""
    from fine_tuning.model_management.model_registry import open_registry

    print(*(version.number for version in open_registry("trial").versions()))


class Pipeline(Victim):
    """`dvc repro` and all the processes that it starts."""

    renewed = 1

    def __init__(self, folder: Path, template: Path, target: str) -> None:
        super().__init__(folder)
        self.template, self.target = template, target
        self.wanted: dict[str, dict[str, bytes]] = {}

    def prepare(self) -> None:
        shutil.copytree(self.template, Path(), symlinks=True, dirs_exist_ok=True)

    def round(self, draw: random.Random) -> bool:
        killed = bool(self.wanted) and self.killed(draw.uniform(0, 1.1 * self.usual))
        start = time.monotonic()
        done = subprocess.run(self.command(), capture_output=True, text=True, env=programs())
        if done.returncode:
            raise Refused(f"{' '.join((done.stdout + done.stderr).split())[-400:]!r}")
        found = {stage: outputs(stage) for stage in yaml.safe_load(Path("dvc.lock").read_bytes())["stages"]}
        if not self.wanted:
            self.wanted, self.usual = found, time.monotonic() - start
        for stage, files in self.wanted.items():
            if found.get(stage) != files:
                raise Broken(f"the stage {stage} wrote other bytes")
        return killed

    def command(self) -> list[str]:
        return [sys.executable, "-m", "dvc", "repro", "-q", self.target]

    def killed(self, seconds: float) -> bool:
        """Start it and kill all of it at once; whether it had not ended before."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(self.command(), env=programs(), start_new_session=True, **quiet) as run:
            try:
                run.wait(seconds)
            except subprocess.TimeoutExpired:
                tree = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
                for process in tree:  # stopped first, so that none sees another die
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.suspend()
                os.killpg(run.pid, signal.SIGKILL)
                for process in tree:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                return True
            return False


def programs() -> dict[str, str]:
    """The environment with this Python's programs first, and one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_template(folder: Path, base: Path, target: str) -> Path:
    """A checkout whose pipeline has run up to `target`, and which has got conversations since."""
    folder.mkdir()
    project = new_project(folder, base)
    if not (folder / ".dvc").exists():
        project.run("dvc", "init", "-q")
    project.set_params(clean={"processes": 1}, train={"checkpoint_steps": 2})
    project.set_params(evaluate={"forgetting": False, "quantised_items": 2})
    project.import_conversations(conversations(("printer", "router", "screen", "keyboard")), "first")
    project.run("dvc", "repro", "-q", target)
    project.commit("First run")
    project.import_conversations(conversations(("battery", "camera", "speaker", "charger")), "second")
    project.commit("More conversations")
    return folder


def victims(folder: Path, only: list[str], target: str) -> Iterator[Victim]:
    """The victims that are asked for, each with what it starts from."""
    base = write_tiny_base(folder / "tiny")
    checkout = None
    if {"seal", "import", "pipeline"} & set(only):
        checkout = write_template(folder / "template", base, target)
    for name in only:
        place = folder / name / "checkout"
        if name == "logger":
            yield Logger(place)
        elif name == "promote":
            yield Promote(place, write_project(folder / "promotable", base))
        elif name == "pipeline":
            yield Pipeline(place, checkout, target)
        else:
            yield {"seal": Seal, "import": Import}[name](place, checkout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="end after so many minutes")
    parser.add_argument("--kills", type=int, help="end after so many kills")
    parser.add_argument("--seed", type=int, default=0)
    names = ("logger", "seal", "import", "promote", "pipeline")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--target", default="prepare", help="the last stage of the pipeline's runs")
    parser.add_argument("--folder", type=Path, help="where the temporary checkouts are made")
    arguments = parser.parse_args()
    if (arguments.minutes is None) == (arguments.kills is None):
        parser.error("give either --minutes or --kills")
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        chosen = list(victims(Path(name), list(arguments.only), arguments.target))
        start = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            while (
                time.monotonic() - start < 60 * arguments.minutes
                if arguments.minutes is not None
                else sum(victim.kills for victim in chosen) < arguments.kills
            ):
                min(chosen, key=lambda victim: victim.spent).run(draw)
        minutes = (time.monotonic() - start) / 60
    report = {type(v).__name__.lower(): (v.rounds, v.kills, v.refused, v.broken) for v in chosen}
    report["all"] = tuple(map(sum, zip(*report.values(), strict=True)))
    print(f"\n{minutes:.1f} minutes, seed {arguments.seed}\n\n| victim | rounds | kills | refused | broken |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, row in report.items():
        print(f"| {name} | {' | '.join(map(str, row))} |")
    sys.exit(bool(report["all"][2] or report["all"][3]))


if __name__ == "__main__":
    main()
