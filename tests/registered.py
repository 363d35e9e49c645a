"""A project whose last `dvc repro` left a candidate: real git, real DVC, a GGUF of the tiny base that really runs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import yaml

from fine_tuning.common.project import sha256_file
from tests.forked import folder as forked_python

ROOT = Path(__file__).parents[1]
# Stands for train and package: the same paths, with weights that depend on one parameter.
MAKE = """
import json, pathlib, shutil
import pyarrow, pyarrow.parquet, yaml
from safetensors.numpy import save_file
import numpy
seed = yaml.safe_load(open("params.yaml"))["train"]["seed"]
for name in ("adapter", "merged", "package"):
    pathlib.Path("models", name).mkdir(parents=True)
layer = "base_model.model.model.layers.0.self_attn.q_proj"
lora = {f"{layer}.lora_A.weight": numpy.full((4, 64), seed / 10, numpy.float32)}
lora |= {f"{layer}.lora_B.weight": numpy.full((64, 4), 0.1, numpy.float32)}
save_file(lora, "models/adapter/adapter_model.safetensors")
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
config |= {"layers_to_transform": [0], "base_model_name_or_path": "models/base"}
pathlib.Path("models/adapter/adapter_config.json").write_text(json.dumps(config))
pathlib.Path("models/adapter/README.md").write_text("---\\nmodel_name: trial\\n---\\n# Adapter\\n")
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
for split, ids in {"train": ["c1", "c2"], "validation": ["c3"], "test": ["c4"]}.items():
    columns = {"id": ids, "source": ["test"] * len(ids), "input_ids": [[1, 2]] * len(ids)}
    pathlib.Path("data/prepared", split).mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), f"data/prepared/{split}/first.parquet")
"""
# Stands for evaluate: the records of whatever verdict a parameter asks for.
MEASURE = """
import shutil, sys
from pathlib import Path
import yaml
sys.path.insert(0, "ROOT")
from fine_tuning.evaluation.records.champion_records import is_champion, restore_records
from fine_tuning.common.records import write_json
champion, metrics = Path("models/champion.json"), Path("metrics/evaluation.json")
candidate = Path("models/adapter/adapter_model.safetensors"), Path("models/package/model.gguf")
trial = yaml.safe_load(open("params.yaml"))["trial"]
suite = {"sha256": "e" * 64, "method_sha256": "trial"} | trial.get("suite", {})
kind = suite.get("kind", {"name": "adapter"})
if is_champion(champion, *candidate, kind) and restore_records(champion, metrics, "trial"):
    sys.exit()
shutil.copytree(Path("trial", trial["verdict"]), "data/evaluation")
write_json(metrics, {"candidate": {"perplexity": {"value": 9.2}}, "items": 4, "suite": suite})
Path("metrics/side_by_side.md").write_text("# Side by side\\n")
"""
# Stands for compare, with the verdicts that it gave before: importing what it needs takes seconds each time.
JUDGE = """
import sys
from pathlib import Path
sys.path.insert(0, "ROOT")
from fine_tuning.evaluation.records.champion_records import called_champion, is_champion
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json, write_json
adapter, champion = Path("models/adapter/adapter_model.safetensors"), Path("models/champion.json")
verdicts = {sha256_file(Path("trial", name, "items.jsonl")): name for name in ("PROMOTE", "HOLD", "INCONCLUSIVE")}
name = verdicts[sha256_file(Path("data/evaluation/items.jsonl"))]
found = read_json(Path(f"trial/{name}.json")) | {"adapter_sha256": sha256_file(adapter), "eval_set_sha256": "e" * 64}
suite = read_json(Path("metrics/evaluation.json"))["suite"]
if "kind" in suite:
    from fine_tuning.common.settings import read_params
    from fine_tuning.evaluation.records.settings import EvaluateSettings
    from fine_tuning.evaluation.verdict.comparison import CompareSettings, Evidence
    settings = read_params("compare", CompareSettings)
    evidence = Evidence.read(Path("data/evaluation"), read_params("evaluate", EvaluateSettings), Path("data/votes"))
    found = evidence.verdict(settings, sha256_file(adapter), suite)
if is_champion(champion, adapter, Path("models/package/model.gguf"), suite.get("kind", {"name": "adapter"})):
    found = called_champion(found, read_json(champion))
write_json(Path("metrics/comparison.json"), found)
"""
PIPELINE = """
stages:
  make:
    cmd: python make.py
    deps: [make.py, data/conversations]
    params: [train.seed]
    outs: [models/adapter, models/merged, models/package, data/prepared]
  evaluate:
    cmd: python measure.py
    deps: [measure.py, models/champion.json, models/adapter/adapter_model.safetensors, models/package, trial]
    params: [trial, evaluate]
    outs: [data/evaluation, metrics/side_by_side.md]
    metrics:
      - metrics/evaluation.json: {cache: false}
  compare:
    cmd: python judge.py
    deps:
      - judge.py
      - trial
      - data/evaluation
      - models/champion.json
      - models/adapter/adapter_model.safetensors
      - models/package/model.gguf
    params: [trial, evaluate, compare]
    metrics:
      - metrics/comparison.json: {cache: false}
