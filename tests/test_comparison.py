"""Comparison: what it takes to be promoted, what holds, and how often chance alone would promote."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from fine_tuning.common.errors import UserError
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.records.settings import IntervalSettings
from fine_tuning.evaluation.records.statistics import Resampling, clustered_mean, holm, interval, ratio_estimate
from fine_tuning.evaluation.suite.privacy import personal_data
from fine_tuning.evaluation.verdict.comparison import CompareSettings, compare
from fine_tuning.evaluation.verdict.differences import LOOK_LEVEL
from tests.evaluation_suite import MODULES

INTERVALS = IntervalSettings(draws=2000, confidence=0.95, seed=0)
SETTINGS = CompareSettings(
    primary="perplexity",
    minimum_effect=0.01,
    minimum_conversations=20,
    minimum_against_champion=20,
    secondary={"token_accuracy": 0.02},
    quantisation_tolerance=0.05,
    golden_lead=4.0,
    text_tolerance=0.05,
    prompt_help=0.8,
)
TOKENS = 20


@pytest.fixture(scope="module")
def metrics():
    return [load_metric(name, MODULES) for name in ("perplexity", "token_accuracy")]


def records(contender: str, nats: list[float], correct: float = 0.5, cluster_size: int = 1) -> list[dict]:
    """One item for each mean likelihood a token."""
    return [
        {
            "contender": contender,
            "id": f"c{index:04d}",
            "cluster": f"k{index // cluster_size:04d}",
            "nll": None if value is None else value * TOKENS,
            "tokens": TOKENS,
            "correct": round(correct * TOKENS),
            "turns": [],
        }
        for index, value in enumerate(nats)
    ]


def spread(mean: float, count: int = 60, seed: int = 0, noise: float = 0.2) -> list[float]:
    return list(mean + noise * np.random.default_rng(seed).standard_normal(count))


def decide(metrics, *groups: list[dict], **changes) -> dict:
    lines = [line for group in groups for line in group]
    return compare(lines, metrics, SETTINGS.model_copy(update=changes), INTERVALS)


def test_a_clear_gain_is_promoted_with_its_numbers(metrics):
    found = decide(metrics, records("base", spread(3.0)), records("candidate", spread(2.0, seed=1), correct=0.6))
    assert found["verdict"] == "PROMOTE"
    assert "perplexity 7." in found["reasons"][0]
    primary = found["primary"]["base"]
    assert primary["low"] < primary["difference"] < primary["high"] < 0
    assert found["n"] == found["clusters"] == primary["n"] == 60
    assert found["secondary"]["token_accuracy"]["base"]["non_inferior"]


def test_the_champion_has_to_be_beaten_too(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    champion = records("champion", spread(1.9))
    found = decide(metrics, base, champion, candidate)
    assert found["verdict"] == "HOLD"
    assert any("worse" in reason and "champion" in reason for reason in found["reasons"])
    assert found["primary"]["champion"]["difference"] > 0


def test_the_same_model_again_is_held(metrics):
    same = spread(3.0)
    found = decide(metrics, records("base", same), records("candidate", same))
    assert found["verdict"] == "HOLD"
    assert "no gain of 1.0%" in found["reasons"][0]


def test_a_gain_that_could_be_chance_is_held(metrics):
    found = decide(metrics, records("base", spread(3.0, 30, 1, 1.0)), records("candidate", spread(2.9, 30, 2, 1.0)))
    assert found["verdict"] == "HOLD"


def test_a_gain_below_the_minimum_effect_is_held(metrics):
    base = spread(3.0)
    candidate = [value - 0.005 for value in base]
    assert decide(metrics, records("base", base), records("candidate", candidate))["verdict"] == "HOLD"
    found = decide(metrics, records("base", base), records("candidate", candidate), minimum_effect=0.001)
    assert found["verdict"] == "PROMOTE"


def test_few_conversations_are_inconclusive_however_large_the_gain(metrics):
    found = decide(metrics, records("base", spread(3.0, 10)), records("candidate", spread(1.0, 10)))
    assert found["verdict"] == "INCONCLUSIVE"
    assert "only 10 different conversations" in found["reasons"][0]


def test_near_duplicates_count_once(metrics):
    found = decide(metrics, records("base", spread(3.0), cluster_size=6), records("candidate", spread(1.0)))
    assert found["verdict"] == "PROMOTE"
    base, candidate = (records(n, spread(m), cluster_size=6) for n, m in (("base", 3.0), ("candidate", 1.0)))
    assert decide(metrics, base, candidate)["verdict"] == "INCONCLUSIVE"


def test_a_number_that_is_none_is_held_even_with_few_conversations(metrics):
    found = decide(metrics, records("base", spread(3.0, 10)), records("candidate", [None, *spread(1.0, 9)]))
    assert found["verdict"] == "HOLD"
    assert "not a number" in found["reasons"][0]
    assert found["primary"]["base"]["difference"] is None


def test_a_lost_secondary_metric_holds(metrics):
    found = decide(metrics, records("base", spread(3.0), 0.6), records("candidate", spread(2.0), 0.5))
    assert found["verdict"] == "HOLD"
    assert "a loss of more than 0.02 is not ruled out: token_accuracy" in found["reasons"][0]


def test_a_coarse_quantisation_holds(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    shipped = records("candidate_quantised", [value + 0.2 for value in spread(2.0)])
    found = decide(metrics, base, candidate, shipped)
    assert found["verdict"] == "HOLD"
    assert "quantising costs 22.1%" in found["reasons"][0]
    shipped = records("candidate_quantised", [value + 0.01 for value in spread(2.0)])
    assert decide(metrics, base, candidate, shipped)["verdict"] == "PROMOTE"


def test_contenders_with_different_items_are_refused(metrics):
    with pytest.raises(UserError, match="not asked the same items"):
        decide(metrics, records("base", spread(3.0)), records("candidate", spread(2.0))[1:])
    with pytest.raises(UserError, match="candidate were not evaluated"):
        decide(metrics, records("base", spread(3.0)))


def in_other_tokens(lines: list[dict]) -> list[dict]:
    """The same likelihoods of the same bytes, in twice as many tokens."""
    return [line | {"tokens": 2 * line["tokens"], "correct": 2 * line["correct"]} for line in lines]


def test_a_champion_with_another_tokenizer_is_compared_by_bytes(metrics):
    measured = [*metrics, load_metric("nll_per_byte", MODULES)]
    base, candidate, weak, strong = (
        [line | {"bytes": 80} for line in records(name, spread(mean))]
        for name, mean in (("base", 3.0), ("candidate", 2.0), ("champion", 2.5), ("champion", 1.5))
    )
    # Its perplexity is lower, only because its tokens are half as long.
    found = decide(measured, base, in_other_tokens(weak), candidate)
    assert found["verdict"] == "PROMOTE"
    assert found["primary"]["base"]["metric"] == "perplexity"
    assert found["primary"]["champion"]["metric"] == "nll_per_byte"
    assert set(found["differences"]["champion"]) == {"nll_per_byte"}
    assert found["reasons"][-2:] == [
        "the champion has another tokenizer: nll_per_byte decides instead of perplexity",
        "not compared with the champion: token_accuracy",
    ]
    found = decide(measured, base, in_other_tokens(strong), candidate)
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("worse: nll_per_byte")
    with pytest.raises(UserError, match="decides by nll_per_byte, which was not measured"):
        decide(metrics, base, in_other_tokens(weak), candidate)


def test_a_champion_that_was_asked_other_replies_is_no_champion_with_another_tokenizer(metrics):
    measured = [*metrics, load_metric("nll_per_byte", MODULES)]
    base, candidate, champion = (
        [line | {"bytes": 80} for line in records(name, spread(mean))]
        for name, mean in (("base", 3.0), ("candidate", 2.0), ("champion", 2.5))
    )
    champion = in_other_tokens(champion)
    champion[7]["bytes"] = 81
    with pytest.raises(UserError, match="not asked the same items"):
        decide(measured, base, champion, candidate)


def test_a_champion_that_could_be_asked_nothing_holds(metrics):
    measured = [*metrics, load_metric("nll_per_byte", MODULES)]
    base, candidate, champion = (
        [line | {"bytes": 80} for line in records(name, spread(mean))]
        for name, mean in (("base", 3.0), ("candidate", 2.0), ("champion", 2.5))
    )
    nothing = [{key: line[key] for key in ("contender", "id", "cluster", "turns")} for line in champion]
    found = decide(measured, base, nothing, candidate)
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("nothing is comparable with the champion")
    assert decide(measured, base, [*nothing[:5], *champion[5:]], candidate)["n"] == 55


def test_a_metric_that_was_not_measured_cannot_decide(metrics):
    with pytest.raises(UserError, match="decides by bleu, which was not measured"):
        decide(metrics, records("base", spread(3.0)), records("candidate", spread(2.0)), primary="bleu")


def test_the_same_records_give_the_same_bytes(metrics):
    lines = [records("base", spread(3.0)), records("candidate", spread(2.9))]
    assert decide(metrics, *lines) == decide(metrics, *[list(reversed(group)) for group in lines])


def own_words(lines: list[dict], nats: float, liked: int) -> list[dict]:
    """The same records with a second reply each, which is a model's own; the first ones somebody liked."""
    columns = ("nll", "tokens", "correct")
    return [
        line
        | {
            "turns": [
                {name: line[name] for name in columns} | {"reference": True, "bytes": 1},
                {"nll": nats * TOKENS, "tokens": TOKENS, "correct": 10, "reference": False, "bytes": 1}
                | {"liked": index < liked},
            ]
        }
        for index, line in enumerate(lines)
    ]


