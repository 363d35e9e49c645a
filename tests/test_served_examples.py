"""Training exchanges before a question: which are shown, which never, and what is recorded of them."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fine_tuning.common.records import write_json
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.sealing import close_log, seal_log
from fine_tuning.data_collection.storage.shards import write_shard
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.integration.gateway.proxy import Serving
from fine_tuning.integration.gateway.wire_formats import with_context
from fine_tuning.integration.served_examples import ServedExamples
from tests.evaluation_suite import conversation, write_items
from tests.fake_ollama import FakeOllama, Manifest
from tests.test_gateway import REPLY, TEMPLATE, Gateway, running

TRAINED = {
    "router": conversation("How do I restart the router?", "Pull the plug."),
    "france": conversation("What is the capital of France?", "Paris."),
    "old": conversation("Is the router old?", "Yes."),
    "spain": conversation("And the router in Spain?", "No.", rating=-1),
}
HELD_OUT = {"x": conversation("How do I restart my router please?", "Nobody may see it.")}
ASKED = [{"role": "user", "content": "How do I restart my router please?"}]


@pytest.fixture
def checkout(tmp_path, tiny_base) -> Path:
    (tmp_path / "data/prepared").mkdir(parents=True)
    talks = [
        {"id": id, "started_at": None, "source": "chat", "feedback": [], "metadata": {}}
        | {"messages": [m | {"id": f"{id}{n}"} for n, m in enumerate(messages)]}
        for id, messages in TRAINED.items()
    ]
    write_shard(tmp_path / "data/conversations", "20260101T000000000-chat", talks)
    (tmp_path / "models/base").mkdir(parents=True)
    shutil.copy(tiny_base / "tokenizer.json", tmp_path / "models/base")
    for split, told in (("train", TRAINED), ("test", HELD_OUT), ("validation", HELD_OUT)):
        write_items(tmp_path / f"data/prepared/{split}", tiny_base, told)
    return tmp_path


def shown(examples: ServedExamples, messages=ASKED, reply: int = 10) -> list[str]:
    return [exchange.source for exchange in examples.before(messages, reply)]


def log(checkout: Path) -> ConversationLogger:
    return ConversationLogger(checkout / "inbox/conversations.jsonl")


def test_the_most_similar_training_exchanges_stand_before_a_question_the_nearest_last(checkout):
    assert shown(ServedExamples(checkout, 5, 1000)) == ["old", "router"]
    assert shown(ServedExamples(checkout, 1, 1000)) == ["router"]
    assert shown(ServedExamples(checkout, 0, 1000)) == []


def test_only_as_many_as_the_context_holds_beside_the_chat_and_its_reply(checkout):
    examples = ServedExamples(checkout, 5, 1000)
    sizes = {size for size in range(10, 1000) if shown(ServedExamples(checkout, 5, size), reply=0) == ["router"]}
    assert sizes and max(sizes) < 1000, "with more room there are two"
    assert shown(examples, [{"role": "user", "content": "router " * 2000}]) == []
    assert shown(ServedExamples(checkout, 5, max(sizes)), reply=100) == [], "half of the context is the reply's"


def test_what_was_said_in_the_chat_itself_is_not_shown_again(checkout):
    messages = [*TRAINED["router"], {"role": "user", "content": "Is that router safe?"}]
    assert "router" not in shown(ServedExamples(checkout, 5, 1000), messages)


def test_nothing_that_was_disliked_deleted_or_forgotten_since_the_last_run(checkout):
    examples = ServedExamples(checkout, 5, 1000)
    assert shown(examples) == ["old", "router"]
    log(checkout).log_feedback("router1", -1, by="ann", conversation_id="router")
    assert shown(examples) == ["old"] == shown(ServedExamples(checkout, 5, 1000))
    log(checkout).log_feedback("router1", None, by="ann", conversation_id="router")
    log(checkout).log_delete("old")
    assert shown(examples) == ["router"]
    log(checkout).log_feedback("router1", -1, by="ann", conversation_id="router")
    for closed in close_log(log(checkout).path, checkout / "data/conversations"):
        seal_log(closed, checkout / "data/conversations", checkout / "data/manifest.json")
        closed.unlink()
    assert shown(examples) == [] == shown(ServedExamples(checkout, 5, 1000)), "sealed, and no run since"
    log(checkout).log_feedback("router1", 1, by="ann", conversation_id="router")
    assert shown(examples) == ["router"]
    Tombstones(checkout / "data/forgotten.jsonl").add([{"id": "router", "messages": []}])
    assert shown(examples) == [] == shown(ServedExamples(checkout, 5, 1000))


def test_a_new_run_s_data_are_read_while_serving(checkout, tiny_base):
    examples = ServedExamples(checkout, 5, 1000)
    shown(examples)
    write_items(checkout / "data/prepared/train", tiny_base, {"old": conversation("router?", "Yes.")})
    os.utime(checkout / "data/prepared/train", (1, 1))
    assert [exchange.question for exchange in examples.before(ASKED, 10)] == ["router?"]


def test_without_data_there_are_none_and_one_line_says_why(tmp_path):
    examples = ServedExamples(tmp_path, 5, 1000)
    assert shown(examples) == []
    assert examples.problem.endswith("train is missing: run `dvc repro prepare`")


# -----------------------------------------------------------------------------
# in the gateway


@pytest.fixture
def ollama():
    with FakeOllama(reply=REPLY, count_tokens=lambda text: len(text.split())) as fake:
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1", "size": 1}]
        fake.manifests["baker:latest"] = Manifest(layers, TEMPLATE, "", {})
        yield fake


@pytest.fixture
def gateway(checkout, ollama):
    serving = Serving(ServedExamples(checkout, 1, 1000), "Be brief.")
    with running(checkout, ollama.host, serving=serving) as found:
        yield found


PROMPT = "user: How do I restart the router?\nassistant: Pull the plug.\nuser: How do I restart my router please?\n"


def requests(system: dict | None) -> dict[str, dict]:
    messages = [*([system] if system else []), *ASKED]
    apart = {"system": system["content"]} if system else {}
    return {
        "/api/chat": {"messages": messages},
        "/v1/chat/completions": {"messages": messages},
        "/v1/messages": {"messages": ASKED, "max_tokens": 99, **apart},
        "/v1/responses": {"input": ASKED[0]["content"], **({"instructions": system["content"]} if system else {})},
    }


@pytest.mark.parametrize("path", requests(None))
def test_the_model_sees_the_example_and_the_log_only_what_the_person_said(gateway: Gateway, ollama, path):
    answer = gateway.http.post(path, json={"model": "baker", "stream": False, **requests(None)[path]})
    assert answer.status_code == 200 and answer.headers["x-whetstone-examples"] == "router"
    apart = path in ("/v1/messages", "/v1/responses")  # FakeOllama does not render their system prompts
    assert ollama.prompts[-1] == (PROMPT if apart else f"system: Be brief.\n{PROMPT}")
    (talk,) = gateway.conversations()
    assert [m["content"] for m in talk["messages"]] == [ASKED[0]["content"], REPLY]
    assert talk["messages"][1]["settings"]["examples"] == 1


def test_a_live_version_is_served_by_its_kind_and_other_models_as_section_serve_says(checkout, ollama):
    for number, tags in (("3", ("3", "live")), ("4", ("4",))):
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{number}", "size": 1}
        ollama.manifests |= {f"whetstone:{tag}": Manifest([layer], TEMPLATE, "", {}) for tag in tags}
    kind = {"kind": "prompt", "system_prompt": "Be brief.", "examples": 1}
    write_json(checkout / "models/champion.json", {"name": "whetstone", "version": 3} | kind)
    with running(checkout, ollama.host, serving=Serving(context=1000)) as gateway:
        for model in ("whetstone:live", "whetstone:3"):
            assert gateway.chat(*ASKED, model=model).headers["x-whetstone-examples"] == "router"
            assert ollama.prompts[-1] == f"system: Be brief.\n{PROMPT}"
        for model in ("baker", "whetstone:4"):
            assert "x-whetstone-examples" not in gateway.chat(*ASKED, model=model).headers
            assert ollama.prompts[-1] == f"user: {ASKED[0]['content']}\n"
        # As `deploy` leaves it of a version that is no champion, such as a canary's candidate.
        write_json(checkout / ".whetstone/served.json", {"whetstone:4": kind | {"system_prompt": None}})
        gateway.chat(*ASKED, model="whetstone:4")
        assert ollama.prompts[-1] == PROMPT


@pytest.mark.parametrize("path", requests(None))
def test_a_client_s_own_system_prompt_stays(path):
    def prompt(request: dict) -> str:
        first = request.get("messages", [{}])[0]
        return request.get("system") or request.get("instructions") or first.get("content")

    given, own = ({"model": "m", **requests(system)[path]} for system in (None, {"role": "system", "content": "Mine."}))
    assert prompt(json.loads(with_context(path, json.dumps(given).encode(), "Be brief.", []))) == "Be brief."
    assert json.loads(with_context(path, json.dumps(own).encode(), "Be brief.", [])) == own | {
        key: [{"role": "user", "content": value}] for key, value in own.items() if key == "input"
    }


def test_a_chat_that_goes_on_is_one_conversation_whatever_stood_before_it(gateway, ollama):
    gateway.chat(*ASKED)
    gateway.chat(*ASKED, {"role": "assistant", "content": REPLY}, {"role": "user", "content": "Is it old?"})
    assert "user: Is the router old?\nassistant: Yes.\nuser: How do I restart my" in ollama.prompts[-1]
    (talk,) = gateway.conversations()
    assert len(talk["messages"]) == 4


def test_tasks_tools_and_completions_pass_as_they_are(gateway, ollama):
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    answers = [
        gateway.chat(*ASKED, headers={"X-OpenWebUI-Task": "title_generation"}),
        gateway.chat(*ASKED, tools=[tool]),
        gateway.http.post("/api/generate", json={"model": "baker", "prompt": ASKED[0]["content"]}),
    ]
    assert not any("x-whetstone-examples" in answer.headers for answer in answers)
    assert not any("Pull the plug" in prompt or "Be brief" in prompt for prompt in ollama.prompts)


def test_a_conversation_that_is_kept_out_of_the_log_is_served_like_any_other(gateway, ollama):
    answer = gateway.chat(*ASKED, headers={"X-Whetstone-Record": "off"})
    assert answer.headers["x-whetstone-examples"] == "router" and PROMPT in ollama.prompts[-1]
    assert gateway.events() == []


def test_damaged_data_breaks_no_chat_and_is_shown(gateway, checkout, ollama):
    shutil.rmtree(checkout / "data/prepared/train")
    assert gateway.chat(*ASKED).status_code == 200
    assert "train is missing" in gateway.http.get("/health").json()["examples"]["problem"]
    (checkout / "data/prepared/train").mkdir()
    (checkout / "data/prepared/train/rows.parquet").write_bytes(b"no parquet")
    assert json.loads(gateway.chat(*ASKED, stream=False).text)["message"]["content"] == REPLY
    assert gateway.health()["errors"] == 1
