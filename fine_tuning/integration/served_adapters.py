"""Adapters of several people over one base (`serve.adapters`): one engine holds them all, each request says which.

The base has to be the one that an adapter was trained on: its file says which that was.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from os.path import expanduser
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_object, stamp
from fine_tuning.integration.chat_models import BASE, BASE_GGUF, ChatModel
from fine_tuning.runtime.base_model import gguf_field
from fine_tuning.runtime.gguf_writer import OF_ADAPTER

RESERVED = ("live", "base", "champion", "candidate", "canary", "previous", "version", "other")


def adapter_name(name: str) -> str:
    """Return `name` if an adapter may be called so: no version's tag, and no name that a model of the project has.
    Raises ValueError if it may not."""
    if not re.fullmatch(r"[a-z][a-z0-9_.-]{0,63}", name) or name in RESERVED or re.fullmatch(r"v[0-9]+", name):
        raise ValueError(
            "a name for an adapter: a small letter first, then small letters, digits, -, _ and .; not that of another "
            f"model ({', '.join(RESERVED)}, v1, v2, …)"
        )
    return name


def with_adapters(
    models: Sequence[ChatModel], checkout: Path, name: str, adapters: Mapping[str, str]
) -> list[ChatModel]:
    """The models, and after the base those that `adapters` make of it: `name:anna` of {"anna": "anna.gguf"}.

    The base and they share an engine. One whose file is missing, or was made for another base, has a `problem`.

    Args:
        name: the deployed model's name.
        adapters: {name: path of the file, from the checkout on}.
    """
    base = next((model for model in models if model.gguf == checkout / BASE_GGUF), None)
    if base is None or not adapters:
        return list(models)
    sha256 = read_object(checkout / BASE / "base.json").get("sha256")
    made = [_adapter(base, called, checkout / expanduser(path), name, sha256) for called, path in adapters.items()]
    loaded = tuple(model.adapter for model in made if model.adapter and not model.problem)
    shared = [replace(model, adapters=loaded) for model in (base, *made)]
    at = models.index(base)
    return [*models[:at], *shared, *models[at + 1 :]]


def _adapter(base: ChatModel, called: str, path: Path, name: str, sha256: str | None) -> ChatModel:
    model = ChatModel(called, "embedded", f"{name}:{called}", None, base.gguf, adapter=path)
    try:
        of_base, own = _origins(path, stamp(path))
    except FileNotFoundError:
        return replace(model, problem=f"serve.adapters.{called}: {path} is missing: correct the path in params.yaml")
    except (OSError, ValueError, UserError):
        mend = "correct the path in params.yaml, or let package.adapter_gguf write one"
        return replace(model, problem=f"serve.adapters.{called}: {path} is not a GGUF file: {mend}")
    if of_base is None or of_base != sha256:
        what = "was trained on another base than models/base" if of_base else "does not say which base it is for"
        made = "package.adapter_gguf writes one that fits"
        return replace(model, problem=f"serve.adapters.{called}: {path} {what}: {made}")
    return replace(model, tag=f"{model.tag}@{(own or '')[:8]}")


@lru_cache(maxsize=64)
def _origins(path: Path, _: object) -> tuple[str | None, str | None]:
    """SHA-256 of the base that an adapter's file is for, and of the adapter that it was made of."""
    base, own = (gguf_field(path, key) for key in OF_ADAPTER)
    return base, own