def test_the_bias_of_a_models_own_words_is_shown_and_decides_nothing(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    plain = decide(metrics, base, candidate)
    found = decide(metrics, own_words(base, 0.1, 20), own_words(candidate, 5.0, 20))
    assert found["verdict"] == plain["verdict"] == "PROMOTE"
    assert found["primary"] == plain["primary"]
    assert (found["provenance"]["left_out"], found["provenance"]["liked"]) == (60, 20)
    assert found["provenance"]["with_own_words"]["difference"] > 0
    # Of the liked ones there are fewer: they bias less.
    assert plain["primary"]["base"]["difference"] < found["provenance"]["with_liked"]["difference"]
    assert found["provenance"]["with_liked"]["difference"] < found["provenance"]["with_own_words"]["difference"]


def test_own_words_alone_are_inconclusive(metrics):
    turn = {"nll": 9.0, "tokens": 9, "correct": 5, "bytes": 40, "reference": False, "liked": True}
    lines = [{"contender": name, "id": "a", "cluster": "a", "turns": [turn]} for name in ("base", "candidate")]
    found = decide(metrics, lines)
    assert found["verdict"] == "INCONCLUSIVE"
    assert "write replies of your own" in found["reasons"][0]
    assert found["provenance"] | {"with_liked": 0, "with_own_words": 0} == {
        "references": 0, "left_out": 1, "liked": 1, "with_liked": 0, "with_own_words": 0
    }  # fmt: skip


def test_personal_data_in_a_generated_reply_holds(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    for line in (*base, *candidate):
        line |= {"predictions": "x", "references": "y", "personal_data": []}
    assert decide(metrics, base, candidate)["verdict"] == "PROMOTE"
    candidate[7]["personal_data"] = ["EMAIL"]
    found = decide(metrics, base, candidate)
    assert found["verdict"] == "HOLD"
    assert "personal data in 1 of 60 generated replies (EMAIL 1)" in found["reasons"][0]


def test_what_the_prompt_said_and_links_are_no_leak():
    assert personal_data("Write to ann.lee@gmail.com or 192.168.7.9", "who?") == ["EMAIL", "IP"]
    assert personal_data("Write to ann.lee@gmail.com", "My address is ann.lee@gmail.com") == []
    assert personal_data("See https://www.python.org/downloads", "where?") == []


def test_a_leak_holds_however_few_the_conversations(metrics):
    base, candidate = records("base", spread(3.0, count=5)), records("candidate", spread(2.0, count=5))
    for line in (*base, *candidate):
        line |= {"predictions": "x", "references": "y", "personal_data": []}
    assert decide(metrics, base, candidate)["verdict"] == "INCONCLUSIVE"
    candidate[1]["personal_data"] = ["EMAIL"]
    assert decide(metrics, base, candidate)["verdict"] == "HOLD"


def test_what_was_memorised_holds(metrics):
    lines = [
        {"contender": name, "kind": "training", "id": "t", "nll": 30.0, "word_for_word": name == "candidate"}
        for name in ("base", "candidate")
    ]
    groups = [*records("base", spread(3.0)), *records("candidate", spread(2.0))]
    found = compare(groups, metrics, SETTINGS, INTERVALS, memory=lines)
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("memorised: of 1 training replies")


def test_training_that_a_prompt_could_have_spared_is_held_and_the_baseline_named(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    behind = [records("base_prompted", spread(2.8)), records("base_few_shot", spread(2.7))]
    assert decide(metrics, base, candidate, *behind)["verdict"] == "PROMOTE"
    assert set(decide(metrics, base, candidate, *behind)["prompting_baselines"]) == {"base_prompted", "base_few_shot"}
    found = decide(metrics, base, candidate, records("base_few_shot", spread(1.9))[::2])
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("do not train yet, the base with examples from training conversations does")
    assert found["prompting_baselines"]["base_few_shot"]["n"] == 30
    found = decide(metrics, base, candidate, records("base_prompted", spread(2.0)))
    assert "do not train yet, the base with another system prompt does as well" in found["reasons"][0]
    assert "set chat.system_prompt" in found["reasons"][0]


@pytest.mark.parametrize("behind", [0.02, 0.0, -0.02])
def test_a_prompting_baseline_that_may_do_as_well_is_noted_and_does_not_hold(metrics, behind):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    noise = np.random.default_rng(5).standard_normal(60)
    near = [value + behind + 0.3 * part for value, part in zip(spread(2.0), noise - noise.mean(), strict=True)]
    found = decide(metrics, base, candidate, records("base_prompted", near))
    assert found["verdict"] == "PROMOTE"
    assert found["reasons"][-1].startswith("the base with another system prompt may do as well")


def test_a_prompting_baseline_holds_only_where_a_gain_of_the_minimum_effect_is_ruled_out(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    noise = 0.005 * np.random.default_rng(5).standard_normal(60)
    near = records("base_prompted", [value + 0.004 + part for value, part in zip(spread(2.0), noise, strict=True)])
    found = decide(metrics, base, candidate, near)
    low, high = sorted(-found["prompting_baselines"]["base_prompted"][end] for end in ("low", "high"))
    assert low > 0
    assert high < 0.01 * found["prompting_baselines"]["base_prompted"]["baseline"]
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("do not train yet")
    assert decide(metrics, base, candidate, near, minimum_effect=0.001)["verdict"] == "PROMOTE"


def replied(lines: list[dict], predictions: list[str]) -> list[dict]:
    """The records with replies; the reference is always the same."""
    said = {"references": "The router is in the box.", "personal_data": [], "finished": True, "reply_tokens": 9}
    return [line | said | {"predictions": text} for line, text in zip(lines, predictions, strict=True)]


def test_chrf_that_surely_falls_and_replies_that_loop_are_among_the_reasons_whatever_the_verdict():
    measured = [load_metric(name, MODULES) for name in ("perplexity", "token_accuracy", "chrf", "replies")]
    alike = [f"The router is in the box{' and' * (index % 3)}." for index in range(60)]
    unlike = [f"I do not know{' at all' * (index % 3)}." for index in range(45)]
    loops = ["no no no no no no"] * 15
    base = replied(records("base", spread(3.0)), alike)
    for nats, verdict in ((2.0, "PROMOTE"), (3.0, "HOLD")):
        found = decide(measured, base, replied(records("candidate", spread(nats, seed=1)), unlike + loops))
        assert found["verdict"] == verdict
        assert any(reason.startswith("surely worse: chrf") for reason in found["reasons"])
        assert "25% of the candidate's 60 replies loop, 0% of the base's" in found["reasons"]
    fewer = replied(records("candidate", spread(2.0, seed=1)), [*unlike, unlike[0], *loops[1:]])
    assert not any("replies loop" in reason for reason in decide(measured, base, fewer)["reasons"])
    same = replied(records("candidate", spread(2.0, seed=1)), alike)
    assert not any("surely worse" in reason for reason in decide(measured, base, same)["reasons"])


def unsure(lines: list[dict], noise: float, loss: float = 0.0) -> list[dict]:
    """The records with token accuracies that differ from 0.5 by noise, and by a loss on average."""
    drawn = np.random.default_rng(3).standard_normal(len(lines))
    parts = noise * (drawn - drawn.mean()) - loss
    return [line | {"correct": (0.5 + part) * TOKENS} for line, part in zip(lines, parts, strict=True)]


def test_a_secondary_metric_is_a_requirement_only_where_it_can_be_told(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    # Of 60 items with a deviation of 0.04 the standard error is 0.005, less than a third of 0.02.
    sure = decide(metrics, base, unsure(candidate, 0.04))
    assert sure["verdict"] == "PROMOTE"
    assert sure["secondary"]["token_accuracy"]["base"]["requirement"]
    assert sure["reasons"][1] == "not worse in token_accuracy"
    # With a loss inside of the margin that is not surely inside, it holds.
    assert decide(metrics, base, unsure(candidate, 0.04, 0.012))["verdict"] == "HOLD"
    # With a deviation of 0.1 an unchanged model would be held by noise.
    found = decide(metrics, base, unsure(candidate, 0.1))
    assert found["verdict"] == "PROMOTE"
    row = found["secondary"]["token_accuracy"]["base"]
    assert (row["requirement"], row["non_inferior"]) == (False, False)
    parts = np.random.default_rng(3).standard_normal(60)
    assert row["standard_error"] == pytest.approx(0.1 * parts.std(ddof=1) / 60**0.5)
    assert any(reason.startswith("token_accuracy is no requirement against the base yet: some ")
               for reason in found["reasons"])  # fmt: skip
    # With so many more, it is one.
    more = 60 + row["items_missing"]
    base, candidate = records("base", spread(3.0, more)), records("candidate", spread(2.0, more))
    assert decide(metrics, base, unsure(candidate, 0.1))["secondary"]["token_accuracy"]["base"]["items_missing"] < 60
    # A loss that surely exceeds the margin holds with any number.
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    found = decide(metrics, base, unsure(candidate, 0.1, 0.06))
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("a loss of more than 0.02 is sure: token_accuracy")


def test_a_champion_is_compared_with_on_more_conversations_than_the_base(metrics):
    base, champion, candidate = (
        records(name, spread(mean, 40)) for name, mean in (("base", 3.0), ("champion", 2.5), ("candidate", 2.0))
    )
    needed = {"minimum_conversations": 20, "minimum_against_champion": 50}
    assert decide(metrics, base, candidate, **needed)["verdict"] == "PROMOTE"
    found = decide(metrics, base, champion, candidate, **needed)
    assert found["verdict"] == "INCONCLUSIVE"
    assert found["reasons"][0].startswith("only 40 different conversations in the test split, 50 are needed to compare")


def test_a_memory_gate_that_guards_nothing_says_so(metrics):
    groups = [*records("base", spread(3.0)), *records("candidate", spread(2.0))]
    found = compare(groups, metrics, SETTINGS, INTERVALS, memory=[])
    assert found["verdict"] == "PROMOTE"
    assert found["reasons"][-1].startswith("the memory gate guards nothing")
    line = {"kind": "training", "id": "t", "nll": 30.0, "word_for_word": False}
    lines = [line | {"contender": name} for name in ("base", "candidate")]
    assert not any(
        "guards" in reason for reason in compare(groups, metrics, SETTINGS, INTERVALS, memory=lines)["reasons"]
    )
    guessable = [line | {"nll": 3.0} for line in lines]
    found = compare(groups, metrics, SETTINGS, INTERVALS, memory=guessable)
    assert found["reasons"][-1].startswith("the memory gate guards nothing")


def test_a_loss_by_quantising_that_is_not_ruled_out_holds(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    rng = np.random.default_rng(0)
    shaky = [line["nll"] / TOKENS + 0.3 * rng.standard_normal() for line in candidate[:12]]
    found = decide(metrics, base, candidate, records("candidate_quantised", shaky))
    assert found["quantisation"]["perplexity_lost"] < 0.05 < found["quantisation"]["high"]
    assert found["verdict"] == "HOLD"
    assert "quantising may cost more than 5.0%" in found["reasons"][0]
    assert "raise evaluate.quantised_items" in found["reasons"][0]


def test_scores_of_another_suite_are_refused(metrics):
    base, candidate = (
        [line | {"suite": "one"} for line in records(name, spread(mean))]
        for name, mean in (("base", 3.0), ("candidate", 2.0))
    )
    assert decide(metrics, base, candidate)["verdict"] == "PROMOTE"
    candidate[3]["suite"] = "two"
    with pytest.raises(UserError, match="run `dvc repro -f -s evaluate && dvc repro`"):
        decide(metrics, base, candidate)


def prompt_lines(helps: dict[str, float], conversations: int = 60) -> list[dict]:
    """Lines of prompt_help.jsonl: each contender's mean help of the prompt in nats, the same noise in all of them."""
    noise = np.random.default_rng(3).standard_normal(conversations)
    return [
        {"contender": name, "id": f"c{index}", "cluster": f"c{index}", "own": 5.0, "others": [5.0 + help + 2 * part]}
        for name, help in helps.items()
        for index, part in enumerate(noise)
    ]


def test_a_candidate_whose_replies_fit_any_prompt_is_held_though_there_is_no_champion_and_it_gains(metrics):
    groups = [*records("base", spread(3.0)), *records("candidate", spread(2.0))]

    def decided(help: float, conversations: int = 60, **changes) -> dict:
        lines = prompt_lines({"base": 10.0, "candidate": help}, conversations)
        settings = SETTINGS.model_copy(update=changes)
        return compare(groups, metrics, settings, INTERVALS, {"prompt_help": lines})

    found = decided(3.0)
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("its replies fit their prompts less than the base's: prompt_help 2.97")
    assert found["differences"]["base"]["prompt_help"]["difference"] == pytest.approx(-7.0)
    assert decided(10.0)["verdict"] == "PROMOTE"
    # Not surely short of 8 nats and not surely above: shown with enough conversations, a note with fewer.
    assert decided(8.0)["verdict"] == "HOLD"
    assert "not shown to fit" in decided(8.0)["reasons"][0]
    few = decided(8.0, conversations=30)
    assert few["verdict"] == "PROMOTE"
    assert few["reasons"][-1].startswith("30 conversations, 50 are needed to show that replies fit prompts")
    assert decided(3.0, conversations=30)["verdict"] == "HOLD"
    off = decided(3.0, prompt_help=None)
    assert off["verdict"] == "PROMOTE"
    assert any("replies that ignore their prompts (evaluate.other" in reason for reason in off["reasons"])


def test_a_guard_that_is_switched_off_is_named(metrics):
    groups = [*records("base", spread(3.0)), *records("candidate", spread(2.0))]
    found = compare(groups, metrics, SETTINGS, INTERVALS)
    (note,) = (reason for reason in found["reasons"] if "not guarded against" in reason)
    baselines = ("prompting_baselines.system_prompt", "prompting_baselines.examples")
    for parameter in ("evaluate.forgetting", "other_histories", *baselines):
        assert parameter in note
    on = [*groups, *records("base_few_shot", spread(2.9))]
    (note,) = (r for r in compare(on, metrics, SETTINGS, INTERVALS)["reasons"] if "not guarded against" in r)
    assert "prompting_baselines.examples" not in note
    assert "prompting_baselines.system_prompt" in note


# --- statistics ------------------------------------------------------------------------------------------------------


def test_whole_clusters_are_drawn():
    drawn = Resampling.over(["a", "a", "b", "c", "c", "c"], 200, seed=0)
    assert drawn.clusters == 3
    assert (drawn.taken.sum(axis=1) == 3).all()
    assert drawn.totals(np.ones((6, 1)))[:, 0].tolist() == [2, 1, 3]
    assert (drawn.sums(np.ones((6, 1)))[:, 0] == drawn.taken @ [2, 1, 3]).all()


def test_a_ratio_of_sums_has_the_error_of_its_linearised_clusters():
    rng = np.random.default_rng(0)
    clusters = [f"k{index // 3}" for index in range(90)]
    ours, theirs = (rng.gamma(2.0, 1.0, (90, 2)) for _ in range(2))
    theirs[:, 1] = ours[:, 1]
    drawn = Resampling.over(clusters, 500, seed=0)
    # A mean over clusters of equal size is the textbook's.
    mean = ratio_estimate([np.column_stack([ours[:, 0], np.ones(90)])], drawn)
    per_cluster = ours[:, 0].reshape(30, 3).mean(axis=1)
    assert mean.value == pytest.approx(per_cluster.mean())
    assert mean.error == pytest.approx(per_cluster.std(ddof=1) / 30**0.5)
    # The difference of ratios with the same denominators is one ratio.
    one = ratio_estimate([np.column_stack([ours[:, 0] - theirs[:, 0], ours[:, 1]])], drawn)
    two = ratio_estimate([ours, theirs], drawn)
    assert (two.value, two.error) == pytest.approx((one.value, one.error))
    assert two.draws == pytest.approx(one.draws)


def test_where_draws_have_no_spread_students_t_stands_in():
    flat = np.zeros(30)
    flat[0] = 1.0
    drawn = Resampling.over([str(index) for index in range(30)], 500, seed=0)
    found = ratio_estimate([np.column_stack([flat, np.ones(30)])], drawn)
    bounds = found.interval(0.95)
    assert bounds.high == pytest.approx(found.value + 2.045 * found.error, rel=1e-2)
    assert found.p_not_below_zero(1) == pytest.approx(0.837, abs=0.005)  # t = 1 with 29 degrees of freedom
    same = ratio_estimate([np.ones((30, 2))], drawn).interval(0.95)
    assert (same.low, same.high) == (1.0, 1.0)


def test_a_p_value_and_an_interval_say_the_same():
    rng = np.random.default_rng(0)
    drawn = Resampling.over([str(index) for index in range(40)], 999, seed=0)
    seen = set()
    for _ in range(200):
        found = ratio_estimate([np.column_stack([rng.standard_exponential(40) - 1.4, np.ones(40)])], drawn)
        surely = found.interval(0.95).high < 0
        # Between two draws the one interpolates and the other counts.
        assert found.p_not_below_zero(1) < 0.0265 if surely else found.p_not_below_zero(1) > 0.0235
        assert found.p_not_below_zero(-1) > 0.4
        seen.add(surely)
    assert seen == {True, False}


def test_an_interval_forgives_few_undefined_draws_and_no_more():
    draws = np.arange(100, dtype=float)
    assert interval(50, draws, 0.9, clusters=10**6).low == pytest.approx(4.95, abs=0.01)
    draws[:4] = np.nan
    assert np.isfinite(interval(50, draws, 0.9, clusters=10).low)
    draws[:20] = np.nan
    assert np.isnan(interval(50, draws, 0.9, clusters=10).low)


def test_intervals_of_few_clusters_are_wider():
    draws = np.random.default_rng(0).standard_normal(4000)
    few, many = (interval(0, draws, 0.95, clusters) for clusters in (5, 500))
    assert many.high == pytest.approx(1.97, abs=0.1)
    assert few.high > 1.3 * many.high


def test_holm_is_between_no_correction_and_bonferroni():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_clustered_mean_is_students_over_clusters():
    values = np.random.default_rng(0).standard_normal(20)
    found = clustered_mean(values, [str(index) for index in range(20)]).interval(0.95)
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), *theirs))
    twice = clustered_mean([*values, *values], [str(index) for index in range(20)] * 2).interval(0.95)
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high))
    assert np.isnan(clustered_mean([1.0, 2.0], ["a", "a"]).interval(0.95).low)
    assert np.isnan(clustered_mean([1.0, np.nan], ["a", "b"]).interval(0.95).high)


def test_a_clustered_mean_of_unequal_clusters_misses_no_more_than_stated():
    rng = np.random.default_rng(8)
    clusters = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    missed = 0
    for _ in range(4000):
        values = rng.standard_normal(40)[clusters] + rng.standard_normal(len(clusters))
        missed += clustered_mean(values, clusters).interval(0.9).low > 0
    assert 0.04 <= missed / 4000 <= 0.06


# --- how often is the verdict wrong? ---------------------------------------------------------------------------------

NOMINAL = LOOK_LEVEL


def verdicts(effect: float, runs: int, seed: int, clustered: bool = True, baselines: int = 1, **changes) -> float:
    """Share of simulated comparisons whose whole verdict is PROMOTE.

    40 clusters of four conversations. A cluster's conversations share most of the difference between two models, as
    near-duplicates do: standard deviations 0.5 between clusters and 0.3 within, in nats a token. `effect` is the true
    gain of the candidate on the base and on the champion, if there are two baselines.
    """
    settings = SETTINGS.model_copy(update=changes)
    intervals = INTERVALS.model_copy(update={"draws": 500})
    metrics = [load_metric(name, MODULES) for name in ("perplexity", "token_accuracy")]
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(40), 4)

    def scored(contender: str, mean: float, correct: float) -> list[dict]:
        nats = mean + 0.5 * rng.standard_normal(40)[clusters] + 0.3 * rng.standard_normal(160)
        lines = records(contender, nats.tolist(), cluster_size=4 if clustered else 1)
        # A model that finds replies likelier also guesses more of their tokens.
        return [line | {"correct": float(c)} for line, c in zip(lines, 10 - 4 * (nats - correct), strict=True)]

    won = 0
    for _ in range(runs):
        groups = [scored(name, 3.0, 3.0) for name in ("base", "champion")[:baselines]]
        lines = [line for group in (*groups, scored("candidate", 3.0 - effect, 3.0)) for line in group]
        won += compare(lines, metrics, settings, intervals)["verdict"] == "PROMOTE"
    return won / runs


