"""`new FOLDER`: from a checkout and from the wheel, a project in which the pipeline knows all that it reads."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.project import ROOT

pytestmark = pytest.mark.end_to_end

IDENTITY = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = os.environ | {"PATH": path} | IDENTITY | environment
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)


def new(folder: Path, library: Path) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "fine_tuning", "new", str(folder), cwd=folder.parent, PYTHONPATH=str(library))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install` of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.parametrize("origin", ["checkout", "wheel"])
def test_a_new_project_is_committed_and_has_all_that_the_pipeline_reads(tmp_path, installed, origin):
    folder = tmp_path / "mine"
    done = new(folder, ROOT if origin == "checkout" else installed)
    assert done.returncode == 0, done.stderr
    assert "make repro" in done.stdout
    status = run("git", "status", "--porcelain", cwd=folder)
    assert (status.returncode, status.stdout) == (0, "")
    tracked = run("git", "ls-files", cwd=folder).stdout.splitlines()
    assert {"dvc.yaml", "params.yaml", "stages/train.py", "fine_tuning/commands/new.py"} <= set(tracked)
    assert not [name for name in tracked if "__pycache__" in name or name.startswith("fine_tuning/project/")]
    ran = run("dvc", "repro", "params", "intake", cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Inputs that neither are there nor come from an earlier stage would be named here.
    asked = run("dvc", "status", cwd=folder)
    assert asked.returncode == 0 and "deleted:            fine_tuning" not in asked.stdout
    missing = [line.split()[-1] for line in asked.stdout.splitlines() if "deleted:" in line]
    assert all(name.startswith(("models/", "data/", "metrics/")) for name in missing), missing
    # What `make help` lists and the README names is there.
    helped = run("make", "help", cwd=folder).stdout
    assert "make repro" in helped and "make lint" not in helped
    named = set(re.findall(r"`make (\w+)`", (folder / "README.md").read_text()))
    assert named == {name for name in named if f"make {name} " in helped} > {"repro"}
    again = new(tmp_path / "second", folder)
    assert again.returncode == 0 and (tmp_path / "second/dvc.yaml").is_file(), again.stderr


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    done = new(tmp_path / "mine", ROOT)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("mine already exists and is not empty: choose another folder")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("folder", ["notes.txt", "notes.txt/deep/project"])
def test_a_file_in_the_way_is_one_line(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "fine_tuning", "new", folder]
    done = run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("notes.txt is a file: choose another folder")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_link_that_leads_nowhere_becomes_the_project_where_it_leads(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "project")
    done = new(tmp_path / "link", ROOT)
    assert done.returncode == 0 and (tmp_path / "project/dvc.yaml").is_file(), done.stderr


def test_without_a_git_identity_it_says_what_to_do(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    unknown = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {
        "PATH": path, "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "user.useConfigOnly", "GIT_CONFIG_VALUE_0": "true", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "fine_tuning", "new", "mine"]
    done = subprocess.run(command, cwd=tmp_path, env=unknown, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "git config --global user.name" in done.stdout
