"""An adapter and its base in; merged weights and a bundle for Ollama out, with the proof that both say the same.

The bundle is read back from disk for the proof: what is proven is what is deployed.
"""

import hashlib
import json
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import cores
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json, read_object, unlinked, write_json
from fine_tuning.common.settings import Settings
from fine_tuning.model_management.packaging.chat_template import (
    conversation_bank,
    derive_template,
    jinja_renderer,
    prove_template,
    turn_openers,
)
from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.gguf_writer import (
    PROBES,
    NotCovered,
    architecture_of,
    rope_parameters,
    write_adapter_gguf,
    write_gguf,
)
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.runtime.llama_quantiser import K_QUANTS, write_k_quant
from fine_tuning.schema.chat_format import ChatSettings, end_of_turn_ids, load_tokenizer, render
from fine_tuning.schema.prepared import PreparedRow, read_rows

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

Quantisation = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]

BASE_KIND: Quantisation = "Q8_0"
BASE_GGUF = f"base-{BASE_KIND}.gguf"  # what the base stage writes beside the base, and adapter.gguf is applied to
# Next tokens whose probabilities are compared one by one; the others count as one. Merging outcomes can only lower
# a divergence (Cover and Thomas, Elements of Information Theory, section 2.8), and these hold nearly all of the mass.
COMPARED_TOKENS = 200


class OllamaParameters(Settings):
    """PARAMETER lines of the Modelfile, by Ollama's names: all sampling options, because its defaults differ between
    versions. The stops are derived, not set."""

    num_ctx: int = Field(ge=16)
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)
    min_p: float = Field(ge=0, le=1)
    repeat_penalty: float = Field(gt=0)
    repeat_last_n: int = Field(ge=-1)
    presence_penalty: float = Field(ge=-2, le=2)
    frequency_penalty: float = Field(ge=-2, le=2)


class ParitySettings(Settings):
    """How much is compared, and what may differ."""

    conversations: int = Field(ge=1)
    positions: int = Field(ge=1)
    max_merge_difference: float = Field(gt=0)
    max_kl: dict[Quantisation, float]
    min_top1: dict[Quantisation, float]
    max_perplexity_increase: float = Field(ge=0)


class PackageSettings(Settings):
    merged_dtype: Literal["float32", "float16", "bfloat16"]
    quantisation: Quantisation | Literal["auto"]
    llama_quantize: str | None
    adapter_gguf: bool
    parameters: OllamaParameters
    parity: ParitySettings
    threads: int | None = Field(ge=1)


# ------------------------------------------------------------------------------------------------------- merge


def merge_adapter(base_dir: Path, adapter_dir: Path, merged_dir: Path, dtype: str = "float16") -> None:
    """Add the adapter to the base's weights in float32 and save the sum as `dtype`; the same bytes every time.

    float16 keeps three bits more than bfloat16 and takes half of float32; whether rounding to it costs anything is
    measured by `prove_merge`. Raises UserError if the adapter does not fit the base, or a weight has no place in
    `dtype`.
    """
    import torch

    model = _load_adapted(base_dir, adapter_dir).merge_and_unload()
    limit = torch.finfo(getattr(torch, dtype)).max
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()) or float(weight.abs().max()) > limit:
            raise UserError(f"weight {name} is not finite in {dtype}: set package.merged_dtype to float32 or retrain")
    if merged_dir.exists():
        shutil.rmtree(merged_dir)
    merged_dir.mkdir(parents=True)
    model.to(getattr(torch, dtype)).save_pretrained(merged_dir)
    for file in sorted(base_dir.iterdir()):
        if file.name in ("base.json", "chat_template.jinja", "generation_config.json") or file.match("tokenizer*"):
            shutil.copyfile(file, merged_dir / file.name)


def _load_adapted(base_dir: Path, adapter_dir: Path) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (adapter_dir / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter_dir} holds no adapter: train one with `dvc repro train`")
    try:
        return PeftModel.from_pretrained(load_float32(base_dir), str(adapter_dir)).eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"the adapter does not fit the base ({reason}): `dvc repro -f -s train && dvc repro`") from None


