"""Results on disk under a hash of all that they depend on, so that the same base is scored on the same items once."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fine_tuning.common.project import code_sha256, versions
from fine_tuning.common.records import read_json, write_json


class Memo:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The JSON value stored under `key`, or that of `compute()`, stored.

        `key` names the inputs and settings; the library's code and the versions of what it calls are added here.
        """
        made_by = [code_sha256("evaluate"), versions()]
        name = hashlib.sha256(json.dumps([made_by, *key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}.json"
        try:
            value = read_json(path)
        except (OSError, ValueError):
            value = compute()
            write_json(path, value)
            return read_json(path)
        return value
