"""Adapters that were trained elsewhere: whether one fits the base, and what is known of its origin."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import copy_file, read_object, write_json
from fine_tuning.runtime.base_model import tensor_shapes

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "origin.json"
# What quantised and mirrored copies of a base put behind its name.
_COPIES = re.compile(r"(-(unsloth|bnb|4bit|8bit|gptq|awq|int4|int8))+$")
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")


def read_adapter(folder: Path, base: Path, card: dict[str, Any], same_base: bool) -> dict[str, Any]:
    """The configuration of a peft adapter that fits the base.

    Args:
        base: folder of the base model.
        card: content of its base.json.
        same_base: take its word for it where the adapter names another base.

    Raises:
        UserError: a file is missing, damaged or a pickle; it is not LoRA, or was made for another base.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: give the folder that peft's save_pretrained wrote")
    if not (config := read_object(folder / CONFIG)):
        raise UserError(f"{folder / CONFIG} is damaged: copy it again")
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("adapter_model.bin"))
        cause = "holds a pickle, which can run code" if pickled else f"has no {WEIGHTS}"
        raise UserError(f"{folder} {cause}: save the adapter as safetensors")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA can be merged into a GGUF")
    named = str(config.get("base_model_name_or_path"))
    if not same_base and named != base.as_posix() and _plain(named) != _plain(card["model"]):
        raise UserError(
            f"{folder} was trained on {named} and base.model is {card['model']}: change base.model, or give "
            "--same-base if it is the same model by another name"
        )
    _check_shapes(folder, base, {config.get("r"), *(config.get("rank_pattern") or {}).values()})
    return config


def _plain(name: str) -> str:
    return _COPIES.sub("", Path(name.removeprefix("package:")).name.lower())


def _check_shapes(folder: Path, base: Path, ranks: set[int | None]) -> None:
    """Compare each pair of matrices with the weight of the base that they are added to, by the files' headers."""
    weights = tensor_shapes(base.glob("*.safetensors"))
    try:
        shapes = tensor_shapes([folder / WEIGHTS])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is damaged ({type(error).__name__}): copy it again") from None
    if not shapes:
        raise UserError(f"{folder / WEIGHTS} holds no tensors: copy it again")
    for name, shape in shapes.items():
        found = _LORA.fullmatch(name)
        weight = weights.get(f"{found[1]}.weight") if found else None
        if found is None or weight is None:
            raise UserError(f"{folder} changes {name}, which this base lacks: adopt it on the base it was trained on")
        if found[2] == "magnitude_vector":
            continue
        *_, rank, width = shape if found[2] == "A" else reversed(shape)
        if len(shape) != 2 or rank not in ranks or width != weight[found[2] == "A"]:
            known = " or ".join(map(str, sorted(filter(None, ranks))))
            raise UserError(
                f"{folder}: {name} has the shape {shape}, which does not fit the base's {weight} at rank {known}: "
                "adopt it on the base it was trained on, with its own adapter_config.json"
            )


def stage_adapter(folder: Path, config: dict[str, Any], origin: str, target: Path) -> str:
    """Copy an adapter to `target` with origin.json, which says where it comes from; the SHA-256 of its weights."""
    for name in (CONFIG, WEIGHTS):
        copy_file(folder / name, target / name)
    sha256 = sha256_file(target / WEIGHTS)
    known = {"origin": origin, "adapter_sha256": sha256, "peft_version": config.get("peft_version")}
    write_json(target / ORIGIN, known | {"trained_on": config.get("base_model_name_or_path")})
    return sha256


def take_adapter(source: Path, output: Path) -> None:
    """Copy an adapter with its origin, as it is."""
    for name in (CONFIG, WEIGHTS, ORIGIN):
        if (source / name).is_file():
            copy_file(source / name, output / name)
