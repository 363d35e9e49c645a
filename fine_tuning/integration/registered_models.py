"""Earlier versions for the model picker. The registry is asked by a process in the background: MLflow takes seconds."""

import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import run_command
from fine_tuning.common.records import read_object
from fine_tuning.integration.chat_models import BASE, ChatModel, champion_version
from fine_tuning.integration.jobs import own_command


class RegisteredModels:
    """The versions of one checkout whose GGUF its DVC cache holds.

    Args:
        checkout: folder whose registry and cache are looked at.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self._asked: Any = None
        self._found: list[ChatModel] = []
        self._asking: threading.Thread | None = None
        self._lock = threading.Lock()

    def known(self, stamp: Any) -> list[ChatModel]:
        """What is known now and still has its file, the newest first, without the champion.

        Another `stamp` than before asks anew. A version that `forget` withdrew goes as soon as its file does.
        """
        with self._lock:
            if stamp != self._asked and champion_version(self.checkout) is not None:
                self._asked = stamp
                self._asking = threading.Thread(target=self._ask, daemon=True, name="registry")
                self._asking.start()
            return [model for model in self._found if model.gguf is not None and model.gguf.is_file()]

    def wait(self, seconds: float) -> None:
        """Wait until the last question is answered."""
        if self._asking is not None:
            self._asking.join(seconds)

    def _ask(self) -> None:
        try:
            answer = json.loads(run_command(*own_command("list", "--json"), cwd=self.checkout))
            found = from_registry(self.checkout, answer["versions"])
        except (UserError, ValueError, KeyError):
            found = []  # the page Models says what is wrong with the registry
        with self._lock:
            self._found = found


def from_registry(checkout: Path, versions: list[dict[str, Any]]) -> list[ChatModel]:
    """The versions of `list --json` that can answer here: their GGUF is in the cache, and the base is the one of now.

    The prompt of a version of another base would need that base's tokenizer.
    """
    base = read_object(checkout / BASE / "base.json")
    now = (str(base.get("model") or "unknown"), str(base.get("revision") or "none"))
    return [
        ChatModel("Version", "embedded", f"{v['name']}:{v['version']}", v["version"], Path(v["gguf"]))
        for v in reversed(versions)
        if v["gguf"]
        and v["version"] != champion_version(checkout)
        and (v["tags"].get("base_model"), v["tags"].get("base_revision")) == now
    ]


@cache
def registered_models(checkout: Path) -> RegisteredModels:
    """The one of a checkout, shared by all pages of the process."""
    return RegisteredModels(checkout)
