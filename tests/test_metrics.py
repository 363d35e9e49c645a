"""Metrics: local `evaluate` modules, equal to their sources, and sums that give them intervals."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import yaml
from rouge_score import rouge_scorer

from fine_tuning.common.errors import UserError
from fine_tuning.evaluation.metric_modules.loading import ItemwiseMetric, columns_of, direction, load_metric
from fine_tuning.evaluation.records.measurements import summarise
from fine_tuning.evaluation.records.settings import metric_names
from tests.evaluation_suite import MODULES, SETTINGS

PREDICTIONS = ["the cat sat on the mat", "", "Der Fluss ist lang und breit und tief.", "日本語のテキストです"]
REFERENCES = ["the cat is on the mat", "nothing here", "Der Fluss ist lang, breit und tief.", "日本語の文章です"]

OWN = '''"""Mean number of question marks."""

import datasets
import evaluate


class Questions(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features({"predictions": datasets.Value("string")})
        )

    def _compute(self, predictions):
        return {"questions": sum(text.count("?") for text in predictions)}
'''


@pytest.fixture(scope="module")
def metrics():
    return {name: load_metric(name, MODULES) for name in SETTINGS.metrics}


def texts(metric, predictions=PREDICTIONS, references=REFERENCES):
    return metric.compute(predictions=predictions, references=references)


def test_perplexity_weighs_tokens_not_batches(metrics):
    value = metrics["perplexity"].compute(nll=[1.0, 30.0], tokens=[1, 99])["perplexity"]
    assert value == pytest.approx(math.exp(31 / 100))


def test_likelihood_a_byte_and_token_accuracy_are_ratios_of_sums(metrics):
    assert metrics["nll_per_byte"].compute(nll=[1.0, 2.0], bytes=[2, 4]) == {"nll_per_byte": 0.5}
    assert metrics["token_accuracy"].compute(correct=[1, 5], tokens=[2, 8]) == {"token_accuracy": 0.6}


def test_bleu_and_chrf_are_sacrebleus_corpus_scores(metrics):
    assert texts(metrics["bleu"])["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score)
    assert texts(metrics["chrf"])["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score)
    assert "version" in metrics["bleu"].signature()
    assert "version" in metrics["chrf"].signature()


def test_rouge_is_rouge_scores_mean_f1_and_serves_other_scripts(metrics):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    # By hand, 2 * common / (words + words of the reference): 3 words, 1 pair, 2 words in their order.
    short, long = "mat the cat", "the cat is on the mat"
    by_hand = {"rouge1": 6 / 9, "rouge2": 2 / 7, "rougeL": 4 / 9}
    scores = scorer.score(long, short)
    for name, value in texts(metrics["rouge"], [short.upper()], [long]).items():
        assert value == pytest.approx(scores[name].fmeasure) == pytest.approx(by_hand[name])
    assert texts(metrics["rouge"], [short, long], [long, long])["rougeL"] == pytest.approx((4 / 9 + 1) / 2)
    assert texts(metrics["rouge"], ["Привет, МИР"], ["Привет мир"])["rouge1"] == 1


def test_exact_match_looks_past_case_and_white_space(metrics):
    assert texts(metrics["exact_match"], ["  Yes\n sir ", "no"], ["yes sir", "yes"]) == {"exact_match": 0.5}
    assert texts(metrics["exact_match"], ["STRASSE"], ["Straße"]) == {"exact_match": 1}


def test_the_shape_of_replies_is_counted(metrics):
    found = metrics["replies"].compute(
        predictions=["go on and on and on and on and on", "", "fine <|im_end|>", "all good"],
        references=["a", "b", "c", "d"],
        finished=[False, True, True, True],
    )
    assert found["self_ended"] == 0.75
    assert found["empty"] == found["loops"] == found["control_tokens"] == 0.25


def test_the_length_of_replies_is_that_of_all_together_and_repeated_words_are_counted_by_hand(metrics):
    found = metrics["replies"].compute(
        predictions=["one two one two", "é"], references=["a" * 30, "bc"], finished=[True, True]
    )
    assert found["length_ratio"] == (15 + 1) / (30 + 2)  # characters
    # Words: 2 of 4 and 1 of 1 differ. Pairs: 2 of 3. Triples: 2 of 2.
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (3 / 5, 2 / 3, 1.0)


def test_a_phrase_is_a_loop_when_it_stands_four_times_in_a_row(metrics):
    twelve = " ".join(f"w{number}" for number in range(12))
    thirteen = f"{twelve} w12"

    def loops(*predictions: str) -> float:
        count = len(predictions)
        found = metrics["replies"].compute(predictions=predictions, references=["x"] * count, finished=[True] * count)
        return found["loops"]

    assert loops("no " * 4, f"so {'I see, ' * 4}bye", f"{twelve} " * 4) == 1
    assert loops("no " * 3, "I see, " * 3, f"{twelve} " * 3, f"{thirteen} " * 4) == 0
    assert loops("a a b c c d e e f g g h i i", "") == 0  # pairs, but not one after the other


def test_empty_replies_and_references_give_numbers_or_nothing(metrics):
    for name in ("bleu", "chrf", "rouge", "exact_match"):
        assert all(np.isfinite(value) for value in texts(metrics[name], [""], ["a reference"]).values())
    assert math.isnan(texts(metrics["bleu"], ["words"], [""])["bleu"])
    assert math.isnan(texts(metrics["chrf"], ["words"], [""])["chrf"])


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge"])
def test_a_corpus_score_comes_from_sums_alone(metrics, name):
    metric = metrics[name]
    statistics = metric.statistics(predictions=PREDICTIONS, references=REFERENCES)
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 0], [0, 0, 0, 3]])
    drawn = metric.values(weights @ statistics)
    for row, counts in enumerate(weights):
        p, r = ([text for text, n in zip(group, counts, strict=True) for _ in range(n)]
                for group in (PREDICTIONS, REFERENCES))  # fmt: skip
        assert {key: values[row] for key, values in drawn.items()} == pytest.approx(texts(metric, p, r))


@pytest.mark.end_to_end
def test_every_metric_also_loads_through_evaluate_itself_without_a_hub(tmp_path):
    script = (
        "import evaluate\n"
        f"for name in {SETTINGS.metrics!r}:\n"
        f"    print(evaluate.load({str(MODULES)!r} + f'/{{name}}.py').name)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(MODULES.parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == SETTINGS.metrics, done.stderr[-2000:]


def test_every_file_of_the_folder_is_a_metric(metrics):
    assert set(metric_names()) == set(metrics) == {path.stem for path in MODULES.glob("*.py")} - {"__init__", "loading"}
    assert all(columns_of(metric) for metric in metrics.values())


def test_a_users_own_module_is_averaged_over_items(tmp_path):
    (tmp_path / "questions.py").write_text(OWN)
    metric = load_metric("questions", tmp_path)
    assert isinstance(metric, ItemwiseMetric)
    statistics = metric.statistics(predictions=["a?", "b??", "c", "d"])
    assert metric.values(statistics.sum(axis=0)) == {"questions": 0.75}


def test_a_foreign_file_in_the_temporary_folder_breaks_no_metric(tmp_path, monkeypatch):
    for name in SETTINGS.metrics:
        (tmp_path / name).write_text("somebody else's")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in SETTINGS.metrics:
        load_metric(name, MODULES)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"somebody else's"}


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("missing", None, r"does not exist: choose among own"),
        ("own", "import nothing_of_this_name\n", "does not load: ModuleNotFoundError"),
        ("own", "x = 1\n", "defines 0 evaluate.Metric classes"),
        ("own", OWN.replace('"predictions"', '"moods"'), "wants columns that no item has: moods"),
    ],
)
def test_a_bad_module_is_one_clear_line(tmp_path: Path, name, source, words):
    (tmp_path / "own.py").write_text(source or OWN)
    with pytest.raises(UserError, match=words):
        load_metric(name, tmp_path)


def test_each_value_knows_whether_more_is_better(metrics):
    less = {("perplexity",) * 2, ("nll_per_byte",) * 2, *(("replies", n) for n in ("empty", "loops", "control_tokens"))}
    more = {(name,) * 2 for name in ("token_accuracy", "bleu", "chrf", "exact_match")}
    more |= {("rouge", n) for n in ("rouge1", "rouge2", "rougeL")}
    more |= {("replies", n) for n in ("self_ended", "distinct_1", "distinct_2", "distinct_3")}
    expected = dict.fromkeys(less, -1) | dict.fromkeys(more, 1) | {("replies", "length_ratio"): 0}
    assert {pair: direction(metrics[pair[0]], pair[1]) for pair in expected} == expected
    assert {module for module, _ in expected} == set(metrics)


def test_the_pipeline_runs_again_when_a_metric_or_a_general_question_changes():
    # Read by path, so that no test of imports sees them.
    stages = yaml.safe_load((MODULES.parents[2] / "dvc.yaml").read_text())["stages"]
    assert "fine_tuning/evaluation/metric_modules" in stages["evaluate"]["deps"]
    assert "fine_tuning/evaluation/metric_modules" in stages["compare"]["deps"]
    assert "fine_tuning/evaluation/suite" in stages["evaluate"]["deps"]
    assert len(list((MODULES.parent / "suite").glob("general_*.jsonl"))) == 2


def test_no_interval_of_a_share_reaches_beyond_all_or_none(metrics):
    """With one reply in twenty that does not end by itself the interval's end lies above 1, and is 1."""
    reply = {"predictions": "one two", "references": "one two three four five six"}
    lines = [reply | {"cluster": str(number), "finished": number > 0} for number in range(20)]
    found = summarise(lines, [metrics["replies"]], SETTINGS.interval)
    assert found["self_ended"]["value"] == pytest.approx(0.95) and found["self_ended"]["low"] < 0.9
    assert found["self_ended"]["high"] == 1 and found["loops"]["low"] == 0
    longer = summarise([line | {"references": "one"} for line in lines], [metrics["replies"]], SETTINGS.interval)
    assert longer["length_ratio"]["high"] > 1
