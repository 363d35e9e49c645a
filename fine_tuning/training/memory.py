"""How much memory a run needs, and how much there is."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.base_model import is_hub_id, locate_base, tensor_shapes
from fine_tuning.runtime.hardware import Hardware, local_process_count, process_count
from fine_tuning.training.settings import TrainSettings

PROGRAM = 0.5e9  # bytes that the program itself takes


@dataclass(frozen=True)
class Shape:
    """What the memory that a model needs depends on."""

    parameters: int
    embedding: int  # of them, in the input and the output embedding
    layers: int
    hidden: int
    vocabulary: int


def read_shape(folder: Path) -> Shape:
    """Sizes of a folder's model, from its configuration and the headers of its weights: nothing is loaded. Raises
    UserError if the folder holds no model."""
    from safetensors import SafetensorError

    try:
        return _shape(_config(folder), _count_safetensors(folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not load ({type(error).__name__}): make it again with `dvc repro`") from None


def probe(model: str, revision: str | None) -> tuple[Shape, dict[str, Any]]:
    """Sizes and configuration of a base model, named as for `locate_base`; of a hub's, without downloading its weights.
    Raises UserError if it is not there, or its files do not say its sizes."""
    try:
        if is_hub_id(model):
            from huggingface_hub import get_safetensors_metadata, hf_hub_download
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()  # its retries are not the person's
            config = _config(Path(hf_hub_download(model, "config.json", revision=revision)).parent)
            counts = get_safetensors_metadata(model, revision=revision).parameter_count
            return _shape(config, sum(counts.values())), config.to_dict()
        source = locate_base(model, revision)
        config = _config(source.folder, gguf_file=source.gguf_file)
        if source.gguf is None:
            return _shape(config, _count_safetensors(source.folder)), config.to_dict()
        from gguf import GGUFReader
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
        tensors = GGUFReader(source.gguf).tensors
        config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in tensors)
        return _shape(config, sum(int(tensor.n_elements) for tensor in tensors)), config.to_dict()
    except UserError:
        raise
    except Exception as error:  # of foreign files and of a network
        mend = "check the name and the network" if is_hub_id(model) else "copy or download it again"
        raise UserError(f"{model}: its sizes cannot be read ({type(error).__name__}): {mend}") from None


def _config(folder: Path, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def _count_safetensors(folder: Path) -> int:
    return sum(map(math.prod, tensor_shapes(folder.glob("*.safetensors")).values()))


def _shape(config: Any, parameters: int) -> Shape:
    text = config.get_text_config()
    tables = 1 if text.tie_word_embeddings else 2
    return Shape(
        parameters=parameters,
        embedding=tables * text.vocab_size * text.hidden_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
    )


def memory_needed(shape: Shape, settings: TrainSettings, hardware: Hardware) -> tuple[float, float]:
    """Bytes that a process's weights take, and its activations: an estimate, meant to be right within a factor of two.

    Weights at their width (in four bits all but the embeddings, which stay whole), the activations that backpropagation
    keeps (34 values of the hidden size a token and layer: Korthikanti et al. 2022, "Reducing Activation Recomputation",
    section 4.1, without the attention matrix, which is recomputed) and a batch's logits.
    """
    width = 2 if hardware.precision == "bfloat16" else 4
    weights = shape.parameters * width
    if settings.method == "qlora":
        weights = 0.6 * (shape.parameters - shape.embedding) + 4 * shape.embedding
    elif settings.launch == "fsdp":
        weights /= process_count()
    kept = 2 if settings.gradient_checkpointing else 34
    values = kept * shape.layers * shape.hidden + shape.vocabulary
    return weights, settings.batch_tokens * values * (4 if hardware.precision == "float32" else 2)


def check_memory(shape: Shape, settings: TrainSettings, hardware: Hardware) -> None:
    """Refuse to start what does not fit. Raises UserError if the estimate exceeds the free memory; says what to
    change."""
    needed = sum(memory_needed(shape, settings, hardware)) + PROGRAM
    if hardware.device == "cpu":
        needed *= local_process_count()
    free = free_memory(hardware.device)
    if needed > free:
        raise UserError(
            f"training needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {_smaller(settings)}"
        )


def _smaller(settings: TrainSettings) -> str:
    ways = ["lower train.batch_tokens"]
    if not settings.gradient_checkpointing:
        ways.append("set train.gradient_checkpointing to true")
    if settings.method == "lora":
        ways.append("set train.method to qlora")
    return f"{', '.join(ways)}, or choose a smaller base.model"


def free_memory(device: str) -> int:
    """Bytes free for this process on `device`."""
    import psutil
    import torch

    if device in ("cuda", "xpu"):
        return torch.accelerator.get_memory_info()[0]
    free, group = psutil.virtual_memory().available, group_memory()
    if device == "mps":  # a share of the machine's memory
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return free if group is None else min(free, group)


def group_memory(top: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the limits of a container or of a job of Slurm leave (cgroup v2), or None where there is no limit.

    Cached files count as used there, but are evicted when memory is needed.
    """
    try:
        inner = next(line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    left = []
    group = top / inner.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(top):
            break
        try:
            limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            left.append(int(limit) - used + int(cached.get("inactive_file", 0)))
    return min(left, default=None)