def load_float32(folder: Path) -> Any:
    import torch

    return load_model(folder, torch.float32).eval()


# ------------------------------------------------------------------------------------------------------ bundle


def write_package(
    base_dir: Path,
    adapter_dir: Path,
    merged_dir: Path,
    package_dir: Path,
    train: Path,
    settings: PackageSettings,
    chat: ChatSettings,
    converter: str | None = None,
) -> None:
    """Write model.gguf, template.gotmpl, Modelfile and create.json into `package_dir`, and adapter.gguf if it is asked
    for; for `train` and `converter`, see write_weights. Raises UserError if `num_ctx` is shorter than the training
    length, or the architecture, the tokenizer or the chat template cannot be carried over exactly."""
    if settings.parameters.num_ctx < chat.max_length:
        raise UserError(
            f"package.parameters.num_ctx = {settings.parameters.num_ctx} is less than chat.max_length = "
            f"{chat.max_length}: Ollama would drop turns that training saw; raise num_ctx in params.yaml"
        )
    tokenizer = load_tokenizer(merged_dir)
    if "strftime_now" in tokenizer.chat_template:
        raise UserError(
            "the chat template writes today's date, so that training and serving would differ: give base.model a copy "
            "of the folder with a fixed date in its chat_template.jinja"
        )
    unlinked(package_dir)
    write_weights(merged_dir, package_dir / "model.gguf", settings, train, converter)
    if settings.adapter_gguf:
        write_adapter_gguf(base_dir, adapter_dir, package_dir / "adapter.gguf")
    request: dict[str, Any] = {
        "files": {"model.gguf": f"sha256:{sha256_file(package_dir / 'model.gguf')}"},
        "template": derive_template(jinja_renderer(tokenizer, chat.system_prompt)),
        "parameters": {**settings.parameters.model_dump(), "stop": find_stops(tokenizer, chat)},
    }
    if chat.system_prompt:
        request["system"] = chat.system_prompt
    if license_text := read_object(merged_dir / "base.json").get("license"):
        request["license"] = license_text
    write_json(package_dir / "create.json", request)
    (package_dir / "template.gotmpl").write_bytes(request["template"].encode())
    (package_dir / "Modelfile").write_bytes(write_modelfile(request).encode())


def write_weights(
    merged_dir: Path, path: Path, settings: PackageSettings, train: Path, converter: str | None = None
) -> None:
    """Write the merged model as GGUF at `path`; K-quants take their importance matrix of the split `train`. For
    `converter`, see write_gguf."""
    kind = settings.quantisation
    if kind not in K_QUANTS:
        write_gguf(merged_dir, path, kind, converter)
        return
    texts = [row.input_ids for row in read_prepared(train)]
    write_k_quant(merged_dir, path, kind, texts, settings.threads or cores(), settings.llama_quantize, converter)


def find_stops(tokenizer: "PreTrainedTokenizerFast", chat: ChatSettings) -> list[str]:
    """Strings at which a reply ends: the tokens that close it in training, and those that open a turn."""
    closing = [tokenizer.convert_ids_to_tokens(number) for number in end_of_turn_ids(tokenizer)]
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return closing + turn_openers(jinja_renderer(tokenizer, chat.system_prompt), control, closing)


def write_modelfile(request: dict[str, Any]) -> str:
    """The Modelfile that says what the request to /api/create says, for people and `ollama create -f`."""
    lines = ["# Written by the package stage: `ollama create NAME -f Modelfile`", "FROM ./model.gguf"]
    lines.append(f'TEMPLATE """{request["template"]}"""')
    if "system" in request:
        lines.append(_modelfile_text("SYSTEM", request["system"]))
    for name, value in sorted(request["parameters"].items()):
        for single in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} " + (f'"{single}"' if isinstance(single, str) else f"{single}"))
    if "license" in request:
        lines.append(_modelfile_text("LICENSE", request["license"]))
    return "\n".join(lines) + "\n"


def _modelfile_text(command: str, text: str) -> str:
    if '"""' in text or text.endswith('"'):  # there is no escape for it
        return f"# {command} holds quotation marks that a Modelfile cannot: it is in create.json only"
    return f'{command} """{text}"""'


