"""verify --rebuild: run the committed pipeline once more in a copy and name the first stage that gives other bytes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fine_tuning.common.dvc_files import cache_folder, read_lock
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import git_commit, root, run_command
from fine_tuning.common.protection import protect
from fine_tuning.common.settings import read_params
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.tracking import checkout_store, find_adapter


def rebuild() -> int:
    """Rebuild HEAD stage by stage; 0 if every output has the hash that dvc.lock names, 1 at the first that has not.
    Raises UserError if there is no committed dvc.lock, or its conversations are not in this checkout's cache."""
    checkout = root()
    commit, dirty = git_commit(checkout)
    if commit is None or not (checkout / "dvc.lock").is_file():
        raise UserError("there is no committed dvc.lock to rebuild from: run `dvc repro` and commit")
    if dirty:
        print("rebuild: uncommitted changes are left out, HEAD is rebuilt")
    with tempfile.TemporaryDirectory(prefix="rebuild-") as folder:
        copy = Path(folder) / "checkout"
        run_command("git", "clone", "-q", "--shared", str(checkout), str(copy))
        protect(copy)
        run_command(*DVC, "cache", "dir", "--local", str(cache_folder(checkout)), cwd=copy)
        for tracked in ("data/conversations.dvc", "models/champion.dvc"):
            try:
                if (copy / tracked).is_file():
                    run_command(*DVC, "checkout", tracked, cwd=copy)
            except UserError:
                raise UserError(f"{tracked} of HEAD is not in DVC's cache: `dvc pull {tracked}`") from None
        _fetch_start(checkout, copy)
        expected = _outputs(copy)
        for stage in expected:
            print(f"rebuild: {stage}", flush=True)
            # Its runs go into a store of the copy's own, not into the checkout's.
            environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{copy / 'mlflow.db'}"}
            command = [*DVC, "repro", "--quiet", "--single-item", "--force", "--no-run-cache", stage]
            if subprocess.run(command, cwd=copy, env=environment).returncode != 0:
                print(f"rebuild: the stage {stage} failed")
                return 1
            found = _outputs(copy)[stage]
            paths = sorted(expected[stage].keys() | found.keys())
            if different := [path for path in paths if expected[stage].get(path) != found.get(path)]:
                print(f"rebuild: {stage} is the first stage that gives other bytes: {', '.join(different)}")
                return 1
    print(f"rebuild: all {len(expected)} stages give the bytes that dvc.lock of {commit[:8]} names")
    return 0


DVC = (sys.executable, "-m", "dvc")


def _fetch_start(checkout: Path, copy: Path) -> None:
    """Give the copy the adapter that its training starts from: the copy's own store knows none."""
    settings = read_params("train", TrainSettings, copy / "params.yaml")
    if settings.start_from:
        find_adapter(*checkout_store(checkout), settings.start_from, copy / ".whetstone/start")


def _outputs(checkout: Path) -> dict[str, dict[str, Any]]:
    """Hash of each output by path, by stage that has some, in the order in which stages run."""
    locked = read_lock(checkout / "dvc.lock")
    # dvc.yaml lists the stages so that each comes after those it reads from.
    names = yaml.safe_load((checkout / "dvc.yaml").read_bytes())["stages"]
    outs = {stage: locked[stage].get("outs") for stage in names if stage in locked}
    return {stage: {out["path"]: out.get("md5") for out in made} for stage, made in outs.items() if made}