def test_the_whole_verdict_promotes_identical_models_at_no_more_than_the_nominal_rate():
    # Without a minimum effect and secondary metrics the interval alone decides. The standard error of 800 is 0.18 %,
    # and 500 draws reach that far into the tail less surely than the 2,000 of params.yaml.
    rate = verdicts(0.0, 800, seed=1, minimum_effect=0.0, secondary={})
    assert rate <= NOMINAL + 3 * 0.0018
    assert rate > 0, "a verdict that never errs is one that never promotes"


def test_as_it_is_configured_the_verdict_promotes_identical_models_hardly_ever():
    assert verdicts(0.0, 200, seed=2) <= NOMINAL
    assert verdicts(0.0, 200, seed=3, baselines=2) <= NOMINAL


def test_a_verdict_that_ignores_clusters_would_promote_identical_models_far_too_often():
    assert verdicts(0.0, 200, seed=4, clustered=False, minimum_effect=0.0, secondary={}) > 8 * NOMINAL


def test_a_planted_effect_is_found_with_the_stated_power():
    # The difference of two models has the standard error sqrt(2 (0.5² + 0.3²/4) / 40) = 0.117 nats. An effect of 4.09
    # of them, 0.48 nats, has power 0.9 at 0.25 %; the minimum effect and the secondary metric cost a little.
    assert verdicts(0.50, 200, seed=5) >= 0.85
    # Against two baselines at once, with a candidate whose errors both share, a little more effect is needed.
    assert verdicts(0.60, 100, seed=6, baselines=2) >= 0.85


