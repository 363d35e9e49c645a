"""The report and the summary: one file that needs no network, one screen that says what to do."""

import math
import re
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.votes import BASE, CANDIDATE, vote
from fine_tuning.commands import summary
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, write_json
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.data_preparation.tally import Tally, statistics
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.records.measurements import GUARDS, guard_metrics, summarise
from fine_tuning.evaluation.records.record_types import Reply
from fine_tuning.evaluation.records.settings import IntervalSettings
from fine_tuning.evaluation.report.charts import interval_plot
from fine_tuning.evaluation.report.red_flags import red_flags
from fine_tuning.evaluation.report.report import Findings, write_report
from fine_tuning.evaluation.scoring.side_by_side import side_by_side
from fine_tuning.evaluation.verdict.comparison import CompareSettings, compare
from fine_tuning.evaluation.verdict.slices import slices
from fine_tuning.evaluation.verdict.votes import VoteCount
from fine_tuning.schema.reasons import in_words
from tests.evaluation_suite import MODULES, SETTINGS
from tests.registered import sh

INTERVALS = IntervalSettings(draws=200, confidence=0.95, seed=0)
COMPARE = CompareSettings(
    primary="perplexity",
    minimum_effect=0.01,
    minimum_conversations=5,
    minimum_against_champion=5,
    secondary={"token_accuracy": 0.02},
    quantisation_tolerance=0.05,
    golden_lead=4.0,
    text_tolerance=0.05,
    prompt_help=0.8,
)
EVIL = "<script>alert(1)</script> & ```"


