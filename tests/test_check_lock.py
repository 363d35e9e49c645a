"""The committed dvc.lock is what running the pipeline gives, or .ci/run fails and says where."""

import sys
from pathlib import Path

import pytest
import yaml

from fine_tuning.common.records import read_json, write_json
from tests import check_lock
from tests.check_lock import MADE_ON, check, this_machine
from tests.registered import sh

PIPELINE = """
stages:
  first:
    cmd: {python} first.py
    deps: [first.py]
    params: [size]
    outs: [data/first]
  second:
    cmd: cp data/first/numbers metrics/second.json
    deps: [data/first]
    metrics: [metrics/second.json: {{cache: false}}]
"""
SCRIPT = """
import pathlib, yaml
pathlib.Path("data/first").mkdir(parents=True)
pathlib.Path("data/first/numbers").write_text(str(yaml.safe_load(open("params.yaml"))["size"]))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A committed pipeline that has run, with the note of the machine it ran on; the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "first.py").write_text(SCRIPT)
    (tmp_path / "params.yaml").write_text("size: 3\n")
    (tmp_path / "dvc.yaml").write_text(PIPELINE.format(python=sys.executable))
    (tmp_path / ".gitignore").write_text("/data\n")
    for command in ("git init -q", "git config user.email t@example.org", "git config user.name T", "dvc init -q"):
        sh(tmp_path, command)
    sh(tmp_path, "dvc repro -q")
    commit(tmp_path)
    return tmp_path


def commit(checkout: Path, **machine: object) -> None:
    """Commit, with a note of where the lock was made."""
    write_json(MADE_ON, this_machine() | {"dvc_lock_md5": check_lock.md5_file(Path("dvc.lock"))} | machine)
    sh(checkout, "git add -A && git commit -qm Run")


def edited(path: str, change) -> None:
    """Change one stage's entry in dvc.lock, as nobody should."""
    lock = yaml.safe_load(Path("dvc.lock").read_bytes())
    stage, _, part = path.partition(".")
    change(lock["stages"][stage][part])
    Path("dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def test_a_lock_that_running_gives_again_is_right(checkout):
    sh(checkout, "dvc repro -q --force --no-run-cache")
    assert check(checkout) == []


def test_code_that_never_ran_is_named(checkout):
    Path("first.py").write_text(SCRIPT + "# a change that was never run\n")
    edited("first.deps", lambda deps: deps[0].update(md5=check_lock.md5_file(Path("first.py"))))
    commit(checkout)
    Path("first.py").write_text(SCRIPT + "# and what was run\n")
    sh(checkout, "dvc repro -q")
    assert check(checkout) == ["first: deps first.py"]


@pytest.mark.parametrize(
    ("part", "change", "wrong"),
    [
        ("first.params", lambda params: params["params.yaml"].update(size=4), ["first: params"]),
        ("first.outs", lambda outs: outs[0].update(md5="0" * 32 + ".dir"), ["first: outs data/first"]),
    ],
)
def test_what_running_does_not_give_again_is_named(checkout, part, change, wrong):
    edited(part, change)
    commit(checkout)
    sh(checkout, "dvc repro -q --force --no-run-cache")
    assert check(checkout) == wrong


@pytest.mark.parametrize("other", [{"torch": "1.0"}, {"cpu_flags": ["avx9"]}, {"cores": 999}])
def test_outputs_are_compared_only_on_a_machine_that_computes_alike(checkout, other):
    edited("first.outs", lambda outs: outs[0].update(md5="0" * 32 + ".dir"))
    commit(checkout, **other)
    sh(checkout, "dvc repro -q --force --no-run-cache")
    assert check(checkout) == []


def test_metrics_that_were_edited_are_named_on_any_machine(checkout):
    Path("metrics/second.json").write_text("4")
    commit(checkout, torch="1.0")
    assert check(checkout) == ["second: outs metrics/second.json as committed"]


def test_a_note_about_another_lock_says_nothing(checkout):
    Path("params.yaml").write_text("size: 4\n")
    sh(checkout, "dvc repro -q && git commit -qam 'Run again'")
    assert "about another dvc.lock" in check(checkout)[0]


def test_the_note_is_written_where_everything_has_run(checkout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_lock", "--made-here"])
    Path("params.yaml").write_text("size: 4\n")
    assert check_lock.main() == 1 and "`dvc repro` first" in capsys.readouterr().err
    sh(checkout, "dvc repro -q")
    assert check_lock.main() == 0
    assert read_json(MADE_ON)["torch"] == this_machine()["torch"]
    sh(checkout, "git add -A && git commit -qm 'Run again'")
    assert check(checkout) == []
