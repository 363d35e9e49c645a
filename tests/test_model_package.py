"""The package stage: what it makes, and that every planted fault fails its proof."""

import hashlib
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, write_json
from fine_tuning.model_management.packaging import model_package
from fine_tuning.runtime import gguf_writer, llama_quantiser, llama_quantize
from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.gguf_writer import write_gguf
from fine_tuning.schema.chat_format import encode_conversation, load_tokenizer
from fine_tuning.schema.prepared import encoded_row
from stages import package as stage
from tests.evaluation_suite import write_rows

ROOT = Path(__file__).parents[1]
CONVERSATIONS = [
    [("user", "What is machine learning?"), ("assistant", "I do not know, but I can find out for you.")],
    [("user", "How do I reset my password?"), ("assistant", "1. First\n2. Second  2024-01-31\n")],
    [("user", "Hello!"), ("assistant", "How can I help?"), ("user", "naïve 日本 🙂"), ("assistant", "Try again.")],
    [("system", "Be kind."), ("user", "Is the cable plugged in?"), ("assistant", "Please check.")],
    [("user", "Ω"), ("assistant", "é")],
    [("user", "Weather?"), ("assistant", "get_weather()"), ("tool", '{"sun": true}'), ("assistant", "Sunny.")],
]


def write_vivid_base(source: Path, folder: Path) -> None:
    """The tiny base with weights so large that every part of it shows in its predictions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(source, folder)
    config = LlamaConfig.from_pretrained(source)
    config.initializer_range = 0.2
    config.rope_parameters = {"rope_theta": 5000.0, "rope_type": "default"}
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)


def write_prepared(base: Path, folder: Path, system_prompt: str | None = None) -> None:
    tokenizer = load_tokenizer(base)
    talks = [[{"role": role, "content": content} for role, content in talk] for talk in CONVERSATIONS]
    encoded = [encode_conversation(tokenizer, messages, system_prompt, 512) for messages in talks]
    write_rows(folder, [encoded_row(one, id=f"c{number}") for number, one in enumerate(encoded)])


def change_params(path: Path, section: str, **values) -> None:
    document = yaml.safe_load(path.read_text())
    document[section] |= values
    path.write_text(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def inputs(tiny_base, tmp_path_factory):
    """A checkout in which base, adapter and conversations are there and the package is not."""
    folder = tmp_path_factory.mktemp("inputs")
    write_vivid_base(tiny_base, folder / "models/base")
    write_adapter(folder / "models/base", folder / "models/adapter")
    write_prepared(folder / "models/base", folder / "data/prepared/validation")
    shutil.copy(ROOT / "params.yaml", folder)
    change_params(folder / "params.yaml", "package", quantisation="F16")
    return folder


@pytest.fixture
def checkout(inputs, tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """The same checkout after the stage."""
    folder = tmp_path_factory.mktemp("made") / "checkout"
    shutil.copytree(inputs, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage.main()
    return folder


def test_the_stage_writes_the_bundle_its_proof_and_its_metrics(made):
    package = made / "models/package"
    assert {file.name for file in package.iterdir()} == {
        "model.gguf",
        "Modelfile",
        "create.json",
        "template.gotmpl",
        "parity.json",
    }
    metrics = read_json(made / "metrics/package.json")
    assert metrics["gguf_top1"] > 0.9 and metrics["gguf_mean_kl"] < 2e-3
    assert metrics["template_conversations"] > 250 and metrics["gguf_bytes"] == (package / "model.gguf").stat().st_size
    report = read_json(package / "parity.json")
    assert report["stops"]["stop"] == ["<|im_end|>", "<|im_start|>"]
    assert report["tokens"]["as_prepared"] == len(CONVERSATIONS)
    assert report["template"]["real_prompts"] == len(CONVERSATIONS) and not report["template"]["left_out_for_tools"]


@pytest.fixture(scope="module")
def wide(inputs, tmp_path_factory):
    """The same checkout with a base that is wide enough for K-quants, and a training split."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "checkout"
    shutil.copytree(inputs, folder)
    config = LlamaConfig.from_pretrained(folder / "models/base")
    config.hidden_size, config.intermediate_size, config.head_dim, config.initializer_range = 256, 320, 64, 0.06
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder / "models/base")
    shutil.rmtree(folder / "models/adapter")
    write_adapter(folder / "models/base", folder / "models/adapter")
    shutil.copytree(folder / "data/prepared/validation", folder / "data/prepared/train")
    parity = yaml.safe_load((folder / "params.yaml").read_text())["package"]["parity"]
    parity["min_top1"]["Q4_K_M"] = 0.4  # a random model is sure of nothing
    change_params(folder / "params.yaml", "package", merged_dtype="float32", parity=parity)
    return folder