class Tags(HTMLParser):
    """Collects start tags, and sees that those which need an end have one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def line(contender: str, index: int, nats: float) -> dict:
    turn = {"author": "imported", "reference": True, "nll": nats * 10, "tokens": 10, "correct": 5, "bytes": 40}
    return {
        "contender": contender,
        "id": f"c{index}",
        "source": "a" if index % 2 else "b",
        "cluster": f"c{index}",
        "length": 30,
        "turns": [turn],
        "nll": nats * 10,
        "tokens": 10,
        "correct": 5,
        "bytes": 40,
        "asked": 0,
        "prompt": f"question {index}",
        "predictions": EVIL,
        "references": f"reference {index}",
        "finished": index > 2,
        "reply_tokens": 7,
        "personal_data": [],
    }


@pytest.fixture(scope="module")
def result():
    records = [line("base", i, 3 + i / 10) for i in range(12)] + [line("candidate", i, 2 + i / 20) for i in range(12)]
    records += [line("candidate_quantised", i, 2.01 + i / 20) for i in range(4)]
    metrics = [load_metric(name, MODULES) for name in SETTINGS.metrics]
    guarded = {file: [] for file in GUARDS}
    for name, gain in (("base", 0.0), ("candidate", 1.0)):
        for index in range(12):
            common = {"contender": name, "id": f"x{index}"}
            guarded["general"].append(common | {"right": 5.0, "wrong": 9.0 + index + gain})
            guarded["general_text"].append(common | {"nats": 80.0 + index - gain, "bytes": 100})
            guarded["prompt_help"].append(common | {"own": 9.0, "others": [19.0 + gain, 18.0 + gain]})
    comparison = compare(records, metrics, COMPARE, INTERVALS, guarded) | {"adapter_sha256": "ab" * 32}
    names = ("base", "candidate", "candidate_quantised")
    evaluation = {n: summarise([x for x in records if x["contender"] == n], metrics, INTERVALS) for n in names}
    for name, row in guard_metrics(guarded, 0.95).items():
        evaluation[name] |= row
    evaluation["suite"] = {"sha256": "cd" * 32, "conversations": 12, "clusters": 12}
    return records, comparison, evaluation


@pytest.fixture
def prepared(tmp_path):
    """metrics/prepare.json as the stage writes it."""
    tallies = {split: Tally() for split in SPLITS}
    tallies["train"].totals.update(conversations=481, tokens=29976, lost_reply_tokens=70)
    left_out = {"max_sample_tokens": 259, "overlaps_test": 3}
    write_json(tmp_path / "metrics/prepare.json", statistics(tallies, left_out, 1000, {"max_sample_tokens": 240}))
    return read_json(tmp_path / "metrics/prepare.json")


LEFT_OUT = (
    "481 conversations with 29,976 tokens to train on",
    "259 left out (24.0% of the text): prepare.max_sample_tokens",
    "3 left out (0.0% of the text): overlaps test",
    "70 tokens of replies not used: their turns alone exceed chat.max_length",
)


@pytest.fixture
def page(result, prepared, tmp_path):
    records, comparison, evaluation = result
    reply = {"text": EVIL, "finished": False}
    metrics = [load_metric(name, MODULES) for name in SETTINGS.metrics]
    prompts = [{"prompt": EVIL, "replies": {"base": reply, "candidate": reply}}]
    where = slices(records, metrics, INTERVALS)
    found = Findings(comparison, evaluation, records, prompts, where, preparation=prepared)
    write_report(tmp_path / "report.html", found)
    return (tmp_path / "report.html").read_text()


def test_the_report_shows_the_win_rate_of_all_and_of_each_person_and_who_decides(result, tmp_path):
    records, comparison, evaluation = result
    votes = [vote(f"c{i}", float(i % 3 > 0), person, i) for i, person in enumerate(["ann <b>"] * 9 + ["bob"] * 3)]
    tally = VoteCount.of(votes, records, {"candidate": CANDIDATE, "base": BASE})
    write_report(tmp_path / "r.html", Findings(comparison | {"votes": tally.as_json()}, evaluation, records, []))
    page = (tmp_path / "r.html").read_text()
    assert "Win rate of the candidate against the base, ties one half: 67% [" in page
    assert "ann &lt;b&gt;: 67%" in page and "decides 9 prompts" in page and "bob: 67%" in page
    write_report(tmp_path / "r.html", Findings(comparison, evaluation, records, []))
    assert "Nobody has voted on this pair" in (tmp_path / "r.html").read_text()


def test_report_and_summary_show_what_auto_measured_and_which_kind_it_took(result, tmp_path, monkeypatch, capsys):
    records, comparison, evaluation = result
    row = {"tokens_per_second": 50.4, "top1": 0.98}
    package = {
        "gguf_bytes": 138_000_000,
        "quantisations": {
            "Q4_K_M": row | {"bytes": 106_000_000, "mean_kl": 0.04, "perplexity_increase": 0.057},
            "Q6_K": row | {"bytes": 138_000_000, "mean_kl": 0.01, "perplexity_increase": 0.016},
        },
    }
    write_report(tmp_path / "r.html", Findings(comparison, evaluation, records, [], package=package))
    page = (tmp_path / "r.html").read_text()
    assert "<tr><td>Q4_K_M</td><td>106.0</td>\n<td>50</td><td>0.04</td><td>98%</td>\n<td>+5.7%</td></tr>" in page
    assert "<td>Q6_K (taken)</td>" in page
    point = r'<circle class="(\w+)" cx="([0-9.]+)" cy="([0-9.]+)" r="5"/><text [^>]*>(Q\w+), (\d+) MB'
    assert re.findall(point, page) == [
        ("open", "80.0", "30.0", "Q4_K_M", "106"),
        ("good", "500.0", "180.0", "Q6_K", "138"),
    ]
    write_report(tmp_path / "r.html", Findings(comparison, evaluation, records, []))
    assert "tokens/s" not in (tmp_path / "r.html").read_text()

    write_json(tmp_path / "metrics/evaluation.json", evaluation)
    write_json(tmp_path / "metrics/comparison.json", comparison)
    write_json(tmp_path / "metrics/package.json", package)
    monkeypatch.chdir(tmp_path)
    summary.summary(Namespace(all=False))
    assert "GGUF in Q6_K: 138.0 MB, perplexity +1.6%, the smallest of 2 within the bounds" in capsys.readouterr().out


def test_the_report_asks_nothing_of_the_network_and_runs_no_script(page):
    assert not re.search(r"https?://|src=|@import|url\(", page)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert not tags.open
    assert "&lt;script&gt;alert(1)" in page


def flags_of(result, **said: dict) -> str:
    """The report's red flags where replies, metrics or answers say something."""
    comparison, evaluation = ({**part} for part in result[1:])
    comparison["forgetting"] = {"base": comparison["forgetting"]["base"] | said.get("lost", {})}
    evaluation["candidate"] = evaluation["candidate"] | said.get("metrics", {})
    records = [entry | said.get("records", {}) if entry["contender"] == "candidate" else entry for entry in result[0]]
    found = red_flags(comparison, evaluation, records, said.get("answers", []))
    return "\n".join(f"{flag.what} {flag.examples}" for flag in found)


