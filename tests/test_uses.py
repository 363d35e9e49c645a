"""The four uses of the project, as a user types them: new conversations, experiments, differences, remotes."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from fine_tuning.common.dvc_files import md5_path
from fine_tuning.common.project import sha256_file
from tests.browser import until
from tests.forked import INTERPRETER
from tests.project import Project

pytestmark = pytest.mark.end_to_end

WEIGHTS = "models/adapter/adapter_model.safetensors"


@pytest.fixture
def trained(trained_project) -> Project:
    return trained_project


def read(project: Project, name: str):
    return json.loads((project.folder / name).read_bytes())


def test_the_pipeline_leaves_a_bundle_a_verdict_and_nothing_to_do(trained):
    assert {file.name for file in (trained.folder / "models/package").iterdir()} >= {
        "model.gguf",
        "Modelfile",
        "create.json",
    }
    assert read(trained, "metrics/comparison.json")["verdict"] in ("PROMOTE", "HOLD", "INCONCLUSIVE")
    assert "up to date" in trained.run("dvc", "repro")
    summary = trained.run("python", "-m", "fine_tuning", "summary")
    assert read(trained, "metrics/comparison.json")["verdict"] in summary
    assert "Modelfile" in summary


def test_an_objective_without_anything_to_learn_from_is_refused_before_the_adapter_is_gone(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    before = sha256_file(project.folder / WEIGHTS)
    for objective, lacking in (("dpo", "has no pair"), ("kto", "of 0 single thumbs")):
        project.set_params(train={"objective": objective})
        said = project.run("dvc", "repro", check=False)
        assert f"error: params.yaml: train.objective = {objective}, and " in said and lacking in said
        assert sha256_file(project.folder / WEIGHTS) == before


def test_new_conversations_are_trained_on_by_the_next_repro(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    before, adapter = read(project, "metrics/clean.json"), _adapter(project)
    project.run(
        "python",
        "-c",
        "from fine_tuning.data_collection.conversation_logger import ConversationLogger as L\n"
        "log = L('inbox/conversations.jsonl')\n"
        "for n in range(20):\n"
        "    log.log_conversation(f'What does lamp number {n} cost here?', f'Lamp {n} costs {n + 10} euros today.',"
        " {'session_id': f's{n}'})",
    )
    project.run("python", "-m", "fine_tuning", "seal")
    output = project.run("dvc", "repro")
    assert "Stage 'base' didn't change" in output
    after = read(project, "metrics/clean.json")
    assert after["kept"] == before["kept"] + 20
    assert _adapter(project) != adapter


def test_an_experiment_changes_a_parameter_and_shows_beside_the_others(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    adapter = _adapter(project)
    project.run("dvc", "exp", "run", "-n", "faster", "-S", "train.learning_rate=1.0e-2")
    assert _adapter(project) != adapter
    assert yaml.safe_load((project.folder / "params.yaml").read_text())["train"]["learning_rate"] == 0.01
    table = project.run("dvc", "exp", "show", "--csv", "--no-pager")
    assert "faster" in table
    assert "train.learning_rate" in table


@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_the_stage_trains_on_two_processes_when_a_parameter_says_so(trained, tmp_path, launch):
    project = trained.copy(tmp_path / "two")
    one = json.loads((project.folder / "metrics/train.json").read_text())
    runs = _runs(project)
    project.set_params(train={"launch": launch})
    output = project.run("dvc", "repro", "train")
    two = json.loads((project.folder / "metrics/train.json").read_text())
    assert two["validation_loss_before"] == pytest.approx(one["validation_loss_before"], abs=1e-5)
    assert two["steps"] == one["steps"]
    assert two["validation_loss"] < two["validation_loss_before"]
    # Only one of the two writes and tells, how quickly and how long still.
    assert output.count("train: lora on") == 1
    assert re.search(r"train: step 4 of 4, loss \d\.\d+, \d+ tokens/s, 00:00 left", output)
    assert _runs(project) == runs + 2


@pytest.mark.parametrize("launch", ["single", "ddp"])
def test_what_training_refuses_is_one_line_however_many_processes_meet_it(trained, tmp_path, launch):
    project = trained.copy(tmp_path / "refused")
    project.set_params(train={"launch": launch, "learning_rate": 1e30, "max_grad_norm": 1e30})
    output = project.run("python", "-m", "stages.train", check=False)
    assert output.count("error: ") == 1 and "lower train.learning_rate" in output
    assert "Traceback" not in output


def test_an_experiment_in_a_temporary_copy_tracks_its_run_in_the_main_checkout(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    before = _runs(project)
    project.run("dvc", "exp", "run", "--temp", "-n", "aside", "-S", "train.lora.rank=4")
    assert _runs(project) == before + 2  # the run of the pipeline and, nested in it, that of the training
    assert not list((project.folder / ".dvc/tmp/exps").rglob("mlflow.db"))


def test_metrics_parameters_and_plots_are_compared_across_commits(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    project.set_params(train={"learning_rate": 0.02})
    project.run("dvc", "repro")
    project.commit("Higher learning rate")
    metrics = json.loads(project.run("dvc", "metrics", "diff", "HEAD~1", "--json"))
    assert metrics["metrics/train.json"]["validation_loss"]["diff"] != 0
    assert "candidate" in project.run("dvc", "metrics", "diff", "HEAD~1")
    params = json.loads(project.run("dvc", "params", "diff", "HEAD~1", "--json"))
    changed = params["params.yaml"]["train.learning_rate"]
    assert (changed["old"], changed["new"]) == (0.002, 0.02)
    page = project.run("dvc", "plots", "diff", "HEAD~1", "-o", "plots").strip().splitlines()[-1]
    assert (project.folder / "plots/index.html").is_file(), page


def test_another_clone_pulls_data_and_adapter_and_has_nothing_to_do(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    project.run("dvc", "remote", "add", "-d", "storage", str(tmp_path / "storage"))
    project.commit("Add a remote")
    project.run("dvc", "push")
    project.run("git", "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    clone.run("dvc", "pull")
    assert _adapter(clone) == _adapter(project)
    assert sorted(os.listdir(clone.folder / "data/conversations")) == sorted(
        os.listdir(project.folder / "data/conversations")
    )
    assert "up to date" in clone.run("dvc", "repro")


def test_verify_rebuilds_the_same_bytes_and_names_the_stage_that_gives_others(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    verify = ("python", "-m", "fine_tuning", "verify", "--rebuild")
    # From an adapter that only the checkout's own store knows.
    project.set_params(train={"start_from": sha256_file(project.folder / WEIGHTS)[:12]})
    project.run("dvc", "repro")
    project.commit("Go on")
    assert "all 9 stages give the bytes" in project.run(*verify, forked=False)
    lock = project.folder / "dvc.lock"
    locked = yaml.safe_load(lock.read_text())
    prepared = next(out for out in locked["stages"]["prepare"]["outs"] if out["path"] == "data/prepared")
    prepared["md5"] = "0" * 32 + ".dir"
    lock.write_text(yaml.safe_dump(locked))
    project.commit("Another hash")
    assert "prepare is the first stage that gives other bytes: data/prepared" in project.run(*verify, check=False)


def test_a_sweep_trains_every_combination_and_shows_them_in_one_table(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    runs = _runs(project)
    project.run(
        "dvc", "exp", "run", "--queue", "-S", "train.learning_rate=1.0e-4,5.0e-3", "-S", "train.lora.rank=2"
    )  # fmt: skip
    _work_off_queue(project)
    rows = list(csv.DictReader(io.StringIO(project.run("dvc", "exp", "show", "--csv", "--no-pager"))))
    tried = {(row["train.learning_rate"], row["train.lora.rank"]) for row in rows if row["Experiment"]}
    assert tried == {("0.0001", "2"), ("0.005", "2")}
    names = [row["Experiment"] for row in rows if row["Experiment"]]
    project.run("dvc", "plots", "diff", *names, "-o", "plots")
    page = (project.folder / "plots/index.html").read_text()
    assert all(f'"{name}"' in page for name in names) and "validation_loss" in page and "grad_norm" in page
    # All of them, and each one's curves, in the one store of the main checkout.
    assert _runs(project) == runs + 4
    shown = project.run("python", "-m", "fine_tuning", "experiments")
    assert all(name in shown for name in names) and "train.learning_rate" in shown and "train.seed" not in shown
    assert "train.lora.rank 2" in shown and len(min(shown.splitlines()[2:], key=len)) <= 100
    drawing = ElementTree.parse(project.folder / "metrics/experiments.svg").getroot()
    legend = " ".join(element.text or "" for element in drawing.iter() if element.tag.endswith("text"))
    assert all(name in legend for name in names)
    assert "metrics/experiments.svg" not in project.run("git", "status", "--porcelain")


def _work_off_queue(project: Project) -> None:
    """`dvc queue start`, again where DVC's worker took a busy machine's silence for an empty queue and ended."""
    try:
        for _ in range(900):
            states = project.run("dvc", "queue", "status")
            assert "Failed" not in states, states
            if "Queued" not in states and "Running" not in states:
                return
            if "0 active, 0 idle" in states:
                project.run("dvc", "queue", "start")
            time.sleep(2)
        raise AssertionError(f"the queue does not empty:\n{states}")
    finally:
        project.run("dvc", "queue", "stop", "--kill", check=False)


def test_without_an_experiment_there_is_nothing_to_compare(trained):
    assert "error: there is no experiment yet" in trained.run("python", "-m", "fine_tuning", "experiments", check=False)


def _adapter(project: Project) -> bytes:
    return (project.folder / WEIGHTS).read_bytes()


def _runs(project: Project) -> int:
    import sqlite3

    with sqlite3.connect(project.folder / "mlflow.db") as database:
        return database.execute("select count(*) from runs").fetchone()[0]


def test_the_loss_curve_grows_while_training_runs(trained, tmp_path):
    project = trained.copy(tmp_path / "project")
    project.set_params(train={"max_steps": 100_000, "schedule": "constant"})
    curve, command = project.folder / "metrics/plots/train_loss.csv", [INTERPRETER, "-m", "dvc", "repro", "train"]
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    with subprocess.Popen(command, cwd=project.folder, env=environment, start_new_session=True) as run:
        try:
            until(lambda: curve.exists() and len(curve.read_text().splitlines()) > 3)
            project.run("dvc", "plots", "show", "--json", "-o", "shown", "metrics/plots/train_loss.csv")
            assert run.poll() is None, "it had ended before"
        finally:
            os.killpg(run.pid, signal.SIGKILL)


def test_a_training_run_names_its_data_sets(trained):
    import sqlite3

    with sqlite3.connect(trained.folder / "mlflow.db") as database:
        query = "select value, digest from input_tags join inputs using (input_uuid) "
        query += "join datasets on source_id = dataset_uuid"
        named = set(database.execute(query))
    for split in ("train", "validation"):
        assert (split, md5_path(trained.folder / f"data/prepared/{split}")) in named
