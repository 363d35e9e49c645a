"""The model card that travels with an adapter."""

import json
from typing import Any

_QUANTISED = """ The base was held in four bits (NF4, double
quantisation) while it learned. The adapter is merged into the 16-bit base that the packed one came from; that merged
model is what is shipped and evaluated."""


def model_card(
    base: dict[str, Any], settings: dict[str, Any], metrics: dict[str, float], hashes: dict[str, str]
) -> str:
    """Markdown with the metadata block that model hubs read: base, licence, data hashes, parameters, metrics.

    Args:
        base: content of base.json.
        settings: the section `train`, flattened.
        metrics: what training measured; losses in nats a token.
        hashes: SHA-256 of the training and validation files.
    """
    # Quoted: the first line of a licence or the name of a folder may hold a colon.
    base_model, license_name = (
        json.dumps(text, ensure_ascii=False) for text in (base["model"], base["license"] or "other")
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    data = "\n".join(f"| {name} | `{value}` |" for name, value in hashes.items())
    return f"""---
base_model: {base_model}
license: {license_name}
library_name: peft
pipeline_tag: text-generation
---

# Adapter for {base["model"]}

A {settings["method"]} adapter, trained on assistant tokens only.{_QUANTISED if settings["method"] == "qlora" else ""}

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