def test_the_report_warns_of_what_averages_hide(result):
    calm = {"length_ratio": {"value": 0.9}, "loops": {"value": 0.0}}
    assert flags_of(result, metrics=calm) == ""
    assert "0.3 times as long as the references" in flags_of(result, metrics=calm | {"length_ratio": {"value": 0.3}})
    assert "25% of the replies repeat themselves" in flags_of(result, metrics=calm | {"loops": {"value": 0.25}})
    replies = {name: {"text": text} for name, text in (("base", "I am an AI."), ("candidate", "I'm a human."))}
    answers = [{"prompt": "Who are you?", "replies": replies}]
    said = flags_of(result, metrics=calm, answers=answers)
    assert (
        "Replies that speak as a person: 1 of the candidate, 0 of the base." in said
        and "Who are you? → …I'm a human." in said
    )
    for fine in ("I am a humane assistant.", "My wifi is down.", "I am an AI for humans."):
        assert flags_of(result, metrics=calm, records={"predictions": fine}) == ""
    assert "2 factual answers of 12" in flags_of(result, metrics=calm, lost={"lost": ["a", "b"]})


def test_the_report_carries_a_decision_side_by_side_replies_gates_and_curves(result, prepared, tmp_path):
    records, comparison, evaluation = result
    training = {"steps": 3, "validation_loss_before": 3.0, "validation_loss": 2.0}
    losses = {"train": [(1.0, 3.0), (2.0, 2.5)], "validation": [(0.0, 3.0), (2.0, 2.0)]}
    answers = [
        {"prompt": "Who?", "replies": {name: {"text": name, "finished": True} for name in ("base", "candidate")}}
    ]
    found = Findings(
        comparison, evaluation, records, answers, preparation=prepared, training=training,
        base={"model": "tiny"}, losses=losses,
    )  # fmt: skip
    write_report(tmp_path / "report.html", found)
    page = (tmp_path / "report.html").read_text()
    for words in ("The candidate is better than the base: promote it.", "<dd>tiny</dd>", "481 conversations with",
                  "3 steps, validation loss\n3 → 2", '<td class="good">▲ better</td>', "<polyline"):  # fmt: skip
        assert words in page, words
    assert re.search(r"<summary[^>]*>[-+][0-9.]+ nats a token: question \d+</summary>", page)
    assert page.index("promote it") < page.index("What it says") < page.index("Red flags") < page.index("What decides")


def test_the_report_leads_with_verdict_and_reasons(page, result):
    _, comparison, _ = result
    assert comparison["verdict"] == "PROMOTE"
    assert page.index("PROMOTE</h1>") < page.index("<li>perplexity ") < page.index("<svg")


def test_the_report_shows_intervals_slices_quantisation_and_examples(page):
    for words in ("Every metric", "Quantised as it is shipped", "source", "Largest wins", "reference 11", "(cut off)"):
        assert words in page
    assert page.count("<circle") >= 10


def test_the_report_shows_what_was_kept_of_general_knowledge_and_whether_replies_fit(page):
    assert "of 11 golden ones lost 0" in page
    assert "general text, nats a byte against the base: 0.845 against 0.855" in page
    assert "10.5 against 7.6, 2.9 [2.9, 2.9], 12 different" in page


def test_report_and_summary_say_how_much_was_left_out_and_why(page, result, prepared, tmp_path, monkeypatch, capsys):
    assert all(f"<li>{words}</li>" in page for words in LEFT_OUT)
    monkeypatch.chdir(tmp_path)
    write_json("metrics/comparison.json", result[1])
    write_json("metrics/evaluation.json", result[2])
    summary.summary(Namespace(all=True))
    printed = capsys.readouterr().out
    assert all(words in printed for words in LEFT_OUT)


