"""The model card that travels with an adapter."""

from typing import Any


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
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    data = "\n".join(f"| {name} | `{value}` |" for name, value in hashes.items())
    return f"""---
base_model: {base["model"]}
license: {base["license"] or "other"}
library_name: peft
pipeline_tag: text-generation
---

# Adapter for {base["model"]}

A {settings["method"]} adapter, trained on assistant tokens only.

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
