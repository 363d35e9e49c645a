"""`new FOLDER`: a project of one's own, with the code, the pipeline and its parameters, under git and DVC."""

import argparse
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import fine_tuning
from fine_tuning.common.errors import UserError
from fine_tuning.common.results import making_folder

PACKAGE = Path(fine_tuning.__file__).parent
IN_WHEEL = PACKAGE / "project"  # pyproject.toml lists what a wheel carries here
STATE = {  # what no stage writes and the pipeline reads
    "data/forgotten.jsonl": "\n",
    "metrics/learning_curve.json": '{"points": []}\n',
    "models/champion.json": '{"version": null}\n',
}
README = """# {name}

A chat model that is fine-tuned on its own conversations, with Whetstone. `make help` lists the targets:

- `make repro` makes the environment and runs the pipeline: on the sample conversations, or on those that
  `python -m fine_tuning import FILE` brought in.
- `make chat` opens the app.
- `make round` takes in what was said, trains, compares and commits the verdict.

`params.yaml` has every parameter, `python -m fine_tuning --help` every command.
"""


def new(arguments: argparse.Namespace) -> None:
    """Write the project, bring in the sample conversations, and commit."""
    folder = arguments.folder.resolve()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{above} is a file: choose another folder")
    if above == folder and any(folder.iterdir()):
        raise UserError(f"{folder} already exists and is not empty: choose another folder")
    if shutil.which("git") is None:
        raise UserError("git is missing: install it, and try again")
    with making_folder(folder) as made:
        ignored = shutil.ignore_patterns("__pycache__", IN_WHEEL.name if IN_WHEEL.is_dir() else "")
        shutil.copytree(PACKAGE, made / PACKAGE.name, ignore=ignored)
        for name, source in parts().items():
            target = made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copyfile(source, target)
        for name, text in STATE.items():
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text(text)
        (made / "README.md").write_text(README.format(name=folder.name))
        git(made, "init", "-q", "-b", "main")
    sample = subprocess.run([sys.executable, "-m", "fine_tuning", "sample"], cwd=folder, capture_output=True, text=True)
    git(folder, "add", "-A")
    committed = git(folder, "commit", "-qm", "Start a project", needed=False)
    print(f"{folder} is a project. Next:")
    print(f"  cd {arguments.folder}")
    print("  make repro        # an environment in .venv, then the pipeline on the sample conversations")
    if not sample.returncode:
        print("  dvc repro         # or the pipeline in the current environment")
    print("  make chat         # the app")
    if not committed:
        print("nothing is committed: git has no name and e-mail: `git config --global user.name` and `user.email`")


def parts() -> dict[str, Path]:
    """What belongs to a project beside the package, by its place there: of a wheel, or of the checkout that this is."""
    checkout = PACKAGE.parent
    if IN_WHEEL.is_dir():
        files = (path for path in IN_WHEEL.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(IN_WHEEL).as_posix(): path for path in files}
    wheel = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    return {name: checkout / name for name in wheel["force-include"]}


def git(folder: Path, *words: str, needed: bool = True) -> bool:
    """Run git in `folder`; whether it could."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode and needed:
        raise UserError(f"git {words[0]} failed in {folder}: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0
