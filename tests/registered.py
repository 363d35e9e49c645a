"""A project whose last `dvc repro` left a candidate: real git, real DVC, a GGUF of the tiny base that really runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fine_tuning.project import sha256_file

ROOT = Path(__file__).parents[1]
# Stands for train, package, evaluate and compare: the same paths, with weights that depend on one parameter.
STAGE = """
import json, pathlib, shutil, sys
import pyarrow, pyarrow.parquet, yaml
from safetensors.numpy import save_file
import numpy, hashlib
seed = yaml.safe_load(open("params.yaml"))["train"]["seed"]
for name in ("adapter", "merged", "package"):
    pathlib.Path("models", name).mkdir(parents=True)
save_file({"lora": numpy.full((4, 4), seed, numpy.float32)}, "models/adapter/adapter_model.safetensors")
pathlib.Path("models/adapter/adapter_config.json").write_text(json.dumps({"r": 8}))
pathlib.Path("models/adapter/README.md").write_text("# Adapter\\n")
for file in pathlib.Path("models/base").iterdir():
    if file.suffix != ".gguf":
        shutil.copyfile(file, pathlib.Path("models/merged", file.name))
# Its name changes the hash and nothing else: another GGUF of the same weights.
gguf = pathlib.Path("models/base/tiny.gguf").read_bytes()
assert gguf.count(b"tiny0") == 1
pathlib.Path("models/package/model.gguf").write_bytes(gguf.replace(b"tiny0", b"tiny%d" % seed))
create = json.loads(pathlib.Path("models/base/create.json").read_text())
pathlib.Path("models/package/create.json").write_text(json.dumps(create))
pathlib.Path("models/package/Modelfile").write_text("FROM ./model.gguf\\n")
pathlib.Path("data/prepared").mkdir(parents=True)
for split, ids in {"train": ["c1", "c2"], "validation": ["c3"], "test": ["c4"]}.items():
    columns = {"id": ids, "source": ["test"] * len(ids), "input_ids": [[1, 2]] * len(ids)}
    pyarrow.parquet.write_table(pyarrow.table(columns), f"data/prepared/{split}.parquet")
digest = hashlib.sha256(pathlib.Path("models/adapter/adapter_model.safetensors").read_bytes()).hexdigest()
pathlib.Path("metrics").mkdir(exist_ok=True)
pathlib.Path("metrics/comparison.json").write_text(json.dumps({
    "verdict": yaml.safe_load(open("params.yaml"))["compare"]["verdict"], "reasons": ["perplexity 9.2 < 23.6"],
    "adapter_sha256": digest, "eval_set_sha256": "e" * 64}))
pathlib.Path("metrics/evaluation.json").write_text(json.dumps({"candidate": {"perplexity": 9.2}, "items": 4}))
"""

PIPELINE = """
stages:
  make:
    cmd: {python} make.py
    deps: [make.py, data/conversations, models/champion.json]
    params: [train.seed, compare.verdict]
    outs: [models/adapter, models/merged, models/package, data/prepared]
    metrics:
      - metrics/comparison.json: {{cache: false}}
      - metrics/evaluation.json: {{cache: false}}
"""

PARAMS = """
train: {{seed: {seed}}}
compare: {{verdict: {verdict}}}
chat: {{system_prompt: null, max_length: 512}}
deploy: {{name: trial, host: "http://127.0.0.1:9", more_hosts: [], timeout: 5.0, stream_timeout: 60.0}}
"""


def write_project(folder: Path, tiny_base: Path) -> Path:
    """Make the project and run its pipeline once."""
    from fine_tuning.data_preparation.tokenizer import load_tokenizer, render
    from fine_tuning.model_management.chat_template import derive_template
    from fine_tuning.model_management.gguf_writer import write_gguf

    folder.mkdir(parents=True)
    base = folder / "models" / "base"
    shutil.copytree(tiny_base, base)
    (base / "base.json").write_text(json.dumps({"model": "tiny0"}))
    write_gguf(base, base / "tiny.gguf", "F16")
    (base / "base.json").write_text(json.dumps({"model": "tiny", "revision": "r1"}))
    tokenizer = load_tokenizer(tiny_base)
    template = derive_template(lambda messages: render(tokenizer, messages, None, add_generation_prompt=True).text)
    parameters = {"stop": ["<|im_end|>", "<|im_start|>"], "num_ctx": 512}
    (base / "create.json").write_text(json.dumps({"template": template, "parameters": parameters}))
    shards = folder / "data" / "conversations"
    shards.mkdir(parents=True)
    (shards / "first.jsonl").write_text(
        "".join(json.dumps({"id": f"c{n}", "messages": []}) + "\n" for n in range(1, 5))
    )
    shard = {"name": "first.jsonl", "lines": 4, "sha256": sha256_file(shards / "first.jsonl"), "source": "import"}
    (folder / "data" / "manifest.json").write_text(json.dumps({"shards": [shard], "total_conversations": 4}))
    (folder / "make.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(PIPELINE.format(python=sys.executable))
    (folder / "models" / "champion.json").write_text('{\n  "version": null\n}\n')
    shutil.copyfile(ROOT / ".gitignore", folder / ".gitignore")
    set_params(folder)
    for command in (
        "git init -q -b main",
        "git config user.email trial@example.org",
        "git config user.name Trial",
        "dvc init -q",
        "dvc config core.analytics false",
        "dvc add -q data/conversations",
        "dvc repro -q",
        "git add -A",
        "git commit -qm First",
    ):
        sh(folder, command)
    return folder


def set_params(folder: Path, seed: int = 1, verdict: str = "PROMOTE") -> None:
    """Write params.yaml."""
    (folder / "params.yaml").write_text(PARAMS.format(seed=seed, verdict=verdict))


def repro(folder: Path, **params: object) -> None:
    """Make another candidate."""
    set_params(folder, **params)
    sh(folder, "dvc repro -q")


def sh(folder: Path, command: str) -> str:
    """Run git, dvc or a shell command in the project."""
    if command.startswith("dvc "):
        command = f"{sys.executable} -m {command}"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """The test's own environment, the project importable, no proxies, no server but the one that is named."""
    drop = ("OLLAMA_HOST", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def type_command(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    """`python -m fine_tuning WORDS` as its own process."""
    program = "from tests.registered import run_words; run_words()"
    return subprocess.run(
        [sys.executable, "-c", program, *words], cwd=folder, capture_output=True, text=True, env=environment(**more)
    )


def run_words() -> None:
    """The program of `type_command`: this room's commands only."""
    import argparse

    from fine_tuning.commands import models
    from fine_tuning.errors import run

    def main() -> int | None:
        parser = argparse.ArgumentParser()
        models.add_commands(parser.add_subparsers(required=True))
        arguments = parser.parse_args()
        return arguments.func(arguments)

    run(main)


def here(*words: str) -> None:
    """A command in this process and folder: importing MLflow anew costs seconds."""
    import argparse

    from fine_tuning.commands import models

    parser = argparse.ArgumentParser()
    models.add_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args(words)
    arguments.func(arguments)
