"""The learning curve: real training on shares of the data, kept and drawn; the pipeline's files stay as they are."""

import json
import math
import shutil
from argparse import Namespace

import pytest
import yaml

from fine_tuning.commands import learning_curve as command
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import write_json
from fine_tuning.evaluation.learning_curve import advice, measure, parse_fractions, share
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.records.record_types import Likelihood
from fine_tuning.evaluation.report.charts import curve, standalone
from fine_tuning.evaluation.suite.items import read_items
from fine_tuning.schema.chat_format import load_tokenizer
from fine_tuning.schema.prepared import PreparedRow
from tests.evaluation_suite import MODULES, SETTINGS, conversation, write_items
from tests.project import ROOT

ROWS = [PreparedRow(str(index), [1] * 10, [1] * 10) for index in range(8)]


def test_a_share_is_the_first_conversations_with_that_part_of_the_tokens():
    assert [len(share(ROWS, fraction)) for fraction in (0.01, 0.25, 0.5, 1.0)] == [1, 2, 4, 8]
    assert share(ROWS, 0.5) == ROWS[:4]
    assert (
        len(share([ROWS[0], PreparedRow("long", [1] * 30, [1] * 30), ROWS[1]], 0.7)) == 1
    )  # the second would be too much


@pytest.mark.parametrize("text", ["", "1", "0,1", "0.5,2", "half,1"])
def test_shares_that_are_none_are_one_clear_line(text):
    with pytest.raises(UserError, match=r"give two or more shares of the data, such as 0\.25,0\.5,1"):
        parse_fractions(text)


@pytest.fixture(scope="module")
def items(tiny_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "validation"
    told = {f"v{index:02d}": conversation(f"Where is {index}?", f"There, {index}.") for index in range(12)}
    return read_items(write_items(path, tiny_base, told), load_tokenizer(tiny_base))


def points_of(items, nats):
    """A curve whose every share makes every token so likely, and some items a little more than others."""

    def scores_of(rows):
        value = nats[len(rows)]
        return [Likelihood([(5 * (value + 0.01 * (i % 3)), 5, 2)]) for i, _ in enumerate(items)]

    metrics = [load_metric("perplexity", MODULES)]
    return measure(ROWS, [0.25, 0.5, 1.0], items, scores_of, metrics, SETTINGS.interval)


def test_each_point_has_an_interval_and_the_paired_change_since_the_one_before(items):
    points = points_of(items, {2: 3.0, 4: 2.5, 8: 2.4})
    assert [point["conversations"] for point in points] == [2, 4, 8]
    assert [point["tokens"] for point in points] == [20, 40, 80]
    # Of twelve items a third each is 0, 0.01 and 0.02 nats less likely.
    assert [point["perplexity"] for point in points] == pytest.approx([math.exp(n + 0.01) for n in (3.0, 2.5, 2.4)])
    assert "change" not in points[0]
    assert points[2]["change"]["difference"] == pytest.approx(math.exp(2.41) - math.exp(2.51))
    assert all(point["low"] <= point["perplexity"] <= point["high"] for point in points)
    assert points[2]["change"]["high"] < 0
    assert "more conversations are likely to help" in advice(points)
    assert "changes nothing for certain" in advice(points_of(items, {2: 3.0, 4: 2.4, 8: 2.4}))
    assert "raises perplexity" in advice(points_of(items, {2: 3.0, 4: 2.4, 8: 2.5}))


def test_the_curve_is_a_drawing_of_its_own(items):
    drawing = standalone(curve(points_of(items, {2: 3.0, 4: 2.5, 8: 2.4})), "learning curve")
    assert drawing.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert drawing.count("<circle") == 3
    assert "not measured" in curve([])


def test_the_command_trains_and_keeps_what_it_measured(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "models/base")
    write_json("models/base/base.json", {"model": "tiny", "revision": None, "sha256": "0" * 64})
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["train"] |= {"max_steps": 4, "threads": 1, "validations": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "fine_tuning").symlink_to(ROOT / "fine_tuning")
    for split, count in (("train", 12), ("validation", 4)):
        told = {f"{split}{i}": conversation(f"Where is the {i}?", f"It is in box {i}.") for i in range(count)}
        write_items(tmp_path / f"data/prepared/{split}", tiny_base, told)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}

    command.learning_curve(Namespace(fractions="0.5,1"))
    found = json.loads((tmp_path / "metrics/learning_curve.json").read_text())
    assert [point["conversations"] for point in found["points"]] == [6, 12]
    assert "validation perplexity" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"base"}
    assert {path: path.read_bytes() for path in before} == before

    # A second time nothing is trained again.
    monkeypatch.setattr("fine_tuning.training.lora_trainer.train_adapter", None)
    command.learning_curve(Namespace(fractions="0.5,1"))
    assert json.loads((tmp_path / "metrics/learning_curve.json").read_text()) == found