# ------------------------------------------------------------------------------------------------------- proof


def read_prepared(path: Path) -> list[PreparedRow]:
    """The conversations of one split of data/prepared that have something to train on."""
    rows = read_rows(path, ("id", "messages", "input_ids", "labels"))
    return [row for row in rows if any(label >= 0 for label in row.labels)]


def sample_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at equal distances, the same ones every time."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def prove_package(
    base_dir: Path,
    adapter_dir: Path,
    merged_dir: Path,
    package_dir: Path,
    conversations: Sequence[PreparedRow],
    settings: PackageSettings,
    chat: ChatSettings,
) -> dict[str, Any]:
    """Prove that the bundle in `package_dir` is the adapter on its base. Returns what was measured.

    Template: Jinja and Go write the same bytes. Tokens: the GGUF's ids are those that training saw. Stops: what ends a
    reply in training ends it in Ollama. Weights: the merged model predicts as the adapter does, the GGUF as the merged
    model does, within the thresholds. Raises UserError at the first proof that fails.
    """
    if not conversations:
        raise UserError("there is no prepared conversation to prove the package on: run `dvc repro prepare`")
    request = read_json(package_dir / "create.json")
    tokenizer = load_tokenizer(merged_dir)
    sample = sample_evenly(conversations, settings.parity.conversations)
    report: dict[str, Any] = {"quantisation": settings.quantisation}
    report["files"] = prove_files(package_dir, request)
    report["metadata"] = prove_metadata(merged_dir, package_dir / "model.gguf")
    report["template"] = prove_rendering(tokenizer, request, sample, chat)
    report["stops"] = prove_stops(tokenizer, request, conversations)
    passages = reply_passages(sample, settings.parity.positions)
    adapted = log_probabilities(adapter := _load_adapted(base_dir, adapter_dir), passages)
    merged = log_probabilities(load_float32(merged_dir), passages)
    report["merge"] = prove_merge(
        adapted, merged, settings, lambda: _is_rounded_sum(adapter, merged_dir, settings.merged_dtype)
    )
    threads = settings.threads or cores()
    context = max(chat.max_length, 512) + 64
    with LlamaEngine(package_dir / "model.gguf", context=context, threads=threads) as engine:
        report["tokens"] = prove_tokens(tokenizer, engine, sample, chat)
        prove_ends(tokenizer, engine, passages[0], report["stops"]["trained_ends"])
        report["gguf"] = prove_predictions(engine, passages, merged, settings.parity, settings.quantisation)
    if settings.adapter_gguf:
        path = package_dir / "adapter.gguf"
        report["files"]["adapter.gguf"] = sha256_file(path)
        with LlamaEngine(base_dir / BASE_GGUF, context=context, threads=threads, adapters=[path]) as engine:
            report["adapter_gguf"] = prove_predictions(engine, passages, adapted, settings.parity, BASE_KIND)
    return report


def prove_files(package_dir: Path, request: dict[str, Any]) -> dict[str, str]:
    """The GGUF is the one that create.json names, and Modelfile and template say what create.json says."""
    digest = sha256_file(package_dir / "model.gguf")
    if request["files"] != {"model.gguf": f"sha256:{digest}"}:
        raise _unproven("create.json names another model.gguf than the one beside it")
    if (package_dir / "template.gotmpl").read_bytes().decode() != request["template"]:
        raise _unproven("template.gotmpl and create.json differ")
    if (package_dir / "Modelfile").read_bytes().decode() != write_modelfile(request):
        raise _unproven("Modelfile and create.json differ")
    return {"model.gguf": digest, "template.gotmpl": sha256_file(package_dir / "template.gotmpl")}


