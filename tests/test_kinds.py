"""Kinds of versions: chosen on validation, measured on the test split with what stands before a question."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json
from fine_tuning.evaluation.looks import record_looks
from fine_tuning.evaluation.metric_modules.loading import load_metric
from fine_tuning.evaluation.suite.contenders import find_champion, of_kind
from fine_tuning.evaluation.verdict.comparison import Evidence, kind_in_words
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.schema.chat_format import load_tokenizer
from fine_tuning.schema.prepared import split_sha256
from tests.evaluation_suite import MODULES, SETTINGS, build_suite, conversation, evaluator_of, write_items
from tests.fake_ollama import FakeOllama
from tests.registered import here, repro
from tests.test_comparison import SETTINGS as COMPARE

PROMPTING = SETTINGS.prompting_baselines


@pytest.fixture(scope="module")
def suite(tiny_base, tmp_path_factory):
    return build_suite(tmp_path_factory.mktemp("suite"), tiny_base)


@pytest.fixture(scope="module")
def train(tiny_base, tmp_path_factory):
    talks = {f"t{n}": conversation(f"Where is the {thing}?", "On the roof.") for n, thing in enumerate(("fox", "dog"))}
    return write_items(tmp_path_factory.mktemp("train") / "train", tiny_base, talks)


@pytest.fixture(scope="module")
def evaluator(suite, tmp_path_factory):
    return evaluator_of(suite.items, suite.base.folder, tmp_path_factory.mktemp("memo"), kind="auto")


def test_the_kind_with_the_fewest_nats_a_token_on_validation_is_chosen(evaluator, suite, train):
    chosen, said = evaluator.choose_kind(suite.base, suite.candidate, train)
    nats = said["validation"]["nats_per_token"]
    assert (said["name"], chosen.folder) == (min(nats, key=nats.get), suite.candidate.folder)
    assert set(nats) == {"adapter", "prompt", "adapter+examples"} and nats["prompt"] > nats[said["name"]]
    assert said["validation"]["n"] == PROMPTING.items
    # The same with base and tuned model exchanged: now the base does better.
    other, swapped = evaluator.choose_kind(replace(suite.candidate, name="base"), suite.base, train)
    assert (swapped["name"], other.name, other.folder) == ("prompt", suite.base.name, suite.candidate.folder)
    assert swapped["validation"]["nats_per_token"]["adapter"] > swapped["validation"]["nats_per_token"]["prompt"]
    assert (other.system_prompt, other.examples) == (PROMPTING.system_prompt, PROMPTING.examples)


def test_the_parameter_chooses_without_measuring_and_without_references_it_is_the_adapter(suite, tmp_path, train):
    for kind in ("adapter", "prompt", "adapter+examples"):
        evaluator = evaluator_of(suite.items, suite.base.folder, tmp_path, kind=kind)
        chosen, said = evaluator.choose_kind(suite.base, suite.candidate, train)
        assert said["name"] == chosen.kind == kind and "validation" not in said
        assert kind_in_words(said) == ([] if kind == "adapter" else [f"the candidate is of kind {kind}"])
    own_words = [replace(item, authors=["baker"] * len(item.runs)) for item in suite.items]
    for items in (own_words, []):
        evaluator = evaluator_of(items, suite.base.folder, tmp_path, kind="auto")
        chosen, said = evaluator.choose_kind(suite.base, suite.candidate, train)
        assert chosen == suite.candidate and "no reference" in kind_in_words(said)[0]


def test_a_kind_without_anything_before_the_question_is_one_clear_line(suite):
    nothing = PROMPTING.model_copy(update={"examples": 0, "system_prompt": None})
    settings = SETTINGS.model_copy(update={"prompting_baselines": nothing})
    for kind in ("prompt", "adapter+examples"):
        with pytest.raises(UserError, match=r"needs evaluate\.prompting_baselines\.examples: set it"):
            of_kind(kind, suite.base, suite.candidate, settings)


@pytest.mark.parametrize("kind", ["prompt", "adapter+examples"])
def test_the_chosen_kind_meets_base_on_the_test_split_with_its_context_and_cost(suite, tmp_path, train, kind):
    evaluator = evaluator_of(suite.items, suite.base.folder, tmp_path, kind=kind)
    chosen, said = evaluator.choose_kind(suite.base, suite.candidate, train)
    said |= evaluator.cost(chosen, train)
    found = evaluator.run(suite.base, None, chosen, train)
    lines = {name: {x["id"]: x for x in found.records if x["contender"] == name} for name in ("base", "candidate")}
    assert lines["base"].keys() == lines["candidate"].keys() == {item.id for item in suite.items}
    for id, line in lines["candidate"].items():
        base = lines["base"][id]
        assert line["length"] > base["length"] and line["nll"] != base["nll"]
        assert all(line.get(key) == base.get(key) for key in ("tokens", "bytes", "suite", "prompt"))
    general = {x["contender"]: x for x in found.guarded["general"] if x["id"] == "arithmetic-01"}
    assert general["base"]["right"] != general["candidate"]["right"], "the general questions have it before them, too"
    assert {x["contender"] for x in found.records} == {"base", "candidate", "candidate_quantised"}, "and no baselines"

    without, tokens = said["prompt_tokens"]
    assert tokens > without and all(seconds > 0 for seconds in said["first_token_seconds"])
    metrics = [load_metric(name, MODULES) for name in ("perplexity", "token_accuracy")]
    evidence = Evidence(found.records, found.guarded, (), found.memory, (), (), metrics, SETTINGS.interval)
    verdict = evidence.verdict(COMPARE, "a" * 64, {"sha256": evaluator.suite, "kind": said})
    assert verdict["kind"] == said and verdict["prompting_baselines"] == {}
    (reason,) = [reason for reason in verdict["reasons"] if "of kind" in reason]
    assert reason.startswith(f"the candidate is of kind {kind}; its prompts have {tokens:.0f} tokens instead of")
    assert not any("prompting_baselines" in reason for reason in verdict["reasons"])


def test_another_kind_of_one_adapter_is_another_look(tmp_path):
    seen = {"eval_set_sha256": "e", "adapter_sha256": "a"}
    kinds = [seen, seen | {"kind": {"name": "adapter"}}, seen | {"kind": {"name": "prompt"}}]
    assert record_looks(kinds, tmp_path / "looks.jsonl") == [("e", "a"), ("e", "a prompt")]
    assert record_looks(kinds, tmp_path / "looks.jsonl") == [("e", "a"), ("e", "a prompt")]


def kind(name: str, system_prompt: str | None = None) -> dict:
    return {"kind": {"name": name, "system_prompt": system_prompt, "examples": 3}}


@pytest.mark.end_to_end
def test_promote_and_deploy_take_a_prompt_version_with_the_base_and_say_what_ollama_cannot_do(candidate, capsys):
    shutil.copy("models/base/tiny.gguf", "models/base/base-Q8_0.gguf")
    repro(candidate, suite=kind("prompt", "Say where it is."))
    here("promote")
    named, version = read_json("models/champion.json"), open_registry("trial").version(1)
    base = sha256_file("models/base/base-Q8_0.gguf")
    assert named["gguf_sha256"] == version.tags["gguf_sha256"] == base != sha256_file("models/package/model.gguf")
    assert {key: named[key] for key in ("kind", "system_prompt", "examples")} == {
        "kind": "prompt", "system_prompt": "Say where it is.", "examples": 3,
    }  # fmt: skip
    assert (version.tags["kind"], version.tags["examples"]) == ("prompt", "3")
    assert version.tags["system_prompt"] == "Say where it is."
    assert version.tags["examples_sha256"] == split_sha256("data/prepared/train")
    assert "the candidate is the champion" in read_json("metrics/comparison.json")["reasons"][0]
    assert 'SYSTEM """Say where it is."""' in Path("models/champion/package/Modelfile").read_text()
    champion = find_champion(Path("models/champion.json"))
    assert (champion.kind, champion.system_prompt, champion.examples) == ("prompt", "Say where it is.", 3)

    tokenizer = load_tokenizer(Path("models/merged"))
    with FakeOllama(count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False))) as ollama:
        here("deploy", "--host", ollama.host)
        assert ollama.manifests["trial:live"].system == "Say where it is."
    said = capsys.readouterr().out
    assert "Ollama alone cannot look for the 3 training exchanges" in said and "the gateway and the chat app do" in said

    here("promote")  # again
    assert len(open_registry("trial").versions()) == 1


@pytest.mark.end_to_end
def test_another_kind_of_the_same_adapter_is_another_candidate_and_another_version(candidate):
    here("promote")
    assert "kind" not in read_json("models/champion.json")
    repro(candidate, suite=kind("adapter+examples"))
    assert "champion" not in read_json("metrics/comparison.json")
    here("promote")
    first, second = open_registry("trial").versions()
    assert (first.tags["kind"], second.tags["kind"]) == ("adapter", "adapter+examples")
    assert first.tags["gguf_sha256"] == second.tags["gguf_sha256"] and "champion" in second.aliases
    assert read_json("models/champion.json")["kind"] == "adapter+examples"
    here("promote", "1")
    assert "kind" not in read_json("models/champion.json")
