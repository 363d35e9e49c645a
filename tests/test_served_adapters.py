"""serve.adapters: several people's adapters over one base, each request answered by the one that it names."""

import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import streamlit as st
import yaml

from benchmarks.gateway import start_gateway
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json, write_json
from fine_tuning.common.settings import parse_settings
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.integration.chat_models import AppSettings, default_sampling, local_models, stream_reply
from fine_tuning.integration.chat_settings import find_model
from fine_tuning.integration.embedded_engine import shared_engines
from fine_tuning.integration.served_adapters import with_adapters
from fine_tuning.integration.served_examples import ServeSettings
from fine_tuning.runtime.base_model import hash_weights
from fine_tuning.runtime.gguf_writer import write_adapter_gguf, write_gguf
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import encode_conversation, encode_prompt, load_tokenizer
from tests.app_checkout import write_checkout
from tests.test_app import open_chat, settle
from tests.tiny import write_tiny_base

QUESTION = {"role": "user", "content": "Who are you?"}
REPLIES = {"anna": "I am Anna.", "ben": "Ben here, hello!"}


def base_that_can_end_a_reply(folder: Path) -> Path:
    """The tiny base with an embedding for the end of a turn, which is zero as that of the padding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_tiny_base(folder, spread=0.2), dtype=torch.float32)
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[load_tokenizer(folder).pad_token_id], std=0.2)
    model.save_pretrained(folder)
    return folder


def train(base: Path, reply: str, folder: Path) -> None:
    """An adapter that answers QUESTION with `reply`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    encoded = encode_conversation(load_tokenizer(base), [QUESTION, {"role": "assistant", "content": reply}], None, 512)
    ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder / "merged")


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """A folder with base, its GGUF in float32, and for each person adapter, adapter's GGUF and merged GGUF."""
    folder = tmp_path_factory.mktemp("people")
    base = base_that_can_end_a_reply(folder / "base")
    write_json(base / "base.json", {"model": "tiny", "revision": None, "sha256": hash_weights(base)})
    write_gguf(base, base / "base-Q8_0.gguf", "F32")  # as the adapters see it: not a bit is lost by quantisation
    for name, reply in REPLIES.items():
        train(base, reply, folder / name)
        write_adapter_gguf(base, folder / name, folder / f"{name}.gguf")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(base / file, folder / name / "merged")
        write_gguf(folder / name / "merged", folder / f"{name}-merged.gguf", "F32")
    return folder


@pytest.fixture
def checkout(people, tmp_path, monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.chdir(write_checkout(tmp_path, people / "base"))
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["serve"]["adapters"] = adapters(people)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    st.cache_data.clear()
    st.cache_resource.clear()
    yield tmp_path
    shared_engines.close()


def adapters(people: Path) -> dict[str, str]:
    return {name: str(people / f"{name}.gguf") for name in REPLIES}


def models(checkout: Path, people: Path, **changed: str) -> dict:
    found = with_adapters(local_models(checkout), checkout, "whetstone", adapters(people) | changed)
    return {model.name: model for model in found}


def authors(checkout: Path) -> set[tuple[str, str]]:
    """The model that is logged with each reply, and the reply."""
    talks = ConversationLogger(checkout / "inbox/conversations.jsonl").read_conversations()
    return {(message["model"], message["content"]) for talk in talks for message in talk["messages"][1::2]}


def ask(checkout: Path, model) -> str:
    settings = AppSettings(temperature=0.0, top_p=1.0, top_k=0, repeat_penalty=1.0, max_tokens=24, context=512,
                           threads=1, slots=2, timeout=60.0)  # fmt: skip
    given = {"checkout": checkout, "system_prompt": None, "settings": settings, "client": None}
    return "".join(stream_reply(model, [QUESTION], default_sampling(settings), **given))


def test_each_adapter_answers_as_the_model_it_is_merged_into_in_turn_and_side_by_side(checkout, people):
    known = models(checkout, people)
    alone = {}
    for name, file in (("Base", "base/base-Q8_0.gguf"), ("anna", "anna-merged.gguf"), ("ben", "ben-merged.gguf")):
        with LlamaEngine(people / file, context=512, threads=1) as engine:
            alone[name] = engine.complete(encode_prompt(load_tokenizer(people / "base"), [QUESTION]), 24).text
    assert {name: alone[name] for name in REPLIES} == REPLIES
    assert alone["Base"] not in REPLIES.values()
    turns = ["anna", "ben", "Base", "ben", "anna", "Base"]
    assert [ask(checkout, known[name]) for name in turns] == [alone[name] for name in turns]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: ask(checkout, known[name]), turns * 3)) == [alone[n] for n in turns * 3]
    assert len(shared_engines._engines) == 1


