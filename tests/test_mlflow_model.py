"""A registered version loads and answers by MLflow's own means."""

import shutil
from functools import partial
from pathlib import Path

import httpx
import pytest

from fine_tuning.common.dvc_files import md5_path
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import tracking_uri
from fine_tuning.model_management.chat_version import find_base
from fine_tuning.runtime.base_model import hash_weights, load_model, read_base_card
from fine_tuning.schema.chat_format import encode_prompt, load_tokenizer
from tests.forked import INTERPRETER
from tests.servers import answers, free_ports, running

pytestmark = pytest.mark.end_to_end

ASKED = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 6}
GREEDY = ASKED | {"temperature": 0.0}
CHAMPION = "models:/trial@champion"


@pytest.fixture
def mlflow(promoted):
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    yield mlflow
    mlflow.set_tracking_uri(None)


def expected_reply() -> str:
    """What transformers and peft say by themselves."""
    from peft import PeftModel

    base = Path("models/base")
    tokenizer, model = load_tokenizer(base), PeftModel.from_pretrained(load_model(base, "float32"), "models/adapter")
    prompt = encode_prompt(tokenizer, ASKED["messages"])
    made = model.generate(input_ids=model.base_model.model.lm_head.weight.new_tensor([prompt]).long(), max_new_tokens=6)
    return tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)


def test_the_champion_answers_chat_messages(mlflow):
    model = mlflow.pyfunc.load_model(CHAMPION)
    answer = model.predict(GREEDY)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected_reply()}
    assert answer["model"] == "trial" and answer["usage"]["completion_tokens"] == 6
    assert choice["finish_reason"] == "length"
    sampled = model.predict(ASKED | {"temperature": 1.0, "top_k": 40, "stop": ["a", "e", " "]})["choices"][0]
    assert not set("ae ") & set(sampled["message"]["content"])
    assert model.metadata.signature.inputs.input_names()[0] == "messages"
    assert model.input_example["messages"][0]["role"] == "user"


def test_a_version_names_its_verdict_and_the_data_behind_it(mlflow):
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("trial", "champion")
    assert "Verdict **PROMOTE**" in version.description
    run = client.get_run(version.run_id)
    data = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert data.keys() == {"train", "validation", "test"}
    assert data["train"].digest == md5_path(Path("data/prepared/train"))
    assert mlflow.data.get_source(data["test"]).uri == "data/prepared/test"


def test_serving_answers_invocations(promoted, tmp_path):
    (port,) = free_ports(1)
    command = [INTERPRETER, "-m", "mlflow", "models", "serve", "-m", CHAMPION, "--env-manager", "local"]
    address = f"http://127.0.0.1:{port}"
    ready = partial(answers, f"{address}/ping")
    with running([*command, "-p", str(port)], ready, tmp_path / "log", MLFLOW_TRACKING_URI=tracking_uri()):
        answer = httpx.post(f"{address}/invocations", json=GREEDY, timeout=120)
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": expected_reply()}


def test_the_base_is_found_by_its_hash_or_made_anew(tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"other")
    card = {"model": str(tiny_base), "revision": None, "chat_template_sha256": None, "sha256": hash_weights(tiny_base)}
    assert find_base(card, [None, str(other), str(tiny_base)], tmp_path) == tiny_base
    made = find_base(card, [str(other)], tmp_path / "made")
    assert read_base_card(made)["sha256"] == card["sha256"]
    with pytest.raises(UserError, match="WHETSTONE_BASE"):
        find_base(card | {"sha256": "0" * 64}, [], tmp_path / "again")
