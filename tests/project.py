"""A whole project in a temporary folder: real git, real DVC, the tiny base model, a few dozen conversations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from fine_tuning.common.records import write_jsonl
from tests.forked import folder as forked_python

ROOT = Path(__file__).parents[1]
OWN_DATA = ("data/", "models/champion.dvc", "dvc.lock", "metrics/")

TOPICS = ("printer", "router", "screen", "keyboard", "battery", "camera", "speaker", "charger")
QUESTIONS = (
    ("How do I restart my {}?", "Hold the power button of the {} for ten seconds, then press it again."),
    ("My {} is broken, what now?", "Please unplug the {} first, wait a minute, and tell me what you see."),
    ("Where can I buy a new {}?", "Any electronics shop sells a {}; compare the warranties before you choose."),
    ("Is a cheap {} good enough?", "For light use a cheap {} will do, for daily work spend a little more."),
    ("Can I clean the {} with water?", "No, wipe the {} with a dry cloth and keep every liquid away from it."),
)


def conversations(topics: tuple[str, ...] = TOPICS) -> list[dict]:
    """Two-turn conversations in the `messages` form that `import` reads."""
    return [
        {"messages": [{"role": "user", "content": q.format(t)}, {"role": "assistant", "content": a.format(t)}]}
        for t in topics
        for q, a in QUESTIONS
    ]


def outputs(stage: str) -> dict[str, bytes]:
    """Everything that a stage of the project in the current folder writes, but what holds the time."""
    described = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][stage]
    entries = [*described.get("outs", []), *described.get("metrics", [])]
    paths = [Path(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in entries]
    files = [f for path in paths for f in ([path] if path.is_file() else sorted(path.rglob("*"))) if f.is_file()]
    return {str(file): file.read_bytes() for file in files if file.name not in ("training.json", "parity.json")}


class Project:
    """A checkout that commands run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, check: bool = True, forked: bool = True) -> str:
        """Run a command with the environment's programs first on the path; its output on failure.

        `forked` is whether its `python` is that of tests/forked.py.
        """
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
        programs = [forked_python()] * forked + [Path(sys.executable).parent]
        environment["PATH"] = os.pathsep.join((*map(str, programs), environment["PATH"]))
        environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{output[-4000:]}"
        return output

    def commit(self, message: str) -> None:
        """Commit everything that git does not ignore."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def set_params(self, **changes: dict) -> None:
        """Overwrite parameters, a mapping a section."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for section, values in changes.items():
            params[section].update(values)
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def import_conversations(self, records: list[dict], name: str) -> str:
        """Import through the command that a user types."""
        file = self.folder.parent / f"{self.folder.name}-{name}.jsonl"
        write_jsonl(file, records)
        return self.run("python", "-m", "fine_tuning", "import", str(file))

    def copy(self, folder: Path) -> "Project":
        """The same checkout, cache included, at another place."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)


def new_project(folder: Path, base: Path) -> Project:
    """The code of this checkout without its data, on the tiny base, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith((*OWN_DATA, "docs/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    project = Project(folder)
    project.run("git", "init", "-q", "-b", "main")
    project.run("git", "config", "user.name", "Test")
    project.run("git", "config", "user.email", "test@example.org")
    project.set_params(
        base={"model": str(base), "chat_template_sha256": None},
        intake={"sample": False},
        train={"max_steps": 4, "threads": 1},
    )
    (folder / "models/champion.json").write_text('{"version": null}\n')
    (folder / "data").mkdir()
    (folder / "data/forgotten.jsonl").write_text("\n")
    (folder / "data/votes").mkdir()
    shutil.copy2(ROOT / "data/votes/README.md", folder / "data/votes")
    (folder / "metrics").mkdir(exist_ok=True)
    shutil.copy2(ROOT / "metrics/learning_curve.json", folder / "metrics")
    project.commit("Start")
    return project
