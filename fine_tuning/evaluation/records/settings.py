"""Section `evaluate` of params.yaml."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fine_tuning.common.settings import Settings

METRIC_MODULES = Path(__file__).parents[1] / "metric_modules"


# What answers in a version: the tuned model; the base after a system prompt and retrieved examples; the tuned model
# after retrieved examples.
ADAPTER, PROMPT, ADAPTER_EXAMPLES = KINDS = ("adapter", "prompt", "adapter+examples")


def _metric_name(name: str) -> str:
    """A metric is a file of metric_modules that is executed, so its name leads nowhere else."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError("a name of letters, digits and _, the file's without .py")
    return name


def metric_names(folder: Path = METRIC_MODULES) -> list[str]:
    """Names of the metrics in a folder: each is a file, but for what loads them."""
    return sorted({file.stem for file in folder.glob("*.py")} - {"__init__", "loading"})


class PromptingBaselineSettings(Settings):
    system_prompt: str | None
    examples: int = Field(ge=0)
    items: int = Field(ge=0)


class MemorySettings(Settings):
    conversations: int = Field(ge=0)


class GenerationSettings(Settings):
    items: int = Field(ge=0)
    max_tokens: int = Field(ge=1)
    slots: int = Field(ge=1)


class IntervalSettings(Settings):
    draws: int = Field(ge=100)
    confidence: float = Field(gt=0.5, lt=1)
    seed: int = Field(ge=0)


def _address(url: str | None) -> str | None:
    """No user, password or query: a key is no parameter, and errors name the address."""
    if url is None or re.fullmatch(r"https?://([\w.-]+|\[[0-9a-f:]+\])(:\d+)?(/[^\s?#@]*)?", url):
        return url
    raise ValueError(
        "an address such as http://localhost:11434 without user, password and query: a key goes into the variable "
        "WHETSTONE_JUDGE_KEY"
    )


class JudgeSettings(Settings):
    """Section `evaluate.judge`: a model that judges replies beside people; none without address or name."""

    url: Annotated[str | None, AfterValidator(_address)]
    model: str | None = Field(min_length=1, max_length=200)
    rubric: str = Field(min_length=1)


class EvaluateSettings(Settings):
    """Section `evaluate`."""

    metrics: list[Annotated[str, AfterValidator(_metric_name)]] = Field(min_length=1)
    references: list[str] = Field(min_length=1)
    batch_tokens: int = Field(ge=1)
    threads: int | None = Field(ge=1)
    generation: GenerationSettings
    quantised_items: int = Field(ge=0)
    kind: Literal["adapter", "prompt", "adapter+examples", "auto"] = "adapter"
    prompting_baselines: PromptingBaselineSettings
    forgetting: bool
    other_histories: int = Field(ge=0)
    memory: MemorySettings
    benchmarks: list[str] = Field(default_factory=list)
    benchmark_questions: int | None = Field(100, ge=1)
    interval: IntervalSettings
    test_prompts: list[str]
    judge: JudgeSettings | None = Field(None, exclude=True)  # no part of how models are evaluated