@pytest.fixture
def wide_checkout(wide, tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    shutil.copytree(wide, folder)
    monkeypatch.chdir(folder)
    return folder


def test_k_quants_are_llama_cpps_and_rows_that_they_do_not_fit_get_the_next_larger_kind(wide_checkout):
    change_params(wide_checkout / "params.yaml", "package", quantisation="Q4_K_M")
    stage.main()
    path = wide_checkout / "models/package/model.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K" and kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_down.weight"] in ("Q5_0", "Q8_0")  # its rows have 320 weights
    first = path.read_bytes()
    stage.main()
    assert path.read_bytes() == first


def test_the_users_own_quantiser_gets_an_importance_matrix_of_training_conversations(wide_checkout):
    """As llama-quantize takes it: the sums of squares of what enters each layer, and of how many tokens."""
    model, kept = wide_checkout / "models/base", {}
    program = wide_checkout / "quantise.sh"
    program.write_text(f'#!/bin/sh\n[ "$1" = --imatrix ] && cp "$2" kept.gguf && shift 2 && exec {sys.executable} -P '
                       f'{llama_quantize.__file__} "$@"\n')  # fmt: skip
    text = load_tokenizer(model)("The quick brown fox jumps over the lazy dog.")["input_ids"]
    made = wide_checkout / "made.gguf"
    llama_quantiser.write_k_quant(model, made, "Q4_K_M", [text], threads=1, command=f"sh {program}")
    assert gguf.GGUFReader(made).get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(wide_checkout / "kept.gguf").tensors}
    base = load_model(model, torch.float32)
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: kept.update(inputs=given[0]))
    base(torch.tensor([text]))
    expected = kept["inputs"][0].detach().square().sum(0)
    assert np.allclose(found["blk.1.ffn_down.weight.in_sum2"].ravel(), expected, rtol=1e-4)
    assert found["blk.1.ffn_down.weight.counts"].item() == len(text)


@pytest.mark.end_to_end
def test_auto_takes_the_smallest_within_the_bounds_and_lists_what_each_costs(wide_checkout, capsys):
    change_params(wide_checkout / "params.yaml", "package", quantisation="auto")
    loose = yaml.safe_load((wide_checkout / "params.yaml").read_text())["package"]["parity"]
    loose |= {"max_perplexity_increase": 9.0, "max_kl": dict.fromkeys(loose["max_kl"], 9.0)}
    loose["min_top1"] = dict.fromkeys(loose["min_top1"], 0.0)
    change_params(wide_checkout / "params.yaml", "package", parity=loose)
    stage.main()
    assert read_json(wide_checkout / "models/package/parity.json")["quantisation"] == "Q4_K_M"
    found = read_json(wide_checkout / "metrics/package.json")["quantisations"]
    sizes = [found[kind]["bytes"] for kind in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")]
    assert sizes == sorted(sizes) and found["Q8_0"]["mean_kl"] < found["Q4_K_M"]["mean_kl"]
    assert all(row["tokens_per_second"] > 0 for row in found.values()) and "package: Q6_K" in capsys.readouterr().out
    change_params(
        wide_checkout / "params.yaml", "package", parity=loose | {"max_kl": loose["max_kl"] | {"Q4_K_M": 0.0}}
    )
    stage.main()
    assert read_json(wide_checkout / "models/package/parity.json")["quantisation"] == "Q5_K_M"
    change_params(wide_checkout / "params.yaml", "package", parity=loose | {"max_kl": {"Q8_0": 0.0}})
    with pytest.raises(UserError, match="none of Q4_K_M, Q5_K_M, Q6_K, Q8_0 stays within the bounds"):
        stage.main()


def test_a_quantiser_that_is_missing_or_fails_is_one_clear_line(wide_checkout, monkeypatch):
    missing = wide_checkout / "missing"
    missing.mkdir()
    (missing / "cyllama.py").write_text("""raise ModuleNotFoundError("No module named 'cyllama'")""")
    monkeypatch.setenv("PYTHONPATH", str(missing))
    change_params(wide_checkout / "params.yaml", "package", quantisation="Q6_K")
    with pytest.raises(
        UserError, match=r"Q6_K needs llama.cpp's quantiser: run `pip install --no-deps -r requirements-"
    ):
        stage.main()
    for command, reason in (("/no/such/program", "does not start"), ("false", "failed")):
        change_params(wide_checkout / "params.yaml", "package", llama_quantize=command)
        with pytest.raises(UserError, match=reason):
            stage.main()
    assert not list((wide_checkout / "models/package").iterdir())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapters_own_gguf_on_the_bases_is_what_was_trained(checkout, rslora):
    write_gguf(checkout / "models/base", checkout / "models/base/base-Q8_0.gguf", "Q8_0")
    config = checkout / "models/adapter/adapter_config.json"
    write_json(config, read_json(config) | {"use_rslora": rslora})
    change_params(checkout / "params.yaml", "package", adapter_gguf=True, quantisation="Q8_0")
    stage.main()
    report = read_json(checkout / "models/package/parity.json")
    assert report["adapter_gguf"]["mean_kl"] < 2e-2 and report["adapter_gguf"]["top1"] > 0.8
    first = (checkout / "models/package/adapter.gguf").read_bytes()
    assert report["files"]["adapter.gguf"] == hashlib.sha256(first).hexdigest()
    stage.main()
    assert (checkout / "models/package/adapter.gguf").read_bytes() == first


def test_a_wrong_scale_of_the_adapters_gguf_fails_the_stage(checkout, monkeypatch):
    write_gguf(checkout / "models/base", checkout / "models/base/base-Q8_0.gguf", "Q8_0")
    change_params(checkout / "params.yaml", "package", adapter_gguf=True, quantisation="Q8_0")
    real = gguf.GGUFWriter.add_float32

    def halved(self, key, value):
        real(self, key, value / 2 if key == "adapter.lora.alpha" else value)

    monkeypatch.setattr(gguf.GGUFWriter, "add_float32", halved)
    with pytest.raises(UserError, match=r"base-Q8_0.gguf with adapter.gguf"):
        stage.main()


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 8}}, {"modules_to_save": ["norm"]}]
)
def test_an_adapter_of_more_than_lora_pairs_has_no_gguf(checkout, change):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkout / "models/base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **change)).save_pretrained(
        checkout / "models/adapter"
    )
    with pytest.raises(UserError, match=r"set package.adapter_gguf to false"):
        gguf_writer.write_adapter_gguf(
            checkout / "models/base", checkout / "models/adapter", checkout / "models/adapter.gguf"
        )


