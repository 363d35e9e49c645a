"""Where this checkout keeps things, how it talks to git, and which code and packages a result depends on."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fine_tuning.common.errors import UserError

LIBRARY = Path(__file__).parents[1]
# Paths in a checkout that several commands use, as dvc.yaml has them. A stage names its own.
LOG = Path("inbox/conversations.jsonl")  # the live one
FOLLOWED = Path("inbox/followed.json")  # {path: its state when `import --follow` read it}
CONVERSATIONS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
FORGOTTEN = Path("data/forgotten.jsonl")
VOTES = Path("data/votes")
PREPARED = Path("data/prepared")
BASE_CARD = Path("models/base/base.json")
ADAPTER = Path("models/adapter")
PACKAGE = Path("models/package")
EVALUATION = Path("metrics/evaluation.json")
COMPARISON = Path("metrics/comparison.json")
WRITTEN = ("data", "metrics", "models", "dvc.lock")  # by commands and stages: what of it is in git, a round commits
CODE = ("fine_tuning", "stages", "configs")
# Packages that compute what a run writes; their version is part of what the result depends on.
COMPUTING = (
    *("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy", "bitsandbytes"),
    *("gguf", "xllamacpp"),
)


def root() -> Path:
    """The checkout that the current directory is the top of. Raises UserError if the current directory is not the top
    of a checkout."""
    here = Path.cwd()
    if not (here / "dvc.yaml").is_file():
        raise UserError("this is not the project's top folder: change to the folder that holds dvc.yaml")
    return here


def main_checkout(start: Path | None = None) -> Path:
    """The checkout that owns inbox and registry: temporary experiments run in copies below its .dvc/tmp/exps."""
    here = (start or Path.cwd()).resolve()
    parts = here.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return here


def tracking_uri(checkout: Path | None = None) -> str:
    """MLFLOW_TRACKING_URI if set, otherwise the SQLite store of the main checkout by its absolute path."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{main_checkout(checkout) / 'mlflow.db'}"


def artifact_root(checkout: Path | None = None) -> Path:
    """Folder of MLflow artifacts beside the SQLite store."""
    return main_checkout(checkout) / "mlartifacts"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_sha256(stage: str) -> str:
    """SHA-256 of the code that dvc.yaml names as a stage's dependencies, data files among it included."""
    checkout = LIBRARY.parent
    deps = _stages((checkout / "dvc.yaml").read_bytes())[stage]["deps"]
    named = [checkout / dep for dep in deps if dep.startswith(("stages/", f"{LIBRARY.name}/"))]
    files = [file for path in named for file in (path.rglob("*") if path.is_dir() else [path])]
    return files_sha256([file for file in files if file.is_file() and file.suffix != ".pyc"], checkout)


@lru_cache(maxsize=4)
def _stages(pipeline: bytes) -> Any:
    return yaml.safe_load(pipeline)["stages"]


def files_sha256(files: Iterable[Path], folder: Path) -> str:
    """SHA-256 of files below a folder, their paths in it and their contents."""
    lines = (f"{file.relative_to(folder).as_posix()} {sha256_file(file)}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions(others: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that compute and of `others`; "none" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in (*COMPUTING, *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


class MadeBy(NamedTuple):
    """What the results of a stage depend on besides its inputs and settings."""

    stage: str
    code: str  # SHA-256
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def here(cls, stage: str, packages: Iterable[str]) -> "MadeBy":
        """By this checkout, where the versions of `packages` count too."""
        return cls(stage, code_sha256(stage), tuple(versions(packages).items()))


@cache
def other_here(wanted: MadeBy) -> str:
    """Where this process runs other code or versions than are wanted: which; "" where it does not."""
    found = versions(name for name, _ in wanted.versions if name != "python")
    others = [f"{name} {found[name]} instead of {known}" for name, known in wanted.versions if found[name] != known]
    same_code = _code_of_stages().get(wanted.stage) == wanted.code
    return ", ".join(others if same_code else [f"other code of the stage {wanted.stage}", *others])


@cache
def _code_of_stages() -> dict[str, str]:
    """Of all at once: after a `git pull` this process goes on with the modules that it has loaded."""
    return {stage: code_sha256(stage) for stage in _stages((LIBRARY.parent / "dvc.yaml").read_bytes())}


def run_command(*command: str, cwd: Path | None = None) -> str:
    """Run a program and return its standard output. Raises UserError if it fails, with the last line of its error
    output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise UserError(f"`{' '.join(command[:3])}` failed: {reason}")
    return done.stdout


def person_name(given: str | None) -> str:
    """Who acts: the name that was given, else git's user.name. Raises UserError if the name given is empty, longer than
    100 characters, or holds what cannot be printed."""
    if given is not None:
        name = " ".join(given.split())
        if not name or len(name) > 100 or not name.isprintable():
            raise UserError("--by takes the name of a person, in at most 100 printable characters")
        return name
    try:
        return run_command("git", "config", "user.name").strip() or "unknown"
    except UserError:
        return "unknown"


def git_commit(checkout: Path) -> tuple[str | None, bool]:
    """(commit id or None outside git, whether tracked files differ from it; the ledger of looks does after a look)."""
    try:
        commit = run_command("git", "rev-parse", "HEAD", cwd=checkout).strip()
        others = ("--untracked-files=no", "--", ".", ":!data/looks.jsonl")
        dirty = bool(run_command("git", "status", "--porcelain", *others, cwd=checkout).strip())
    except UserError:
        return None, False
    return commit, dirty


def changes_by_hand(checkout: Path) -> list[str]:
    """Files that somebody changed, or added to the code, and did not commit. What commands write there is left out.
    Raises UserError if the folder is outside git, or has no commit."""
    others = [f":(exclude){path}" for path in WRITTEN]
    changed = run_command("git", "diff", "--name-only", "HEAD", "--", ".", *others, cwd=checkout)
    added = run_command("git", "ls-files", "--others", "--exclude-standard", "--", *CODE, cwd=checkout)
    return [*changed.splitlines(), *added.splitlines()]
