"""Device, number format, threads and processes of this machine."""

import os
from dataclasses import dataclass
from typing import Literal

from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import cores


def is_main_process() -> bool:
    """Whether this is the process that writes files, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_process_count() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Hardware:
    """Where training runs and in which number format."""

    device: Literal["cuda", "xpu", "mps", "cpu"]
    precision: Literal["float32", "bfloat16", "float16"]
    threads: int
    name: str


def detect_hardware(precision: str, threads: int | None) -> Hardware:
    """Choose device and number format; `auto` takes bfloat16 only where the hardware computes in it.

    On a CPU without bf16 units bfloat16 is emulated, 20 to 50 times slower than float32. Raises UserError if float16
    was asked for on a CPU, where training in it overflows.
    """
    import torch

    threads = threads or max(1, cores() // local_process_count())
    if torch.cuda.is_available():
        automatic = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        device, name = "cuda", torch.cuda.get_device_name()
    elif torch.xpu.is_available():
        automatic = "bfloat16" if torch.xpu.is_bf16_supported(including_emulation=False) else "float32"
        device, name = "xpu", torch.xpu.get_device_name()
    elif torch.backends.mps.is_available():
        automatic, device, name = "float32", "mps", "Apple GPU"
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        automatic, device = ("bfloat16" if fast else "float32"), "cpu"
        name = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    if precision == "float16" and device == "cpu":
        raise UserError("train.precision = float16 overflows on a CPU: set it to auto")
    return Hardware(device, automatic if precision == "auto" else precision, threads, name)