"""

# Items, and the candidate's nats a token on them, the base's being 3.0.
RECORDS = {"PROMOTE": (60, 2.0), "HOLD": (60, 3.0), "INCONCLUSIVE": (6, 2.0)}


def write_records(folder: Path) -> None:
    """Records that lead to each verdict, in trial/VERDICT, and what the real comparison says, in trial/VERDICT.json."""
    from fine_tuning.common.records import write_json, write_jsonl
    from fine_tuning.common.settings import read_params
    from fine_tuning.evaluation.records.measurements import GUARDS
    from fine_tuning.evaluation.records.settings import EvaluateSettings
    from fine_tuning.evaluation.verdict.comparison import CompareSettings, Evidence

    evaluate, compare = (
        read_params(name, kind, folder / "params.yaml")
        for name, kind in (("evaluate", EvaluateSettings), ("compare", CompareSettings))
    )
    for verdict, (count, nats) in RECORDS.items():
        place = folder / "trial" / verdict
        place.mkdir(parents=True)
        lines = [
            {"contender": name, "id": f"c{n}", "source": "test", "cluster": f"c{n}", "suite": "s", "turns": []}
            | {"nll": 20 * (mean + n % 5 / 10), "tokens": 20, "correct": 10, "bytes": 80}
            for name, mean in (("base", 3.0), ("candidate", nats))
            for n in range(count)
        ]
        for name in ("items", "prompts", "memory", *GUARDS):
            write_jsonl(place / f"{name}.jsonl", lines if name == "items" else [])
        found = Evidence.read(place, evaluate, place / "votes").verdict(compare, "", {"sha256": "e" * 64})
        assert found["verdict"] == verdict, f"the records no longer lead to {verdict}: {found['reasons']}"
        write_json(folder / "trial" / f"{verdict}.json", found)


def write_project(folder: Path, tiny_base: Path) -> Path:
    """Make the project and run its pipeline once."""
    from fine_tuning.model_management.packaging.chat_template import derive_template
    from fine_tuning.runtime.base_model import hash_weights
    from fine_tuning.runtime.gguf_writer import write_gguf
    from fine_tuning.schema.chat_format import load_tokenizer, render

    folder.mkdir(parents=True)
    base = folder / "models" / "base"
    shutil.copytree(tiny_base, base)
    (base / "base.json").write_text(json.dumps({"model": "tiny0"}))
    write_gguf(base, base / "tiny.gguf", "F16")
    card = {"model": "tiny", "revision": "r1", "chat_template_sha256": None, "sha256": hash_weights(base)}
    (base / "base.json").write_text(json.dumps(card))
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
    for name, script in (("make", MAKE), ("measure", MEASURE), ("judge", JUDGE)):
        (folder / f"{name}.py").write_text(script.replace("ROOT", str(ROOT)))
    artifacts = yaml.safe_load((ROOT / "dvc.yaml").read_text())["artifacts"]
    (folder / "dvc.yaml").write_text(PIPELINE + yaml.safe_dump({"artifacts": artifacts}))
    (folder / "models" / "champion.json").write_text('{\n  "version": null\n}\n')
    shutil.copyfile(ROOT / ".gitignore", folder / ".gitignore")
    set_params(folder)
    write_records(folder)
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


def set_params(folder: Path, seed: int = 1, verdict: str = "PROMOTE", suite: dict | None = None) -> None:
    """Write params.yaml; `suite` is recorded of the evaluation's."""
    ours = yaml.safe_load((ROOT / "params.yaml").read_bytes())
    params = ours | {
        "train": ours["train"] | {"seed": seed},
        "trial": {"verdict": verdict} | ({"suite": suite} if suite else {}),
        "chat": {"system_prompt": None, "max_length": 512},
        "evaluate": ours["evaluate"] | {"metrics": ["perplexity", "nll_per_byte", "token_accuracy"]},
        "compare": ours["compare"] | {"secondary": {"token_accuracy": 0.02}},
        "deploy": {"name": "trial", "host": "http://127.0.0.1:9", "more_hosts": [], "timeout": 5.0}
        | {"stream_timeout": 60.0},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def repro(folder: Path, **params: object) -> None:
    """Make another candidate."""
    set_params(folder, **params)
    sh(folder, "dvc repro -q")


def sh(folder: Path, command: str) -> str:
    """Run git, dvc or a shell command in the project."""
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """The test's own environment, the project importable, no proxies, no server but the one that is named."""
    drop = ("OLLAMA_HOST", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    path = os.pathsep.join((str(forked_python()), os.environ["PATH"]))
    return kept | {"PYTHONPATH": str(ROOT), "PATH": path} | more


def type_command(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    """`python -m fine_tuning WORDS` as its own process."""
    program = "from tests.registered import run_words; run_words()"
    return subprocess.run(
        ["python", "-c", program, *words], cwd=folder, capture_output=True, text=True, env=environment(**more)
    )


def run_words() -> None:
    """The program of `type_command`; unlike `python -m fine_tuning` it leaves the folder's rights as they are."""
    from fine_tuning.commands import command_line
    from fine_tuning.common.errors import run

    run(lambda: command_line.run(command_line.parse()))


def here(*words: str) -> int:
    """A command in this process and folder: importing MLflow anew costs seconds. Returns its exit status."""
    from fine_tuning.commands import command_line

    return command_line.run(command_line.parse(words)) or 0
