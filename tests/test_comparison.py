"""Comparison: what it takes to be promoted, what holds, and how often chance alone would promote."""

import numpy as np
import pytest

from fine_tuning.errors import UserError
from fine_tuning.evaluation.comparison import CompareSettings, compare
from fine_tuning.evaluation.evaluate_settings import IntervalSettings
from fine_tuning.evaluation.metrics import load_metric
from fine_tuning.evaluation.privacy import personal_data
from fine_tuning.evaluation.statistics import Resampling, holm, interval, mcnemar, share_at_most
from tests.evaluation_suite import MODULES

INTERVALS = IntervalSettings(draws=2000, confidence=0.95, seed=0)
SETTINGS = CompareSettings(
    primary="perplexity",
    minimum_effect=0.01,
    minimum_conversations=20,
    secondary={"token_accuracy": 0.02},
    quantisation_tolerance=0.05,
    goldens=["facts-01"],
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
    found = decide(metrics, records("base", spread(3.0)), records("candidate", spread(2.0), correct=0.6))
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
        "the champion has another tokenizer: nll_per_byte decides against it instead of perplexity",
        "not compared with the champion: token_accuracy",
    ]
    found = decide(measured, base, in_other_tokens(strong), candidate)
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].startswith("worse: nll_per_byte")
    with pytest.raises(UserError, match="decides by nll_per_byte, which was not measured"):
        decide(metrics, base, in_other_tokens(weak), candidate)


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


def own_words(lines: list[dict], nats: float) -> list[dict]:
    """The same records with a second reply each, which is a model's own."""
    columns = ("nll", "tokens", "correct")
    return [
        line
        | {
            "turns": [
                {name: line[name] for name in columns} | {"reference": True, "bytes": 1},
                {"nll": nats * TOKENS, "tokens": TOKENS, "correct": 10, "reference": False, "bytes": 1},
            ]
        }
        for line in lines
    ]


def test_the_bias_of_a_models_own_words_is_shown_and_decides_nothing(metrics):
    base, candidate = records("base", spread(3.0)), records("candidate", spread(2.0))
    plain = decide(metrics, base, candidate)
    found = decide(metrics, own_words(base, 0.1), own_words(candidate, 5.0))
    assert found["verdict"] == plain["verdict"] == "PROMOTE"
    assert found["primary"] == plain["primary"]
    assert found["provenance"]["left_out"] == 60
    assert found["provenance"]["with_own_words"]["difference"] > 0


def test_own_words_alone_are_inconclusive(metrics):
    lines = [
        {"contender": name, "id": "a", "cluster": "a", "turns": [{"reference": False}]}
        for name in ("base", "candidate")
    ]
    assert decide(metrics, lines)["verdict"] == "INCONCLUSIVE"


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


# --- statistics ------------------------------------------------------------------------------------------------------


def test_whole_clusters_are_drawn():
    drawn = Resampling.over(["a", "a", "b", "c", "c", "c"], 200, seed=0)
    assert drawn.clusters == 3
    assert (drawn.weights[:, 0] == drawn.weights[:, 1]).all()
    per_draw = drawn.weights[:, [0, 2, 3]].sum(axis=1)
    assert (per_draw == 3).all()


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
    assert share_at_most(np.array([1.0, 2.0, 3.0]), 0.5, clusters=10**6) == pytest.approx(0.25, abs=0.001)


def test_mcnemar_is_exact():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(4, 4) == 1


# --- how often is the verdict wrong? ---------------------------------------------------------------------------------


def promotions(effect: float, runs: int, clustered: bool, seed: int) -> float:
    """Share of simulated comparisons whose interval excludes zero gain.

    60 clusters of four conversations. A cluster's conversations share most of the difference between two models, as
    near-duplicates do: standard deviations 0.5 between clusters and 0.3 within, in nats.
    """
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(60), 4)
    drawn = Resampling.over(clusters if clustered else np.arange(240), 1000, seed=seed)
    won = 0
    for _ in range(runs):
        gain = effect + 0.5 * rng.standard_normal(60)[clusters] + 0.3 * rng.standard_normal(240)
        means = drawn.sums(np.column_stack([gain, np.ones(240)]))
        won += interval(gain.mean(), means[:, 0] / means[:, 1], 0.95, drawn.clusters).low > 0
    return won / runs


def test_identical_models_are_promoted_at_no_more_than_the_nominal_rate():
    # 2.5 % is nominal; the standard error of 4,000 runs is 0.25 %.
    assert promotions(0.0, 4000, clustered=True, seed=1) <= 0.025 + 2 * 0.0025


def test_a_bootstrap_that_ignores_clusters_would_promote_identical_models_far_too_often():
    assert promotions(0.0, 500, clustered=False, seed=2) > 0.10


def test_a_planted_effect_is_found():
    # 0.22 nats against a standard error of 0.067: power 0.9 at 2.5 % needs 3.24 standard errors.
    assert promotions(0.22, 500, clustered=True, seed=3) >= 0.87
