"""A tokenizer with its chat template for encoding alone, without the second and more that transformers takes to start.

It gives the texts and ids of transformers' tokenizer of the same folder, or there is none.
"""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from fine_tuning.common.records import read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
# What only transformers reads: of a template, and of tokenizer_config.json.
_RARE = re.compile(r"\b(?:dict|generation)\b")
_MORE = ("model_specific_special_tokens", "added_tokens_decoder", "split_special_tokens")


class LightTokenizer:
    """What `chat_format` needs of a tokenizer to encode conversations."""

    def __init__(self, backend: Tokenizer, template: str, named: dict[str, str]) -> None:
        self.backend_tokenizer, self.chat_template, self._named = backend, template, named
        self.unk_token_id = backend.token_to_id(named["unk_token"]) if "unk_token" in named else None
        # As transformers.utils.chat_template_utils sets it up.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        self._template = environment.from_string(template)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """The text that the template writes."""
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._template.render(**given, **self._named)


def light_tokenizer(folder: Path) -> LightTokenizer | None:
    """The tokenizer of a folder; None where transformers would add something of its own to what the files say."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    if not all(file.is_file() for file in files):
        return None
    backend, config, template = Tokenizer.from_file(str(files[0])), read_json(files[1]), files[2].read_text("utf-8")
    named = {name: config[name] for name in _NAMED if config.get(name) is not None}
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    used = [*named.values(), *(token for name in _LISTS for token in config.get(name) or ())]
    if not known.issuperset(map(str, used)) or any(map(config.get, _MORE)) or _RARE.search(template):
        return None
    return LightTokenizer(backend, template, named)


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError("a chat template cannot store names that begin with an underscore")
        super().__setitem__(name, value)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(message)
