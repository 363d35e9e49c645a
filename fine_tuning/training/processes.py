"""Several processes that train together: what they agree on, and a frozen base that is spread over them.

Each process has the whole adapter and its share of the batches; DistributedDataParallel averages the gradients. With
`train.launch = fsdp` each reads only its share of the base (FSDP2, Zhao et al. 2023) and borrows the others' layer by
layer. The adapter is never spread: it is small, and so it is saved, resumed and measured as in one process.
"""

import os
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.hardware import process_count
from fine_tuning.training.settings import TrainSettings


def agree(urgency: int) -> int:
    """The maximum over all processes: a decision of one alone would leave the others waiting for it."""
    if not distributed.is_initialized():
        return urgency
    shared = torch.tensor(urgency, device=_device())
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)


def of_main_process(value: float) -> float:
    """The main process's value: others may have rounded differently, and would decide differently."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=_device())
    distributed.broadcast(shared, src=0)
    return float(shared)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def take_own_gpu() -> None:
    """Use the GPU with this process's local rank, before anything is loaded."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


# --- the base, spread ------------------------------------------------------------------------------------------------


def check_spreading(settings: TrainSettings) -> None:
    """Raises UserError for what needs whole weights in every process and is asked for with `train.launch = fsdp`."""
    if settings.launch != "fsdp":
        return
    for name, asked in (("method = qlora", settings.method == "qlora"), ("lora.dora = true", settings.lora.dora)):
        if asked:
            raise UserError(f"train.{name} needs the base whole in each process: set train.launch to ddp or single")


def spreading(settings: TrainSettings) -> dict[str, Any]:
    """Options of `load_model` with which each process reads its share of the weights."""
    if settings.launch != "fsdp" or process_count() == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=process_count())}


def keep_adapter_whole(model: Any) -> None:
    """Prepare a spread base with a fresh adapter: the base's weights are FSDP2's, the adapter's are averaged. Raises
    UserError if transformers does not know how to spread this architecture."""
    spread = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if not spread:
        return
    base = model.get_base_model()
    # One unit is the whole model, which each process would gather at once: no memory would be saved.
    if sum(isinstance(module, FSDPModule) for module in base.modules()) < 2:
        raise UserError(f"no way to spread a {base.config.model_type} base is known: set train.launch to ddp")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, spread)
    # transformers saves no optimizer for a model that it spread, since it might be spread too; here it is whole. And
    # peft would gather the base in order to save the adapter.
    base._is_distributed_loading_by_transformers = False
    base._tp_size = None


def reshard(model: Any) -> None:
    """Free the gathered weights: saving does so in the process that saves, and all have to do the same."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