def test_the_same_inputs_give_the_same_bytes(made, checkout):
    stage.main()
    for name in ("models/merged/model.safetensors", "models/package/model.gguf", "models/package/create.json"):
        assert (checkout / name).read_bytes() == (made / name).read_bytes(), name


def test_the_modelfile_says_what_the_request_to_ollama_says(made):
    request = read_json(made / "models/package/create.json")
    modelfile = (made / "models/package/Modelfile").read_text()
    assert f'TEMPLATE """{request["template"]}"""' in modelfile
    sampling = {"temperature", "top_p", "top_k", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
                "frequency_penalty"}  # fmt: skip
    assert sampling <= request["parameters"].keys()
    # Replies are compared without penalties, which change what is the likeliest token.
    assert [request["parameters"][f"{name}_penalty"] for name in ("repeat", "presence", "frequency")] == [1.0, 0.0, 0.0]
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and "PARAMETER num_ctx 4096" in modelfile
    assert request["parameters"]["num_ctx"] == 4096 and request["files"]["model.gguf"].startswith("sha256:")


def test_a_system_prompt_reaches_template_modelfile_and_request(checkout):
    change_params(checkout / "params.yaml", "chat", system_prompt="Be brief.")
    write_prepared(checkout / "models/base", checkout / "data/prepared/validation", "Be brief.")
    stage.main()
    request = read_json(checkout / "models/package/create.json")
    assert request["system"] == "Be brief." and "Be brief." in request["template"]
    assert 'SYSTEM """Be brief."""' in (checkout / "models/package/Modelfile").read_text()


# ---------------------------------------------------------------------------------------------- planted faults


def lose_a_stop(patch):
    real = model_package.find_stops
    patch.setattr(model_package, "find_stops", lambda *given: [s for s in real(*given) if s != "<|im_end|>"])


def double_the_bos(patch):
    patch.setattr(
        gguf.GGUFWriter, "add_add_bos_token", lambda self, _: self.add_bool("tokenizer.ggml.add_bos_token", True)
    )


def change_a_newline(patch):
    real = model_package.derive_template
    patch.setattr(model_package, "derive_template", lambda renderer: real(renderer).replace("user\n", "user\r\n"))


def change_the_rope_base(patch):
    real = gguf_writer.rope_parameters
    patch.setattr(gguf_writer, "rope_parameters", lambda config: real(config) | {"rope_theta": 50000.0})


def leave_q_unpermuted(patch):
    real = gguf_writer.permute_rotary
    patch.setattr(gguf_writer, "permute_rotary", lambda values, heads: values if heads == 4 else real(values, heads))


def take_another_pre_tokenizer(patch):
    patch.setattr(gguf_writer, "detect_pre_tokenizer", lambda _: "llama-bpe")


def lose_a_control_token(patch):
    real = gguf.GGUFWriter.add_token_types
    patch.setattr(
        gguf.GGUFWriter, "add_token_types", lambda self, types: real(self, [1 if t == 3 else t for t in types])
    )


