"""QLoRA: the same training on a base whose weights are held in four bits (Dettmers et al. 2023).

The adapter learns against the quantised weights and is merged into the 16-bit base they came from; evaluation scores
that merged model, so that what the detour costs shows in the verdict.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.base_model import load_model
from fine_tuning.runtime.hardware import Hardware
from fine_tuning.training.settings import TrainSettings

EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "lion_8bit": "Lion8bit"}


def check_bitsandbytes(settings: TrainSettings, hardware: Hardware) -> None:
    """Try on a few numbers what the settings ask of bitsandbytes, before anything is loaded. Raises UserError if
    bitsandbytes is missing, or refuses the hardware."""
    if settings.method == "qlora":
        wanted, instead = "train.method = qlora", "train.method to lora"
    elif settings.optimizer in EIGHT_BIT:
        wanted, instead = f"train.optimizer = {settings.optimizer}", "train.optimizer to adamw"
    else:
        return
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{wanted} needs bitsandbytes, which does not load here ({type(error).__name__}): run `make install`, or "
            f"set {instead}"
        ) from None
    try:
        if settings.method == "qlora":
            packed, state = bitsandbytes.functional.quantize_4bit(
                torch.ones(64, 64, device=hardware.device), compress_statistics=True, quant_type="nf4"
            )
            bitsandbytes.functional.dequantize_4bit(packed, state)
        if settings.optimizer in EIGHT_BIT:
            # The state is held in eight bits from this many parameters on.
            parameter = torch.nn.Parameter(torch.ones(4096, device=hardware.device))
            parameter.grad = torch.ones_like(parameter)
            getattr(bitsandbytes.optim, EIGHT_BIT[settings.optimizer])([parameter]).step()
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, AssertionError) as error:
        raise UserError(f"bitsandbytes refuses {hardware.name} ({_reason(error)}): set {instead}") from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_quantised_base(folder: Path, hardware: Hardware, gradient_checkpointing: bool) -> Any:
    """Load a Hugging Face folder with its linear layers in NF4 with double quantisation.

    The products are computed in the hardware's own number format: emulated bfloat16 is disastrous on a CPU. Raises
    UserError if the hardware is refused by bitsandbytes.
    """
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, hardware.precision)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    try:
        model = load_model(folder, compute, quantization_config=quantisation, device_map={"": hardware.device})
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"bitsandbytes refuses {hardware.name} ({_reason(error)}): set train.method to lora") from None
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)


@dataclass(frozen=True)
class WeightsMemory:
    """MB that the frozen base takes in one process, and that it would take there as `train.method: lora` holds it."""

    held_mb: float
    lora_mb: float


def weights_memory(model: Any, hardware: Hardware) -> WeightsMemory:
    """Measure the frozen weights of a model: packed ones with the constants that unpack them, a spread base's share."""
    held = whole = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        state = getattr(parameter, "quant_state", None)
        held += own.numel() * own.element_size() + (_constants_bytes(state) if state else 0)
        whole += state.shape.numel() if state else own.numel()
    return WeightsMemory(held / 1e6, whole * (2 if hardware.precision == "bfloat16" else 4) / 1e6)


def _constants_bytes(state: Any) -> int:
    tensors = [state.absmax, state.code, state.offset]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
