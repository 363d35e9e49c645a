"""A checkout that the app can run in: a tiny base with its GGUF, params.yaml with short replies, no Ollama."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from fine_tuning.runtime.gguf_writer import write_gguf
from tests.evaluation_suite import conversation, write_items
from tests.tiny import write_tiny_base

REPOSITORY = Path(__file__).resolve().parents[1]
APP = REPOSITORY / "fine_tuning" / "integration" / "streamlit_app.py"
NOBODY = "http://127.0.0.1:9"  # the discard port: a connection is refused at once


def write_checkout(folder: Path, base: Path, host: str = NOBODY, **app: object) -> Path:
    """Make `folder` a checkout with `base` (a tiny model folder) as the base; `app` changes that section."""
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_bytes())
    params["deploy"] |= {"host": host}
    params["app"] |= {"max_tokens": 24, "context": 512, "slots": 2, **app}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(base, folder / "models" / "base")
    shutil.copytree(REPOSITORY / ".streamlit", folder / ".streamlit")
    gguf = folder / "models" / "base" / "base-Q8_0.gguf"
    if not gguf.exists():
        write_gguf(folder / "models" / "base", gguf, "Q8_0")
    return folder


def add_candidate(folder: Path, prompts: int = 6) -> Path:
    """A candidate beside the base of a checkout, another tiny model, and held-out prompts to review it on."""
    base, merged, package = (folder / "models" / name for name in ("base", "merged", "package"))
    write_tiny_base(merged, seed=1)
    package.mkdir()
    write_gguf(merged, package / "model.gguf", "Q8_0")
    (folder / "models/adapter").mkdir()
    (folder / "models/adapter/adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "models/champion.json").write_text('{"version": null}\n')
    talks = {f"c{n}": conversation(f"Where is box number {n}?", f"Box {n} is here.") for n in range(prompts)}
    write_items(folder / "data/prepared/test", base, talks)
    (folder / "data/forgotten.jsonl").write_text("\n")
    return folder


def add_repositories(folder: Path) -> Path:
    """Make a checkout a git and DVC repository."""
    shutil.copy(REPOSITORY / ".gitignore", folder)
    for command in ("git init -q", f"{sys.executable} -m dvc init -q"):
        subprocess.run(command.split(), cwd=folder, check=True, env=environment())
    return folder


def environment() -> dict[str, str]:
    """The environment without an Ollama or MLflow of the person who runs the tests."""
    return {name: value for name, value in os.environ.items() if name not in ("OLLAMA_HOST", "MLFLOW_TRACKING_URI")}
