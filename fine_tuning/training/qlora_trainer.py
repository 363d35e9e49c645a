"""QLoRA: the same training on a base whose weights are held in four bits (Dettmers et al. 2023).

The adapter learns against the quantised weights and is merged into the 16-bit base they came from; evaluation scores
that merged model, so that what the detour costs shows in the verdict.
"""

from pathlib import Path
from typing import Any

from fine_tuning.errors import UserError
from fine_tuning.training.base_model import load_model
from fine_tuning.training.training_utils import Hardware


def check_quantisation() -> None:
    """Raises UserError unless bitsandbytes can be imported; called before anything is loaded."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"train.method = qlora needs bitsandbytes, which does not load here ({type(error).__name__}): "
            "run `make install`, or set train.method to lora"
        ) from None


def load_quantised_base(folder: Path, hardware: Hardware, gradient_checkpointing: bool) -> Any:
    """Load a Hugging Face folder with its linear layers in NF4 with double quantisation.

    The products are computed in the hardware's own number format: emulated bfloat16 is disastrous on a CPU.

    Raises:
        UserError: the hardware is refused by bitsandbytes.
    """
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, hardware.precision)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    try:
        model = load_model(folder, compute, quantization_config=quantisation, device_map={"": hardware.device})
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"bitsandbytes refuses this hardware ({reason}): set train.method to lora") from None
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