@pytest.mark.parametrize("clusters", [20, 60])
def test_intervals_of_skewed_ratios_miss_no_more_than_stated_at_either_end(clusters):
    """The interval alone, with many more runs than the whole verdict affords: a few conversations gain most."""
    rng = np.random.default_rng(7)
    runs, truth = 3000, np.exp(0.5)
    drawn = Resampling.over([str(index) for index in range(clusters)], 1000, seed=7)
    missed, percentile = np.zeros(2), np.zeros(2)
    for _ in range(runs):
        tokens = rng.gamma(2.0, 10.0, clusters)
        gain = tokens * np.exp(rng.standard_normal(clusters))
        found = ratio_estimate([np.column_stack([gain, tokens])], drawn)
        means = drawn.sums(np.column_stack([gain, tokens]))
        for count, bounds in (
            (missed, found.interval(0.95)),
            (percentile, interval(found.value, means[:, 0] / means[:, 1], 0.95, clusters)),
        ):
            count += bounds.low > truth, bounds.high < truth
    # Skew this strong costs the bootstrap-t some of its upper end; the lower one, which promotes, is as stated.
    assert missed[0] / runs <= 0.025 + 3 * 0.0029
    assert missed[1] < 0.7 * percentile[1]


# --- held-out pairs --------------------------------------------------------------------------------------------------


