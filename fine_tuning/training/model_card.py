"""What travels with an adapter: its model card and the name of its base."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fine_tuning.common.records import read_json, write_json
from fine_tuning.runtime.base_model import hub_id

_QUANTISED = """ The base was held in four bits (NF4, double
quantisation) while it learned. The adapter is merged into the 16-bit base that the packed one came from; that merged
model is what is shipped and evaluated."""
DATA = "data/prepared"  # what `load_dataset` takes in the project
PROMPT = "How do I restart the router?"


def name_base(adapter: Path, base: dict[str, Any], folder: Path) -> None:
    """Name the base so that peft finds it: by its hub id and commit, or, where no hub knows it, by its folder from the
    project's top. The base's card, `base`, is put beside the adapter."""
    path = adapter / "adapter_config.json"
    known = hub_id(base)
    named = {"base_model_name_or_path": known or folder.as_posix(), "revision": base["revision"] if known else None}
    write_json(path, read_json(path) | named)
    write_json(adapter / "base.json", base)


def results(split: str, metrics: dict[str, float]) -> list[EvalResult]:
    """Entries of a card's `model-index`: metrics on a split of the prepared conversations."""
    about = {"task_type": "text-generation", "dataset_type": DATA, "dataset_name": "prepared conversations"}
    return [
        EvalResult(**about, dataset_split=split, metric_type=name, metric_name=f"{split} {name}", metric_value=value)
        for name, value in metrics.items()
    ]


def model_card(
    base: dict[str, Any],
    settings: dict[str, Any],
    metrics: dict[str, float],
    hashes: dict[str, str],
    origin: str | None = None,
) -> str:
    """Markdown with the metadata block that model hubs read: base, licence, data hashes, parameters, metrics.

    Args:
        base: content of base.json.
        settings: the section `train`, flattened.
        metrics: what training measured; losses in nats a token.
        hashes: SHA-256 of the training and validation files.
        origin: where an adapter comes from that was not trained here.
    """
    if origin:
        settings, hashes = {"method": "lora"}, {"validation": hashes["validation"]}
    perplexity = metrics.get("validation_perplexity")  # of replies as they are, where some were learned from
    # A hub knows licences by short names; anything else is `other` with a name.
    license_id = base["license"] or ""
    known = bool(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id))
    head = ModelCardData(
        base_model=base["model"],
        datasets=[DATA],
        eval_results=results("validation", {} if perplexity is None else {"perplexity": perplexity}),
        library_name="peft",
        license=license_id if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.]+", "-", license_id.lower()).strip("-") or None,
        model_name=f"{settings['method']} adapter",
        pipeline_tag="text-generation",
        tags=[settings["method"], "chat", "whetstone"],
        widget=[{"messages": [{"role": "user", "content": PROMPT}]}],
    ).to_yaml()
    quantised = _QUANTISED if settings["method"] == "qlora" else ""
    made = f"A {settings['method']} adapter, trained on assistant tokens only.{quantised}"
    if origin:
        made = f"Trained elsewhere ({origin}) and measured here. What it learned from is not known."
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    data = "\n".join(f"| {name} | `{value}` |" for name, value in hashes.items())
    return f"""---
{head}
---

# Adapter for {base["model"]}

{made}

| base | |
|---|---|
| revision | {base["revision"] or "as installed"} |
| weights, SHA-256 | `{base["sha256"]}` |
| licence | {base["license"] or "not stated by the base"} |

| data, SHA-256 | |
|---|---|
{data}

| measured in training | |
|---|---|
{measured}

| parameter | |
|---|---|
{rows}
"""
