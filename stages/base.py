"""params.yaml's `base` in; models/base out: a Hugging Face folder with a proven tokenizer, and the base's own GGUF."""

from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.runtime.base_model import BaseSettings, locate_base, write_base
from fine_tuning.runtime.gguf_writer import PROBES, write_gguf
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import load_tokenizer

BASE = Path("models/base")
GGUF = BASE / "base-Q8_0.gguf"


def main() -> None:
    settings = read_params("base", BaseSettings)
    print(f"base: reading {settings.model}", flush=True)
    about = write_base(settings, BASE)
    print(f"base: {about['architecture']} with {about['parameters'] / 1e6:.0f}M parameters, writing {GGUF}", flush=True)
    write_gguf(BASE, GGUF, "Q8_0", settings.gguf_converter)
    original = locate_base(settings.model, settings.revision).gguf
    for gguf in filter(None, (original, GGUF)):
        prove_tokenizer(gguf)
    print(f"base: the tokenizer gives llama.cpp's ids on all {len(PROBES)} probe texts")


def prove_tokenizer(gguf: Path) -> None:
    """Compare the folder's tokenizer with llama.cpp's reading of `gguf` on the probe texts.

    Raises:
        UserError: an id differs; training and serving would not see the same text.
    """
    tokenizer = load_tokenizer(BASE)
    with LlamaEngine(gguf, context=512, threads=1) as engine:
        for text in PROBES:
            if tokenizer.encode(text, add_special_tokens=False) != engine.tokenize(text):
                raise UserError(
                    f"the base's tokenizer and llama.cpp's reading of {gguf.name} give other ids for {text[:40]!r}: "
                    "choose another base.model, or its Hugging Face folder instead of its GGUF"
                )


if __name__ == "__main__":
    run_stage(main)