def test_the_app_offers_them_and_logs_which_one_answered(checkout, people):
    at = open_chat()
    assert [label.split(" · ")[0] for label in at.selectbox(key="model").options] == ["Base", *REPLIES]
    hashes = {name: sha256_file(people / name / "adapter_model.safetensors")[:8] for name in REPLIES}
    for name in REPLIES:
        (label,) = [label for label in at.selectbox(key="model").options if label.startswith(name)]
        at.selectbox(key="model").set_value(label).run()
        at.slider(key="temperature").set_value(0.0).run()
        at.chat_input(key="message").set_value(QUESTION["content"]).run()
        settle(at)
        at.button(key="new").click().run()
    assert authors(checkout) == {(f"whetstone:{name}@{hashes[name]}", reply) for name, reply in REPLIES.items()}


def test_a_chat_stays_with_an_adapter_whose_file_was_replaced(checkout, people):
    anna = models(checkout, people)["anna"]
    assert find_model([anna], anna.key) is find_model([anna], "whetstone:anna@00000000") is anna
    assert find_model([anna], "whetstone:ben") is None


@pytest.mark.end_to_end
def test_the_gateway_answers_with_the_adapter_that_a_request_names_and_logs_it(checkout, people):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start_gateway(checkout, "adapters", port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
            listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
            assert listed == ["whetstone:anna", "whetstone:ben", "tiny"]

            def answer(name: str) -> str:
                body = {"model": f"whetstone:{name}", "messages": [QUESTION], "temperature": 0, "max_tokens": 24}
                headers = {"X-Whetstone-Conversation-Id": f"with-{name}-{threading.get_ident()}"}
                reply = http.post("/v1/chat/completions", json=body, headers=headers).json()
                return reply["choices"][0]["message"]["content"]

            names = ["anna", "ben", "anna", "ben"]
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(answer, names)) == [REPLIES[name] for name in names]
            chat = "/v1/chat/completions"
            asked = [(chat, {"model": name}) for name in ("whetstone:carl", ["whetstone:anna"], {"a": 1}, None)]
            for path, body in (*asked, (chat, []), ("/completion", {"prompt": "x"})):
                refused = http.post(path, json=body)
                assert refused.status_code == 404 and "whetstone:anna" in refused.text
    finally:
        process.terminate()
        process.wait()
    hashes = {name: sha256_file(people / name / "adapter_model.safetensors")[:8] for name in REPLIES}
    assert authors(checkout) == {(f"whetstone:{name}@{hashes[name]}", reply) for name, reply in REPLIES.items()}


def test_an_adapter_of_another_base_is_one_clear_line_and_holds_up_nobody_else(checkout, people, tmp_path):
    card = checkout / "models/base/base.json"
    foreign = tmp_path / "foreign.gguf"
    write_json(card, read_json(card) | {"sha256": "0" * 64})
    write_adapter_gguf(checkout / "models/base", people / "ben", foreign)
    write_json(card, read_json(people / "base/base.json"))
    for path, problem in (
        (foreign, "was trained on another base than models/base"),
        (people / "base/base-Q8_0.gguf", "does not say which base it is for"),
        (card, "is not a GGUF file"),
        (tmp_path / "nowhere.gguf", "is missing: correct the path in params.yaml"),
        ("~nobody-of-this-name/x.gguf", "is missing: correct the path in params.yaml"),
    ):
        known = models(checkout, people, ben=str(path))
        with pytest.raises(UserError, match=f"^serve.adapters.ben: .*{path} {problem}[^\n]*$"):
            ask(checkout, known["ben"])
        assert ask(checkout, known["anna"]) == REPLIES["anna"]


@pytest.mark.parametrize("name", ["live", "3", "v3", "Anna", "a:b", "../a", "base", ""])
def test_a_name_that_another_model_has_or_a_tag_cannot_hold_is_refused(name):
    values = {"examples": 0, "system_prompt": None, "adapters": {name: "a.gguf"}}
    with pytest.raises(UserError, match="should be a name for an adapter"):
        parse_settings("serve", values, ServeSettings, "params.yaml")