def prove_metadata(merged_dir: Path, gguf_path: Path) -> dict[str, Any]:
    """The GGUF's description is that of the merged folder."""
    from gguf import GGUFReader

    config = json.loads((merged_dir / "config.json").read_bytes())
    template = (merged_dir / "chat_template.jinja").read_bytes().decode()
    pinned = read_object(merged_dir / "base.json").get("chat_template_sha256")
    template_sha256 = hashlib.sha256(template.encode()).hexdigest()
    if pinned not in (None, template_sha256):
        raise _unproven("the chat template is not the base's", "`dvc repro -f -s base && dvc repro`")
    reader = GGUFReader(gguf_path)
    try:
        name = architecture_of(config).name
    except NotCovered:  # written by llama.cpp's converter, which names it
        name = _text_field(reader, "general.architecture")
    expected = {
        "general.architecture": name,
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.rope.freq_base": rope_parameters(config)["rope_theta"],
        "tokenizer.chat_template": template,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    for key, value in expected.items():
        field = reader.get_field(key)
        # llama.cpp's converter leaves a BOS or EOS unsaid that is not added; `prove_tokens` sees what really happens.
        found = field.contents() if field else (False if value is False else None)
        if found != value and not (isinstance(value, float) and found and abs(found / value - 1) < 1e-6):
            shown = "" if key == "tokenizer.chat_template" else f": {found!r} instead of {value!r}"
            raise _unproven(f"the GGUF's {key} is not the merged model's{shown}")
    return {
        "architecture": name,
        "pre_tokenizer": _text_field(reader, "tokenizer.ggml.pre"),
        "jinja_sha256": template_sha256,
        "tensors": len(reader.tensors),
    }


def _text_field(reader: "GGUFReader", name: str) -> str:
    field = reader.get_field(name)
    if field is None:
        raise _unproven(f"the GGUF has no {name}")
    return str(field.contents())


def prove_rendering(
    tokenizer: "PreTrainedTokenizerFast", request: dict[str, Any], sample: Sequence[PreparedRow], chat: ChatSettings
) -> dict[str, int]:
    """The Go template writes what the Jinja template writes, on the bank and on prompts out of the real data. Where Go
    cannot say how the Jinja template writes results of tools, prompts that hold some are counted, not proven."""
    renderer = jinja_renderer(tokenizer, chat.system_prompt)

    def serve(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        # The server puts the Modelfile's SYSTEM in front of conversations that bring none.
        system = request.get("system")
        own = bool(messages) and messages[0]["role"] == "system"
        return [*([] if own or not system else [{"role": "system", "content": system}]), *messages]

    bank = prove_template(request["template"], renderer, map(serve, conversation_bank()))
    bank += prove_template(request["template"], renderer, conversation_bank())
    real = left_out = 0
    for prompt in map(serve, map(_prompt, sample)):
        try:
            real += prove_template(request["template"], renderer, [prompt], private=True)
        except UserError:
            if all(message["role"] != "tool" for message in prompt):
                raise
            left_out += 1
    return {"bank": bank, "real_prompts": real, "left_out_for_tools": left_out}


def _prompt(row: PreparedRow) -> list[dict[str, Any]]:
    last = max(number for number, message in enumerate(row.messages) if message["role"] == "assistant")
    return [{"role": message["role"], "content": message["content"]} for message in row.messages[:last]]


def prove_stops(
    tokenizer: "PreTrainedTokenizerFast", request: dict[str, Any], conversations: Sequence[PreparedRow]
) -> dict[str, Any]:
    """Every token that ends a reply in the labels stops Ollama, and such tokens are in the labels."""
    closing = set(end_of_turn_ids(tokenizer))
    trained = {label for row in conversations for label in row.labels} & closing
    if not trained:
        raise _unproven("no label ends a reply, so the model never learned to stop")
    stops = request["parameters"].get("stop") or []
    for number in sorted(trained):
        token = tokenizer.convert_ids_to_tokens(number)
        if token not in stops:
            raise _unproven(f"the token {token} ends replies in training and is not a stop in the Modelfile")
    return {"stop": stops, "trained_ends": sorted(trained)}


def prove_ends(
    tokenizer: "PreTrainedTokenizerFast", engine: LlamaEngine, passage: "Passage", ends: Sequence[int]
) -> None:
    """What ends a reply in training ends it in the GGUF as well, where no Modelfile names the stops."""
    for number in ends:
        if not engine.ends_at(passage.ids[: passage.start], number):
            token = tokenizer.convert_ids_to_tokens(number)
            raise _unproven(
                f"the token {token} ends replies in training and none in llama.cpp",
                "add its number to eos_token_id in the generation_config.json of a folder as base.model",
            )


def prove_tokens(
    tokenizer: "PreTrainedTokenizerFast", engine: LlamaEngine, sample: Sequence[PreparedRow], chat: ChatSettings
) -> dict[str, int]:
    """llama.cpp gives the rendered text the ids that training saw, and odd strings the ids of the tokenizer."""
    backend = tokenizer.backend_tokenizer
    exact = 0
    for row in sample:
        text = render(tokenizer, row.messages, chat.system_prompt).text
        expected = backend.encode(text, add_special_tokens=False).ids
        # As Ollama asks: control tokens are read, and the model's own BOS is added if it says so.
        if engine.tokenize(text, parse_special=True, add_special=True) != expected:
            raise _unproven(f"the GGUF's token ids for conversation {row.id} are not the tokenizer's")
        exact += row.input_ids == expected[: len(row.input_ids)]
    # Conversations in which somebody typed a control token are trained as plain text, on purpose.
    if exact < len(sample) / 2:
        remedy = "`dvc repro -f -s prepare && dvc repro`"
        raise _unproven("the prepared token ids are not those of the rendered text", remedy)
    odd = adversarial_strings(tokenizer)
    for text in odd:
        expected = backend.encode(text, add_special_tokens=False).ids
        if engine.tokenize(text, parse_special=True, add_special=True) != expected:
            raise _unproven(f"the GGUF's token ids for {text[:40]!r} are not the tokenizer's")
    return {"conversations": len(sample), "as_prepared": exact, "odd_strings": len(odd)}


def adversarial_strings(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Strings on which tokenizers differ: digits, white space, scripts, control tokens typed, joined and torn."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:6]
    strings = [*PROBES, "x" * 200, "\n" * 20, " " * 33, "9" * 40, "a\u0301e\u0308 A\u030a", "\u200b\ufeff\u2060"]
    for token in control:
        strings += [token, f" {token} ", f"a{token}b", token[:-1], f"{token}\n{token}", f"<{token}>1 2"]
    # Qwen's tokenizer composes accents first and llama.cpp's does not; the cleaned data is composed already.
    normalizer = tokenizer.backend_tokenizer.normalizer
    composes = normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"
    return [unicodedata.normalize("NFC", text) if composes else text for text in strings]


@dataclass(frozen=True)
class Passage:
    """The beginning of a reply, `ids[start:]`, after everything before it."""

    ids: list[int]
    start: int


def reply_passages(sample: Sequence[PreparedRow], positions: int) -> list[Passage]:
    """Beginnings of last replies, spread over the sample, with about `positions` tokens in all."""
    each = max(8, -(-positions // len(sample)))
    passages = []
    for row in sample_evenly(sample, max(1, positions // each)):
        end = max(at for at, label in enumerate(row.labels) if label >= 0) + 1
        start = end
        while start > 1 and row.labels[start - 1] >= 0:
            start -= 1
        passages.append(Passage(list(row.input_ids[: min(end, start + each)]), start))
    return passages


def log_probabilities(model: Any, passages: Sequence[Passage]) -> "np.ndarray":
    """Natural-log probabilities at every token of the passages, float32, shape (tokens, vocabulary)."""
    import numpy as np
    import torch

    result = []
    with torch.no_grad():
        for passage in passages:
            logits = model(torch.tensor([passage.ids[:-1]])).logits[0, passage.start - 1 :].float()
            result.append(torch.log_softmax(logits, -1).numpy())
    return np.concatenate(result)


def _is_rounded_sum(adapter: Any, merged_dir: Path, dtype: str) -> bool:
    """Whether the merged weights are, bit by bit, the sum of base and adapter rounded to `dtype`."""
    import torch

    exact, saved = adapter.merge_and_unload().state_dict(), load_float32(merged_dir).state_dict()
    rounded = {name: weight.to(getattr(torch, dtype)) for name, weight in exact.items()}
    return rounded.keys() == saved.keys() and all(
        torch.equal(weight, saved[name].to(weight.dtype)) for name, weight in rounded.items()
    )


def prove_merge(
    adapted: "np.ndarray", merged: "np.ndarray", settings: PackageSettings, is_rounded_sum: Callable[[], bool]
) -> dict[str, float]:
    """The merged weights predict what the adapter on its base predicts."""
    import numpy as np

    parity = settings.parity
    # Where a token is next to impossible, a difference of logarithms says nothing.
    likely = adapted > np.log(1e-6)
    difference = float(np.abs(adapted - merged)[likely].max())
    kl = float((np.exp(adapted) * (adapted - merged)).sum(-1).mean())
    if not difference <= parity.max_merge_difference:
        if is_rounded_sum():
            raise UserError(
                f"{settings.merged_dtype} cannot hold what the adapter learned: rounding the merged weights changes "
                f"log-probabilities by {difference:.2g}, more than package.parity.max_merge_difference = "
                f"{parity.max_merge_difference:g}: set package.merged_dtype to float32, or train longer"
            )
        raise _unproven(
            f"merged weights and adapter differ by {difference:.2g} in log-probability, "
            f"more than package.parity.max_merge_difference = {parity.max_merge_difference:g}",
            "set package.merged_dtype to float32 or raise the threshold",
        )
    return {"max_log_probability_difference": difference, "mean_kl": max(kl, 0.0)}


def prove_predictions(
    engine: LlamaEngine, passages: Sequence[Passage], reference: "np.ndarray", parity: ParitySettings, kind: str
) -> dict[str, float]:
    """llama.cpp predicts what the torch model predicts whose log-probabilities `reference` holds, as far as weights of
    `kind` can."""
    found = measure_predictions(engine, passages, reference)
    max_kl, min_top1 = _threshold(parity.max_kl, kind), _threshold(parity.min_top1, kind)
    if not found["mean_kl"] <= max_kl:
        raise _unproven(
            f"mean KL of {engine.files} and what was trained is {found['mean_kl']:.2g}, more than "
            f"package.parity.max_kl.{kind} = {max_kl:g}",
            "choose a quantisation with more bits or raise the threshold",
        )
    if not found["top1"] >= min_top1:
        raise _unproven(
            f"{engine.files} and what was trained agree on {found['top1']:.0%} of the next tokens, "
            f"fewer than package.parity.min_top1.{kind} = {min_top1:g}",
            "choose a quantisation with more bits or lower the threshold",
        )
    return found


def measure_predictions(engine: LlamaEngine, passages: Sequence[Passage], reference: "np.ndarray") -> dict[str, float]:
    """Divergence (nats) and agreement of llama.cpp's next tokens and those of `reference`, over the passages."""
    import numpy as np

    wanted = min(COMPARED_TOKENS, reference.shape[-1])
    answers = []
    for passage in passages:
        answers += engine.forced_logprobs(passage.ids[: passage.start], passage.ids[passage.start :], wanted)
    divergences, agreeing = [], 0
    for answer, row in zip(answers, reference, strict=True):
        numbers = np.array([number for number, _ in answer])
        found = np.array([value for _, value in answer], dtype=np.float64)
        expected = row[numbers].astype(np.float64)
        rest = [max(1.0 - float(np.exp(values).sum()), 1e-8) for values in (expected, found)]
        divergence = float((np.exp(expected) * (expected - found)).sum()) + rest[0] * float(np.log(rest[0] / rest[1]))
        divergences.append(max(divergence, 0.0))
        agreeing += int(numbers[found.argmax()]) == int(row.argmax())
    top1 = agreeing / len(answers)
    return {
        "mean_kl": float(np.mean(divergences)), "max_kl": max(divergences), "top1": top1, "positions": len(answers),
    }  # fmt: skip


def _threshold(thresholds: dict[Any, float], kind: str) -> float:
    if kind not in thresholds:
        raise UserError(f"package.parity gives no threshold for {kind}: add one in params.yaml")
    return thresholds[kind]


def _unproven(cause: str, remedy: str = "`dvc repro -f -s package && dvc repro`") -> UserError:
    return UserError(f"the package is not what was trained: {cause}: {remedy}")
