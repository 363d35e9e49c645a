"""Public benchmarks: lm-evaluation-harness asks base and candidate, each question once, with paired intervals."""

import importlib.util
import json
from collections import Counter

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.common.results import Memo
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.records.measurements import BENCHMARKS, GUARDS, golden_lead, guard_metrics
from fine_tuning.evaluation.scoring.benchmarks import HARNESS, Benchmarks
from fine_tuning.evaluation.scoring.scorer import scoring_hardware
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge
from fine_tuning.evaluation.verdict.comparison import compare
from tests.evaluation_suite import MODULES, SETTINGS, THINGS, build_suite, evaluator_of
from tests.test_comparison import SETTINGS as COMPARE
from tests.test_pipeline import ROOT

pytestmark = pytest.mark.end_to_end

CHOICE = """\
task: where_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{[answer, other]}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SPOKEN = """\
task: where_spoken
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "in the box"
filter_list:
  - name: box
    filter: [{function: regex, regex_pattern: "(in the box)"}, {function: take_first}]
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 24}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def suite(tiny_base, tmp_path_factory):
    return build_suite(tmp_path_factory.mktemp("suite"), tiny_base)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks about what the candidate was trained on, in their files."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"Where is the {thing}?",
            "answer": f"The {thing} is in the box, number {index}.",
            "other": f"A {thing} was not on any table, never {index}.",
        }
        for index, thing in enumerate(THINGS)
    ]
    (folder / "where.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, text in (("choice", CHOICE), ("spoken", SPOKEN)):
        (folder / f"{name}.yaml").write_text(text % {"data": folder / "where.jsonl"})
    return folder


@pytest.fixture(scope="module")
def lines(suite, tasks, tmp_path_factory):
    memo, hardware = Memo(tmp_path_factory.mktemp("memo"), "evaluate"), scoring_hardware(1)
    benchmarks = Benchmarks(["where_choice", "where_spoken"], None, tasks)
    return [line for one in (suite.base, suite.candidate) for line in benchmarks.ask(one, None, hardware, memo)], memo


def test_each_question_of_a_local_task_is_a_line_of_each_model(lines):
    found, _ = lines
    assert {(line["contender"], line["metric"]) for line in found} == {
        (name, metric)
        for name in ("base", "candidate")
        for metric in ("where_choice/acc", "where_spoken/exact_match/box")
    }
    assert len(found) == 4 * len(THINGS)
    assert all(line["better"] == 1 and line["value"] in (0, 1) for line in found)
    sums = Counter()
    for line in found:
        sums[line["contender"], line["metric"]] += line["value"]
    assert sums["base", "where_spoken/exact_match/box"] == 0
    assert sums["candidate", "where_spoken/exact_match/box"] > len(THINGS) / 2
    assert sums["candidate", "where_choice/acc"] == len(THINGS)


def test_a_model_is_asked_a_question_once(lines, suite, tasks, monkeypatch):
    found, memo = lines
    monkeypatch.setattr("fine_tuning.evaluation.scoring.benchmarks.loaded", lambda *_: pytest.fail("asked again"))
    again = Benchmarks(["where_choice", "where_spoken"], None, tasks)
    own = [line for line in found if line["contender"] == "base"]
    assert again.ask(suite.base, None, scoring_hardware(1), memo) == own
    for benchmarks, prompt in ((Benchmarks(["where_choice"], 3, tasks), None), (again, "Be brief.")):
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            benchmarks.ask(suite.base, prompt, scoring_hardware(1), memo)
    changed = (tasks / "where.jsonl").read_text()
    (tasks / "where.jsonl").write_text(changed.replace("fox", "cat"))
    try:
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            Benchmarks(again.names, None, tasks).ask(suite.base, None, scoring_hardware(1), memo)
    finally:
        (tasks / "where.jsonl").write_text(changed)


def test_benchmarks_stand_beside_the_suite_with_paired_intervals_and_decide_nothing(lines, suite, tmp_path):
    evaluator = evaluator_of(suite.items, suite.base.folder, tmp_path)
    records = [line for one in (suite.base, suite.candidate) for line in evaluator.evaluate(one)[0]]
    metrics = [load_metric(name, MODULES) for name in SETTINGS.metrics]
    found, without = (
        compare(records, metrics, COMPARE, SETTINGS.interval, {BENCHMARKS: asked}) for asked in (lines[0], [])
    )
    row = found["differences"]["base"]["where_spoken/exact_match/box"]
    assert 0 < row["low"] <= row["difference"] <= row["high"]
    assert (row["n"], row["better"]) == (len(THINGS), 1)
    assert found["verdict"] == without["verdict"]
    table = guard_metrics({name: lines[0] if name == BENCHMARKS else [] for name in GUARDS}, 0.95)
    assert table["base"]["where_spoken/exact_match/box"]["n"] == len(THINGS)
    swapped = {"base": "candidate", "candidate": "base"}
    worse = [line | {"contender": swapped[line["contender"]]} for line in lines[0]]
    worse = [line | ({"value": 1.0} if line["id"].endswith("/0") else {}) for line in worse]  # otherwise without spread
    reasons = compare(records, metrics, COMPARE, SETTINGS.interval, {BENCHMARKS: worse})["reasons"]
    assert any(reason.startswith("surely worse: where_spoken/exact_match/box") for reason in reasons)


def test_the_example_says_what_the_projects_own_evaluation_says_of_the_same_questions(suite, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    benchmarks = Benchmarks(["general_questions"], 40, ROOT / "configs/benchmarks")
    found = benchmarks.ask(suite.base, None, scoring_hardware(1), Memo(tmp_path, "evaluate"))
    evaluator = evaluator_of(suite.items, suite.base.folder, tmp_path)
    items = general_items(evaluator.tokenizer, None, 200)
    own = knowledge("base", items, evaluator.score(suite.base, items))[:40]
    assert {line["value"] for line in found} == {0, 1}
    same = [line["value"] == (golden_lead(asked) > 0) for line, asked in zip(found, own, strict=True)]
    assert sum(same) >= 36  # the harness tokenises question and answer apart


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_task", "names no_such_task, which is no task"),
        ("gone", "the data of gone are not at hand"),
        ("where_choice_helped", "needs more: `pip install no_such_module`"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(tasks, tmp_path, name, words):
    (tmp_path / "gone.yaml").write_text(CHOICE.replace("where_choice", "gone") % {"data": tmp_path / "none.jsonl"})
    (tmp_path / "helper.py").write_text("import no_such_module\n")
    helped = CHOICE.replace("where_choice", "where_choice_helped").replace('"{{question}}"', "!function helper.text")
    (tmp_path / "helped.yaml").write_text(helped % {"data": tasks / "where.jsonl"})
    with pytest.raises(UserError, match=words) as refused:
        Benchmarks([name], None, tmp_path)
    assert "\n" not in str(refused.value)


def test_without_the_harness_the_line_names_what_to_install(tasks, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UserError, match=f"pip install {HARNESS}`"):
        Benchmarks(["ifeval"], None, tasks)
    assert HARNESS in (ROOT / "requirements-dev.txt").read_text().splitlines()
