"""What Hugging Face's own libraries load from the project's folders and from a hub, and what goes to a hub."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest

from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import write_jsonl
from tests.fake_hub import Repository, running_hub
from tests.forked import INTERPRETER
from tests.registered import ROOT, type_command

pytestmark = pytest.mark.end_to_end

WRITE_BASE = """
import json, sys
from pathlib import Path
from fine_tuning.runtime.base_model import BaseSettings, write_base
settings = {"model": sys.argv[1], "revision": "main", "chat_template_sha256": None}
write_base(BaseSettings(**settings, trust_remote_code=False, gguf_converter=None), Path(sys.argv[2]))
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())
"""


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def variables(hub, place: Path) -> dict[str, str]:
    """The hub's environment, read when huggingface_hub is imported: by an interpreter of its own (PYTHONHASHSEED)."""
    ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(place), "PYTHONHASHSEED": "0"}
    return ours | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_folders_load_by_the_libraries_own_functions(trained_project, monkeypatch):
    import torch
    from datasets import load_dataset
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(trained_project.folder)
    ids = torch.tensor([[1, 20, 30, 40]])
    adapted = AutoPeftModelForCausalLM.from_pretrained("models/adapter", dtype=torch.float32)(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained("models/merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-2)
    card = ModelCard.load("models/adapter/README.md").data
    assert {"base_model", "datasets", "license", "tags", "model-index", "widget"} <= card.to_dict().keys()
    splits = load_dataset("data/prepared", cache_dir=str(trained_project.folder / ".cache"))
    assert set(splits) == {"train", "validation", "test"}
    for name, split in splits.items():
        assert split.num_rows == pyarrow.parquet.read_table(f"data/prepared/{name}").num_rows


def test_the_champion_is_pushed_and_loads_from_there(promoted, hub, tmp_path):
    for what in ("adapter", "merged", "gguf"):
        pushed = type_command(promoted, "push", "hub", f"me/{what}", "--what", what, **variables(hub, tmp_path))
        assert pushed.returncode == 0, pushed.stderr
        assert f"{hub.url}/me/{what}/commit/" in pushed.stdout
    assert (
        "no hub has the base model tiny"
        in type_command(promoted, "push", "hub", "me/adapter", **variables(hub, tmp_path)).stdout
    )
    adapter = hub.repositories["models/me/adapter"]
    files = adapter.at("main")[1]
    assert adapter.private and set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    weights = Path("models/champion/adapter/adapter_model.safetensors")
    assert hashlib.sha256(files["adapter_model.safetensors"]).hexdigest() == sha256_file(weights)
    assert b"library_name: peft" in files["README.md"] and b"split: test" in files["README.md"]
    assert hub.repositories["models/me/gguf"].at("main")[1]["model.gguf"][:4] == b"GGUF"
    command, environment = [INTERPRETER, "-c", LOAD, "me/merged"], os.environ | variables(hub, tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert int(done.stdout) > 50_000, done.stderr


def test_a_base_from_a_hub_is_known_by_its_commit(hub, tiny_base, tmp_path):
    from fine_tuning.runtime.base_model import hub_id, read_base_card
    from fine_tuning.training.model_card import name_base

    hub.repositories["models/me/base"] = Repository(private=False)
    commit = hub.repositories["models/me/base"].commit({file.name: file.read_bytes() for file in tiny_base.iterdir()})
    environment = os.environ | variables(hub, tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    subprocess.run([INTERPRETER, "-c", WRITE_BASE, "me/base", str(tmp_path / "base")], env=environment, check=True)
    card = read_base_card(tmp_path / "base")
    assert hub_id(card) == "me/base" and card["revision"] == commit
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base, named, revision in ((card, "me/base", commit), (card | {"revision": "main"}, "models/base", None)):
        (adapter / "adapter_config.json").write_text("{}")
        name_base(adapter, base, Path("models/base"))
        found = json.loads((adapter / "adapter_config.json").read_text())
        assert (found["base_model_name_or_path"], found["revision"]) == (named, revision)


def test_conversations_are_pushed_on_demand_with_a_warning(promoted, hub, tmp_path):
    command = ("push", "hub", "me/chats", "--what", "data", "--public")
    refused = type_command(promoted, *command, **variables(hub, tmp_path))
    assert refused.returncode == 1 and "run `dvc repro clean`" in refused.stderr
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello!"}]
    for name in "abc":
        record = {"id": name, "source": "test", "started_at": None, "messages": talk, "feedback": [], "metadata": {}}
        write_jsonl(promoted / f"data/clean/{name}-chat.jsonl", [record])
    pushed = type_command(promoted, *command, **variables(hub, tmp_path))
    assert "warning: masking misses some personal data: everybody will read" in pushed.stdout, pushed.stderr
    repository = hub.repositories["datasets/me/chats"]
    assert not repository.private and b"3 conversations" in repository.at("main")[1]["README.md"]
    again = type_command(promoted, *command[:-1], **variables(hub, tmp_path))
    assert again.returncode == 1 and "is public already: give --public" in again.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "the hub did not take me/chat (401): check"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub did not take me/chat (ConnectError): check"),
    ],
)
def test_a_hub_that_refuses_is_one_line(promoted, hub, tmp_path, change, words):
    refused = type_command(promoted, "push", "hub", "me/chat", **(variables(hub, tmp_path) | change))
    assert refused.returncode == 1 and words in refused.stderr and "Traceback" not in refused.stderr


def test_what_cannot_be_pushed_is_one_line(promoted):
    assert "give OWNER/NAME" in type_command(promoted, "push", "hub", "chat").stderr
    (promoted / "models/champion/adapter/README.md").write_text("changed")
    assert "is not what models/champion.dvc says" in type_command(promoted, "push", "hub", "me/chat").stderr
    (promoted / "models/champion.json").write_text('{"version": null}')
    assert "there is no champion to push" in type_command(promoted, "push", "hub", "me/chat").stderr
