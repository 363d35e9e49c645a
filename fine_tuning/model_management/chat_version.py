"""A registered version as an MLflow model: chat messages in, a chat completion out, in OpenAI's form.

MLflow runs this file from the version's folder (models from code), with the adapter, the base's card and the library
beside it.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

HERE = Path(__file__).parent
BASE = "WHETSTONE_BASE"  # environment variable: folder of the base model, instead of the registered one


class ChatVersion(PythonModel):  # type: ignore[misc]
    """Adapter and base, loaded at the first question."""

    def __init__(self) -> None:
        self.loaded: tuple[Any, Any] | None = None

    # No type hints: MLflow warns of those that it cannot check, and the signature has them.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Reply to `messages`. `temperature`, `top_p`, `top_k`, `max_tokens` and `stop` default to the package's.

        Args:
            model_input: a chat request, as a dictionary or as MLflow's data frame with one row.
        """
        from fine_tuning.common.records import read_json
        from fine_tuning.schema.chat_format import encode_prompt, end_of_turn_ids

        request = model_input if isinstance(model_input, dict) else model_input.iloc[0].dropna().to_dict()
        request = {key: value for key, value in request.items() if value is not None}
        config = (context and context.model_config) or {}
        self.loaded = self.loaded or load(config)
        tokenizer, model = self.loaded
        package = read_json(HERE / "package/create.json")
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in request["messages"]]
        prompt = encode_prompt(tokenizer, messages, package.get("system"))
        wanted = {"temperature": 0.0} | package["parameters"] | request
        ids = list(_reply(model, prompt, end_of_turn_ids(tokenizer), wanted))
        ended = bool(ids) and ids[-1] in end_of_turn_ids(tokenizer)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for stop in request.get("stop", []):
            text, found, _ = text.partition(stop)
            ended = ended or bool(found)
        reply = {"role": "assistant", "content": text}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": config.get("name"),
            "choices": [{"index": 0, "message": reply, "finish_reason": "stop" if ended else "length"}],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "total_tokens": len(prompt) + len(ids),
            },
        }


def _reply(model: Any, prompt: list[int], ends: list[int], wanted: dict[str, Any]) -> Iterator[int]:
    """Token ids of one sampled reply, greedy at temperature 0."""
    import torch

    sampling: dict[str, Any] = {"do_sample": False}
    if wanted["temperature"] > 0:
        sampling = {"do_sample": True} | {n: wanted[n] for n in ("temperature", "top_p", "top_k") if n in wanted}
    ids = torch.tensor([prompt], device=model.device)
    limit = int(wanted.get("max_tokens", 512))
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), eos_token_id=ends, pad_token_id=ends[0], max_new_tokens=limit,
        **sampling,
    )  # fmt: skip
    yield from made[0, len(prompt) :].tolist()


def load(config: dict[str, Any]) -> tuple[Any, Any]:
    """(tokenizer, the adapter on its base). The base is the registered folder while it has the recorded SHA-256, else
    it is made again from package, hub or file. Raises UserError if there is no base of that SHA-256."""
    import torch
    from peft import PeftModel

    from fine_tuning.common.records import read_json
    from fine_tuning.runtime.base_model import load_model
    from fine_tuning.schema.chat_format import load_tokenizer

    card = read_json(HERE / "base.json")
    with tempfile.TemporaryDirectory() as scratch:
        folder = find_base(card, [os.environ.get(BASE), config.get("base")], Path(scratch))
        tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    kind = HERE / "package/kind.json"
    if not kind.is_file() or read_json(kind)["kind"] != "prompt":  # a prompt version is the base after a system prompt
        model = PeftModel.from_pretrained(model, str(HERE / "adapter"))
    return tokenizer, model.eval()


def find_base(card: dict[str, Any], places: list[str | None], scratch: Path) -> Path:
    """The first folder among `places` with the base's recorded weights, or one made anew in `scratch`."""
    from fine_tuning.common.errors import UserError
    from fine_tuning.runtime.base_model import BaseSettings, hash_weights, write_base

    for folder in map(Path, filter(None, places)):
        if any(folder.glob("*.safetensors")) and hash_weights(folder) == card["sha256"]:
            return folder
    settings = BaseSettings(
        model=card["model"], revision=card["revision"], chat_template_sha256=card["chat_template_sha256"],
        trust_remote_code=False, gguf_converter=None,
    )  # fmt: skip
    if write_base(settings, scratch)["sha256"] != card["sha256"]:
        raise UserError(f"{card['model']} has other weights than the version's base: set {BASE} to its folder")
    return scratch


set_model(ChatVersion())
