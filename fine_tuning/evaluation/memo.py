"""Results on disk under a hash of all that they depend on, so that the same base is scored on the same items once."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fine_tuning.evaluation.items import code_sha256
from fine_tuning.records import read_json, write_json


class Memo:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The JSON value stored under `key`, or that of `compute()`, stored. `key` names versions and inputs."""
        versions = [code_sha256(), *map(importlib.metadata.version, ("torch", "transformers", "xllamacpp"))]
        name = hashlib.sha256(json.dumps([versions, *key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}.json"
        try:
            value = read_json(path)
        except (OSError, ValueError):
            value = compute()
            write_json(path, value)
            return read_json(path)
        return value
