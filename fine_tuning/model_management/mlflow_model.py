"""A version's folder as MLflow's own kind of model, so that its tools load and serve it."""

import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from fine_tuning.common.project import LIBRARY
from fine_tuning.common.records import write_json

ROOMS = ("common", "schema", "runtime")  # of the library, all that `chat_version` imports
NEEDED = (
    "mlflow", "torch", "transformers", "peft", "safetensors", "tokenizers", "jinja2", "gguf", "pydantic", "pyyaml",
    "httpx", "filelock", "psutil", "huggingface-hub",
)  # fmt: skip
EXAMPLE = {"messages": [{"role": "user", "content": "How do I restart the router?"}], "max_tokens": 64}


def write_model(folder: Path, name: str, base: Path, card: dict[str, Any]) -> None:
    """Write MLmodel, code, signature, input example and pinned requirements into an empty folder.

    Nothing is loaded or asked: adapter and package are put beside it afterwards.

    Args:
        name: what replies call the model.
        base: where the base model is here.
        card: the base's base.json, by whose hash another machine knows the base.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that type hints could stand for the signature
        code = Path(scratch, LIBRARY.name)
        for room in ROOMS:
            shutil.copytree(LIBRARY / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(LIBRARY / "__init__.py", code)
        mlflow.pyfunc.save_model(
            folder,
            python_model=Path(__file__).with_name("chat_version.py"),
            code_paths=[str(code)],
            model_config={"name": name, "base": str(base.resolve())},
            signature=ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA),
            input_example=EXAMPLE,
            pip_requirements=[f"{package}=={metadata.version(package).partition('+')[0]}" for package in NEEDED],
            metadata={"task": "agent/v1/chat"},
        )
    write_json(folder / "base.json", card)
