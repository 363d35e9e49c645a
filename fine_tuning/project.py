"""Where this checkout keeps things, and how it talks to DVC and git. The commands and the app use it; stages do not."""

import hashlib
import os
import subprocess
from pathlib import Path

from fine_tuning.errors import UserError


def root() -> Path:
    """The checkout that the current directory is the top of.

    Raises:
        UserError: the current directory is not the top of a checkout.
    """
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


def run_command(*command: str, cwd: Path | None = None) -> str:
    """Run a program and return its standard output.

    Raises:
        UserError: it failed; carries the last line of its error output.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise UserError(f"`{' '.join(command[:3])}` failed: {reason}")
    return done.stdout


def git_commit(checkout: Path) -> tuple[str | None, bool]:
    """(commit id or None outside git, whether tracked files differ from it)."""
    try:
        commit = run_command("git", "rev-parse", "HEAD", cwd=checkout).strip()
        dirty = bool(run_command("git", "status", "--porcelain", "--untracked-files=no", cwd=checkout).strip())
    except UserError:
        return None, False
    return commit, dirty