@pytest.mark.end_to_end
def test_the_summary_says_when_the_verdict_is_older_than_the_data(result, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json("prepare.json", prepared)
    write_json("metrics/evaluation.json", result[2])
    write_json("comparison.json", result[1])
    Path("dvc.yaml").write_text("""
stages:
  prepare: {cmd: cp prepare.json metrics, deps: [prepare.json], metrics: [metrics/prepare.json: {cache: false}]}
  compare:
    cmd: cp comparison.json metrics
    deps: [comparison.json, metrics/prepare.json]
    metrics: [metrics/comparison.json: {cache: false}]
""")

    def said() -> str:
        summary.summary(Namespace(all=True))
        return capsys.readouterr().out

    sh(tmp_path, "git init -q")
    sh(tmp_path, "dvc init -q")
    sh(tmp_path, "dvc repro -q")
    assert "of an earlier run" not in said()
    write_json("prepare.json", prepared | {"left_out": {}})
    sh(tmp_path, "dvc repro -q prepare")
    assert "Verdict: PROMOTE\n  - of an earlier run: metrics/prepare.json changed since; `dvc repro`" in said()
    sh(tmp_path, "dvc repro -q")
    assert "of an earlier run" not in said()


def test_one_conversation_is_said_in_the_singular(prepared):
    prepared["splits"]["train"] |= {"conversations": 1, "tokens": 1}
    assert in_words(prepared)[0] == "1 conversation with 1 token to train on"


def test_a_slice_of_one_cluster_shows_no_interval(result, tmp_path):
    records = [entry | ({"cluster": "one"} if entry["source"] == "a" else {}) for entry in result[0]]
    metrics = [load_metric("perplexity", MODULES)]
    where = slices(records, metrics, INTERVALS)
    write_report(tmp_path / "report.html", Findings(result[1], result[2], records, [], where))
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r"<tr><td>([ab])</td><td>perplexity</td>(.*?)</tr>", page)
    assert {name for name, _ in rows} == {"a", "b"}
    for name, cells in rows:
        assert ("<small>one conversation group, n 6</small>" in cells) == (name == "a")
        assert ("[" in cells) == (name == "b")


def test_the_page_side_by_side_keeps_replies_as_they_are():
    answers = {"base": [Reply("```\n# heading", 3, True)], "candidate": [Reply("", 0, False)]}
    found = side_by_side(["Why\nso?"], answers)
    assert "## 1. Why so?" in found
    assert "> ````text\n> ```\n> # heading\n> ````" in found
    assert "**candidate** (cut off)\n\n> *(nothing)*" in found


def test_the_summary_says_verdict_reasons_modelfile_and_what_to_type(result, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, comparison, evaluation = result
    write_json("metrics/comparison.json", comparison)
    write_json("metrics/evaluation.json", evaluation)
    (tmp_path / "models/package").mkdir(parents=True)
    (tmp_path / "models/package/Modelfile").touch()
    summary.summary(Namespace(all=True))
    printed = capsys.readouterr().out
    for words in ("perplexity *", "rougeL", "Verdict: PROMOTE", "models/package/Modelfile", "make promote"):
        assert words in printed
    assert printed.index("perplexity") < printed.index("prompt_help") < printed.index("general_text")
    assert printed.index("perplexity") < printed.index("bleu") < printed.index("self_ended")
    assert "report.html" not in printed  # a clone has the numbers before it has the page
    (tmp_path / "metrics/report.html").touch()
    summary.summary(Namespace(all=True))
    assert "metrics/report.html" in capsys.readouterr().out


def test_the_summary_shows_what_decides_and_with_all_the_rest(result, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json("metrics/comparison.json", result[1])
    write_json("metrics/evaluation.json", result[2])
    summary.summary(Namespace(all=False))
    printed = capsys.readouterr().out
    assert all(
        words in printed for words in ("perplexity *", "prompt_help", "general_text", "`summary --all`", LEFT_OUT[0])
    )
    assert not any(words in printed for words in ("bleu", "rougeL", LEFT_OUT[1]))


def test_the_summary_of_nothing_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"metrics/evaluation\.json is missing: run `dvc repro`"):
        summary.summary(Namespace(all=True))


def test_the_report_shows_the_numbers_that_the_records_give(page):
    # 12 items: the base has 3 + i / 10 nats a token, the candidate 2 + i / 20; their means are 3.55 and 2.275.
    for value in (math.exp(3.55), math.exp(2.275), math.exp(2.275) - math.exp(3.55)):
        assert f"{value:.4g}" in page or f"{value:+.3g}" in page


def test_a_difference_is_good_bad_or_open_by_its_direction_and_its_interval():
    def kinds(better: int, difference: float, low: float | None, high: float | None) -> set[str]:
        numbers = {"difference": difference, "low": low, "high": high, "candidate": 1.0, "baseline": 1.0}
        drawing = interval_plot({"metric": numbers | {"better": better, "n": 3}})
        return set(re.findall(r'<circle class="(\w+)"', drawing))

    assert kinds(1, 2.0, 1.0, 3.0) == kinds(-1, -2.0, -3.0, -1.0) == {"good"}
    assert kinds(1, -2.0, -3.0, -1.0) == kinds(-1, 2.0, 1.0, 3.0) == {"bad"}
    assert kinds(1, 1.0, -1.0, 3.0) == kinds(0, 2.0, 1.0, 3.0) == {"open"}
    assert kinds(1, 2.0, None, None) == set()
