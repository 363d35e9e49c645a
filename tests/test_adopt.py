"""An adapter that was trained elsewhere goes the way of any candidate, and says what it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.runtime.base_model import load_model
from fine_tuning.training.adopted import read_adapter

CARD = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
MIRROR = "unsloth/smollm2-135m-instruct-unsloth-bnb-4bit"


def foreign_adapter(base: Path, folder: Path, named: str = MIRROR) -> Path:
    """An adapter as another program's peft leaves it, in bfloat16 and of a shape that no parameter here has."""
    torch.manual_seed(7)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base, torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.peft_config["default"].base_model_name_or_path = named
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tiny_base, tmp_path_factory):
    return foreign_adapter(tiny_base, tmp_path_factory.mktemp("foreign") / "adapter")


def test_a_mirror_of_the_base_is_the_base(foreign, tiny_base):
    assert read_adapter(foreign, tiny_base, CARD, same_base=False)["r"] == 3


def change_config(folder: Path, **changes) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(weights)).items()}, weights)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


MISMATCHES = {
    "was trained on elsewhere/other and base.model is": lambda f: change_config(
        f, base_model_name_or_path="elsewhere/other"
    ),
    "does not fit the base's [64, 128] at rank 8: adopt it": lambda f: change_config(f, r=8),
    "is a IA3 adapter": lambda f: change_config(f, peft_type="IA3"),
    "which this base lacks": lambda f: change_tensors(
        f, lambda t: {n.replace("layers.1", "layers.9"): v for n, v in t.items()}
    ),
    "does not fit the base's": lambda f: change_tensors(
        f, lambda t: {n: v[:, :2] if "lora_A" in n else v for n, v in t.items()}
    ),
    "holds a pickle, which can run code": pickled,
    "has no adapter_model.safetensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "adapter_model.safetensors is damaged": lambda f: (f / "adapter_model.safetensors").write_bytes(b"{}"),
    "has no adapter_config.json": lambda f: (f / "adapter_config.json").unlink(),
    "adapter_config.json is damaged: copy it again": lambda f: (f / "adapter_config.json").write_text("[1"),
}


@pytest.mark.parametrize("words", MISMATCHES)
def test_a_mismatch_is_one_line(foreign, tiny_base, tmp_path, words):
    folder = shutil.copytree(foreign, tmp_path / "adapter")
    MISMATCHES[words](folder)
    with pytest.raises(UserError) as told:
        read_adapter(folder, tiny_base, CARD, same_base=False)
    assert words in str(told.value) and "\n" not in str(told.value)


@pytest.mark.end_to_end
def test_an_adopted_adapter_is_packaged_compared_promoted_and_traced(trained_project, tmp_path):
    project = trained_project.copy(tmp_path / "project")
    whetstone = ("python", "-m", "fine_tuning")
    base = project.folder / "models/base"
    folder = foreign_adapter(base, tmp_path / "from-unsloth", "elsewhere/other")
    assert "--same-base" in project.run(*whetstone, "adopt", str(folder), check=False)
    project.run("git", "diff", "--exit-code", "--", "params.yaml")
    project.run(*whetstone, "adopt", str(folder), "--same-base", "--origin", "Unsloth on the desk")
    project.run("dvc", "repro")
    weights, adopted = "adapter_model.safetensors", sha256_file(folder / "adapter_model.safetensors")
    assert sha256_file(project.folder / "models/adapter" / weights) == adopted
    measured = json.loads((project.folder / "metrics/train.json").read_text())
    assert measured["steps"] == 0 and "train_loss" not in measured
    assert measured["validation_loss"] == measured["validation_loss_before"]
    assert "Trained elsewhere (Unsloth on the desk)" in (project.folder / "models/adapter/README.md").read_text()
    project.run(*whetstone, "promote", "--force", "tried")
    traced = json.loads(project.run(*whetstone, "lineage", "champion", "--json"))["versions"][0]
    assert traced["adopted_from"] == "Unsloth on the desk" and traced["adapter_sha256"] == adopted
    assert traced["conversations"]["train"] == [] and traced["conversations"]["test"]
    shown = project.run(*whetstone, "lineage", "champion")
    assert "adopted from  Unsloth on the desk" in shown and "learning_rate" not in shown