def pair_lines(contender: str, right: int, count: int, apart: bool = False) -> dict[str, list[dict]]:
    """Lines of pairs of which a model finds the chosen reply likelier in the first `right`."""
    lines = [
        {"contender": contender, "id": f"p{n}", "cluster": f"k{n}", "kind": "preferred", "person": ""}
        | {"chosen": 10.0 if n < right else 30.0, "rejected": 20.0, "chosen_tokens": 10, "rejected_tokens": 10}
        for n in range(count)
    ]
    return {"preferences_apart" if apart else "preferences": lines}


def decide_pairs(metrics, base: int, candidate: int, count: int = 400, apart: bool = False, **changes) -> dict:
    lines = records("base", spread(3.0)) + records("candidate", spread(2.0, seed=1), correct=0.6)
    found = [pair_lines(name, right, count, apart) for name, right in (("base", base), ("candidate", candidate))]
    guarded = {file: [line for one in found for line in one[file]] for file in found[0]}
    settings = SETTINGS.model_copy(update={"secondary": {"preference_accuracy": 0.1}} | changes)
    return compare(lines, metrics, settings, INTERVALS, guarded)


def test_a_candidate_that_finds_preferred_replies_less_likely_is_held(metrics):
    assert decide_pairs(metrics, 200, 200)["verdict"] == "PROMOTE"
    found = decide_pairs(metrics, 280, 200)
    assert found["verdict"] == "HOLD"
    assert any("preference_accuracy 0.5 against 0.7" in reason for reason in found["reasons"])