def shift_a_norm(patch):
    gemma = gguf_writer.Architecture("llama", permute=True, norm_shift=1.0)
    patch.setitem(gguf_writer.ARCHITECTURES, "LlamaForCausalLM", gemma)


def forget_the_adapter(patch):
    real = stage.merge_adapter

    def merge(base, adapter, merged, dtype):
        real(base, adapter, merged, dtype)
        shutil.copy(base / "model.safetensors", merged / "model.safetensors")

    patch.setattr(stage, "merge_adapter", merge)


FAULTS = [
    (lose_a_stop, "ends replies in training and is not a stop"),
    (double_the_bos, "add_bos_token"),
    (change_a_newline, r"Jinja '\\n"),
    (change_the_rope_base, "rope.freq_base"),
    (leave_q_unpermuted, "mean KL"),
    (take_another_pre_tokenizer, "token ids"),
    (lose_a_control_token, "token ids"),
    (shift_a_norm, "mean KL"),
    (forget_the_adapter, "merged weights and adapter differ"),
]


@pytest.mark.parametrize(("fault", "named"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_fails_the_stage(fault, named, checkout, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(UserError, match=named):
        stage.main()
    assert not (checkout / "metrics/package.json").exists()


def test_an_adapter_that_rounding_would_lose_is_told_from_one_that_was_lost(checkout):
    change_params(checkout / "params.yaml", "package", merged_dtype="bfloat16")
    params = yaml.safe_load((checkout / "params.yaml").read_text())
    parity = params["package"]["parity"] | {"max_merge_difference": 1e-6}
    change_params(checkout / "params.yaml", "package", parity=parity)
    with pytest.raises(UserError, match=r"bfloat16 cannot hold what the adapter learned: .*merged_dtype to float32"):
        stage.main()


def test_an_end_of_turn_that_the_gguf_lost_fails_the_stage(checkout, monkeypatch):
    # llama.cpp knows <|im_end|> by its name.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        file = checkout / "models/base" / name
        file.write_text(file.read_text().replace("<|im_end|>", "<|done|>"))
    stage.main()
    real = gguf.GGUFWriter.add_eos_token_id
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda self, _: real(self, 0))
    with pytest.raises(UserError, match=r"<\|done\|> ends replies in training and none in llama\.cpp: .*eos_token_id"):
        stage.main()


def test_a_bundle_that_was_edited_afterwards_is_not_proven(made, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(made / "models/package", package)
    with open(package / "model.gguf", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="names another"):
        model_package.prove_files(package, read_json(package / "create.json"))
    shutil.copytree(made / "models/package", package, dirs_exist_ok=True)
    request = read_json(package / "create.json") | {"template": "{{ .Prompt }}"}
    write_json(package / "create.json", request)
    with pytest.raises(UserError, match=r"template\.gotmpl and create\.json differ"):
        model_package.prove_files(package, request)


def test_a_context_shorter_than_the_training_length_is_refused(checkout):
    change_params(checkout / "params.yaml", "chat", max_length=8192)
    with pytest.raises(UserError, match="num_ctx"):
        stage.main()


def test_a_chat_template_that_writes_todays_date_is_refused(checkout):
    template = checkout / "models/base/chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    with pytest.raises(UserError, match="today's date"):
        stage.main()


def test_prompts_with_results_of_tools_that_go_cannot_say_are_counted_and_cost_nothing(checkout, capsys):
    template = checkout / "models/base/chat_template.jinja"
    numbered = "message['role'] + ('' if message['role'] != 'tool' else loop.index | string)"
    template.write_text(template.read_text().replace("message['role'] +", f"{numbered} +"))
    shutil.rmtree(checkout / "data/prepared")
    write_prepared(checkout / "models/base", checkout / "data/prepared/validation")
    stage.main()
    report = read_json(checkout / "models/package/parity.json")["template"]
    assert (report["real_prompts"], report["left_out_for_tools"]) == (len(CONVERSATIONS) - 1, 1)
    assert "1 prompts with results of tools left out" in capsys.readouterr().out


def test_a_chat_template_that_is_not_the_one_of_the_bases_card_is_refused(checkout):
    write_json(checkout / "models/base/base.json", {"chat_template_sha256": "0" * 64})
    with pytest.raises(UserError, match="the chat template is not the base's"):
        stage.main()


def test_an_adapter_that_is_missing_is_one_clear_line(checkout):
    shutil.rmtree(checkout / "models/adapter")
    with pytest.raises(UserError, match="dvc repro train"):
        stage.main()


def test_quotation_marks_that_no_modelfile_can_hold_stay_in_the_request(made):
    request = read_json(made / "models/package/create.json") | {"system": 'Say """hi"""'}
    modelfile = model_package.write_modelfile(request)
    assert "# SYSTEM" in modelfile and 'Say """hi"""' not in modelfile
