"""A promoted model is what later ones are compared with, whatever data, parameters and base come after it."""

import json

import pyarrow.parquet
import pytest

from fine_tuning.common.errors import count_of
from tests.project import Project, conversations, new_project
from tests.tiny import write_tiny_base

pytestmark = pytest.mark.end_to_end


def test_the_champion_is_a_baseline_of_what_comes_after_it_on_another_base_too(tmp_path, tiny_base):
    project = new_project(tmp_path / "project", tiny_base)
    project.set_params(compare={"minimum_conversations": 2, "minimum_against_champion": 2})
    project.import_conversations(conversations(), "first")
    project.run("dvc", "repro")
    evaluation, comparison = results(project)
    assert "champion" not in evaluation
    assert set(comparison["differences"]) == {"base"}
    project.commit("First model")
    project.run("python", "-m", "fine_tuning", "promote", "--force", "the first")
    assert results(project)[0] == evaluation
    promoted = results(project)[1]
    assert promoted["reasons"][0].startswith("the candidate is the champion, version 1, promoted over the verdict ")
    assert promoted["differences"] == comparison["differences"]
    project.commit("Promote version 1")
    assert "up to date" in project.run("dvc", "repro")

    # Another salt deals some of what the champion was trained on into the test split.
    members = (project.folder / "models/champion/training.jsonl").read_text().splitlines()
    learned = {json.loads(line)["id"] for line in members}
    output = project.run("dvc", "exp", "run", "-S", "prepare.salt=another", "-S", "prepare.test_fraction=0.4")
    test = pyarrow.parquet.read_table(project.folder / "data/prepared/test").to_pylist()
    clusters = {row["cluster"] for row in test if row["id"] in learned}
    count = sum(row["cluster"] in clusters for row in test)
    assert 0 < count < len(test)
    words = f"{count_of(count, 'held-out conversation')} left out: the champion was trained on the same"
    evaluation, comparison = results(project)
    assert words in output and any(reason.startswith(words) for reason in comparison["reasons"])
    assert evaluation["suite"]["learned_by_champion"] == count
    assert evaluation["suite"]["conversations"] == len(test) - count
    project.run("git", "checkout", ".")
    project.run("dvc", "checkout")

    project.import_conversations(conversations(("tablet", "monitor", "scanner")), "second")
    output = project.run("dvc", "repro")
    assert "is not asked" not in output
    evaluation, comparison = results(project)
    assert set(comparison["differences"]) == {"base", "champion"}
    assert comparison["primary"]["champion"]["metric"] == "perplexity"
    assert "champion" in project.run("python", "-m", "fine_tuning", "summary")
    project.commit("Second model")

    # Without new data the champion is asked the same in its own tokens, and so scores the same.
    before = evaluation["champion"]
    other = write_tiny_base(tmp_path / "other", seed=1, vocabulary=300)
    project.run("dvc", "exp", "run", "-S", f"base.model={other}")
    evaluation, comparison = results(project)
    assert evaluation["champion"] == before
    assert evaluation["base"]["perplexity"]["n"] == evaluation["champion"]["perplexity"]["n"]
    assert set(comparison["differences"]) == {"base", "champion"}
    assert comparison["primary"]["base"]["metric"] == "perplexity"
    assert comparison["primary"]["champion"]["metric"] == "nll_per_byte"
    assert not {"perplexity", "token_accuracy"} & set(comparison["differences"]["champion"])
    assert "the champion has another tokenizer: nll_per_byte decides instead of perplexity" in (comparison["reasons"])
    assert "up to date" in project.run("dvc", "repro")


def results(project: Project) -> tuple[dict, dict]:
    """metrics/evaluation.json and metrics/comparison.json; a verdict is always there."""
    evaluation, comparison = (
        json.loads((project.folder / "metrics" / f"{name}.json").read_bytes()) for name in ("evaluation", "comparison")
    )
    assert comparison["verdict"] in ("PROMOTE", "HOLD", "INCONCLUSIVE")
    return evaluation, comparison
