"""The section `train` of params.yaml."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fine_tuning.common.settings import Settings


class LoraSettings(Settings):
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    target_modules: Literal["all-linear", "attention"] | list[str]
    top_layers: int | None = Field(ge=1)
    rslora: bool
    dora: bool


class PreferenceSettings(Settings):
    minimum: int = Field(ge=1)
    order: Literal["together", "supervised_first"]
    loss: Literal["sigmoid", "ipo", "hinge"]
    beta: float = Field(gt=0)
    label_smoothing: float = Field(ge=0, lt=0.5)
    sft_weight: float = Field(ge=0)


def _hash(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{8,64}", text):
        raise ValueError("8 to 64 digits of an adapter's SHA-256")
    return text


class TrainSettings(Settings):
    """The section `train`."""

    objective: Literal["sft", "dpo", "kto", "auto"]
    preference: PreferenceSettings
    retention: float = Field(ge=0)
    method: Literal["lora", "qlora"]
    start_from: Annotated[str, AfterValidator(_hash)] | None
    launch: Literal["single", "ddp", "fsdp"]
    seed: int = Field(ge=0, lt=2**32)
    epochs: float = Field(gt=0)
    max_steps: int | None = Field(ge=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "lion_8bit", "sgd"]
    batch_tokens: int = Field(ge=16)
    packing: bool
    acceleration: Literal["auto", "off"]
    gradient_accumulation: int = Field(ge=1)
    lora: LoraSettings
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    threads: int | None = Field(ge=1)
    gradient_checkpointing: bool
    neftune_alpha: float | None = Field(gt=0)
    validations: int = Field(ge=1)
    early_stopping_patience: int | None = Field(ge=1)
    checkpoint_steps: int = Field(ge=1)