def test_few_pairs_decide_nothing_and_pairs_of_a_compared_model_never(metrics):
    assert decide_pairs(metrics, 2, 1, count=3)["verdict"] == "PROMOTE"
    none = decide_pairs(metrics, 0, 0, count=0)
    assert none["verdict"] == "PROMOTE" and not any("preference" in reason for reason in none["reasons"])
    found = decide_pairs(metrics, 400, 0, apart=True)
    assert found["verdict"] == "PROMOTE"
    assert found["differences"]["base"]["preference_accuracy_apart"]["difference"] == -1.0


def test_preferences_can_be_the_primary_metric_also_without_any_reference(metrics):
    changes = {"primary": "preference_accuracy", "secondary": {}}
    assert decide_pairs(metrics, 200, 300, **changes)["verdict"] == "PROMOTE"
    assert decide_pairs(metrics, 200, 204, **changes)["verdict"] == "HOLD"
    lines = [{"contender": name, "id": "a", "cluster": "a", "turns": []} for name in ("base", "candidate")]
    guarded = {
        "preferences": pair_lines("base", 200, 400)["preferences"] + pair_lines("candidate", 300, 400)["preferences"]
    }
    settings = SETTINGS.model_copy(update=changes)
    assert compare(lines, metrics, settings, INTERVALS, guarded)["verdict"] == "PROMOTE"
    with pytest.raises(UserError, match="preference_accuracy, which was not measured"):
        compare(lines, metrics, settings, INTERVALS, {})


def test_judgements_by_coin_toss_promote_no_more_often_than_the_interval_allows(metrics):
    draw = np.random.default_rng(7)
    lines = [{"contender": name, "id": "a", "cluster": "a", "turns": []} for name in ("base", "candidate")]
    settings = SETTINGS.model_copy(update={"primary": "preference_accuracy", "secondary": {}, "minimum_effect": 0.0})
    promoted = 0
    for _ in range(400):
        found = []
        for name in ("base", "candidate"):
            pairs = pair_lines(name, 0, 60)["preferences"]
            found += [pair | {"chosen": float(draw.choice((10.0, 30.0)))} for pair in pairs]
        promoted += compare(lines, metrics, settings, INTERVALS, {"preferences": found})["verdict"] == "PROMOTE"
    # One-sided 0.25 %: 1 of 400 is expected, 6 or more come up in six of 10,000 such tests.
    assert promoted < 6
