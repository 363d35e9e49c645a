"""Section `evaluate` of params.yaml."""

from pydantic import Field

from fine_tuning.evaluation.memory import MemorySettings
from fine_tuning.evaluation.rivals import RivalSettings
from fine_tuning.settings import Settings


class GenerationSettings(Settings):
    """Section `evaluate.generation`."""

    items: int = Field(ge=0)
    max_tokens: int = Field(ge=1)
    slots: int = Field(ge=1)


class IntervalSettings(Settings):
    """Section `evaluate.interval`."""

    draws: int = Field(ge=100)
    confidence: float = Field(gt=0.5, lt=1)
    seed: int


class EvaluateSettings(Settings):
    """Section `evaluate`."""

    metrics: list[str] = Field(min_length=1)
    references: list[str] = Field(min_length=1)
    batch_tokens: int = Field(ge=1)
    threads: int | None = Field(ge=1)
    generation: GenerationSettings
    quantised_items: int = Field(ge=0)
    rivals: RivalSettings
    forgetting: bool
    other_histories: int = Field(ge=0)
    memory: MemorySettings
    interval: IntervalSettings
    test_prompts: list[str]
