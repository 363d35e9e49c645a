"""The models that are compared: where they lie and what they are."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json
from fine_tuning.common.settings import Settings
from fine_tuning.evaluation.records.champion_records import champion_folder
from fine_tuning.evaluation.records.settings import ADAPTER_EXAMPLES, KINDS, PROMPT, EvaluateSettings
from fine_tuning.runtime.base_model import locate_base
from fine_tuning.schema.prepared import split_sha256

# Parts of a model's name that say how it is stored or tuned and not which one it is.
_VARIANT = re.compile(r"(?:^|(?<=[^a-z0-9]))(?:i?q\d\w*|b?f(?:16|32)|fp16|gguf|latest|instruct|chat|it)(?![a-z0-9])")


@dataclass(frozen=True)
class Contender:
    """A model in its two forms, the folder that is scored and the GGUF that replies, and what stands before a question.

    Args:
        kind: see KINDS.
        system_prompt: instead of a conversation's own; None: that one.
        examples: how many training exchanges stand before a conversation.
    """

    name: str
    folder: Path
    gguf: Path
    kind: str = KINDS[0]
    system_prompt: str | None = None
    examples: int = 0

    def identity(self, train: Path) -> str:
        """SHA-256 of the GGUF, and of what stands before a question where anything does; examples are those of the
        prepared training split `train`."""
        gguf, data = sha256_file(self.gguf), split_sha256(train) if self.examples else ""
        before = f"{self.kind} {self.examples} {data} {self.system_prompt}"
        return gguf if self.kind == KINDS[0] else hashlib.sha256(f"{gguf} {before}".encode()).hexdigest()

    def weights_sha256(self) -> str:
        """Hash of the folder's weights and configuration. Raises UserError if there are none."""
        files = [*sorted(self.folder.glob("*.safetensors")), self.folder / "config.json"]
        if len(files) == 1 or not files[-1].is_file():
            raise UserError(f"{self.folder} holds no model: run `dvc repro`, or `dvc pull` where it was made elsewhere")
        return hashlib.sha256("".join(file.name + sha256_file(file) for file in files).encode()).hexdigest()


def find_champion(record: Path) -> Contender | None:
    """The champion that the JSON file `record` names; None before there is one. Raises UserError if its files are
    missing or are not those that were promoted."""
    champion = read_json(record)
    if champion.get("version") is None:
        return None
    folder = champion_folder(record)
    context = {key: champion[key] for key in ("kind", "system_prompt", "examples") if key in champion}
    found = Contender("champion", folder / "merged", folder / "package" / "model.gguf", **context)
    if not (found.folder / "config.json").is_file() or not found.gguf.is_file():
        raise UserError(f"the champion's files are missing in {folder}: run `dvc pull {folder}`")
    for key, file in (("gguf_sha256", found.gguf), ("merged_sha256", found.folder / "model.safetensors")):
        if champion.get(key) and not (file.is_file() and sha256_file(file) == champion[key]):
            raise UserError(f"{file} is not the file that was promoted: run `dvc checkout --force {folder}`")
    return found


def of_kind(kind: str, base: Contender, candidate: Contender, settings: EvaluateSettings) -> Contender:
    """The candidate as a version of a kind, with the system prompt and examples of evaluate.prompting_baselines. Raises
    UserError if neither a system prompt nor examples are set, so the kind is none of its own."""
    prompting = settings.prompting_baselines
    system_prompt = prompting.system_prompt if kind == PROMPT else None
    if kind in (PROMPT, ADAPTER_EXAMPLES) and not (prompting.examples or system_prompt):
        raise UserError(f"evaluate.kind = {kind} needs evaluate.prompting_baselines.examples: set it in params.yaml")
    return as_kind({"name": kind, "system_prompt": system_prompt, "examples": prompting.examples}, base, candidate)


def as_kind(kind: Mapping[str, Any], base: Contender, candidate: Contender) -> Contender:
    """The candidate as a version of a kind: "name", "system_prompt" and "examples", as metrics/evaluation.json says."""
    if kind["name"] not in (PROMPT, ADAPTER_EXAMPLES):
        return candidate
    files = {"folder": base.folder, "gguf": base.gguf} if kind["name"] == PROMPT else {}
    shown = {"system_prompt": kind.get("system_prompt"), "examples": kind.get("examples", 0)}
    return replace(candidate, kind=kind["name"], **shown, **files)


class ProjectName(Settings):
    """Of section `deploy`, what this project's models are called."""

    model_config = ConfigDict(extra="ignore")

    name: str


def check_references(references: Sequence[str], base: Path, record: Path, name: str) -> None:
    """See that authors of references are people, or models that are neither compared nor made here.

    Args:
        base: folder of the base, whose base.json says what it is.
        record: models/champion.json.
        name: `deploy.name`, under which this project's versions are registered and deployed.

    Raises:
        UserError: they are not.
    """
    if old := [author for author in references if author in ("liked", "edited", "imported", "unknown")]:
        raise UserError(
            f"evaluate.references names {', '.join(old)}, which do not say who wrote a reply: write [person] in "
            "params.yaml, and beside it the names of models that are worth learning from"
        )
    is_compared = compared_models(base, record, name)
    if own := [author for author in references if is_compared(author)]:
        raise UserError(
            f"evaluate.references names {', '.join(own)}, which is itself compared or was made here, and its own words "
            "favour it: take it out in params.yaml"
        )


def compared_models(base: Path, record: Path, name: str) -> Callable[[str], bool]:
    """Whether an author's name is that of a model which is compared, or was made here; see `check_references`."""
    card, champion = (read_json(path) if path.is_file() else {} for path in (base / "base.json", record))
    families, bases = {name, champion.get("name")}, [str(card.get("model"))]
    if bases[0].startswith("package:"):
        with suppress(UserError):
            bases.append(str(locate_base(bases[0], None).gguf_file))

    def is_compared(author: str) -> bool:
        # name:3 and name:live, a registry's models:/name/3, the files that the app runs
        if families & set(re.split("[:/@]", author)) or author.startswith("models/"):
            return True
        words = _words(author)
        return bool(words) and any(_words(one)[: len(words)] == words for one in bases)

    return is_compared


def _words(model: str) -> list[str]:
    """Words and numbers of a model's name that tell models apart: SmolLM2-135M-Instruct is Ollama's smollm2:135m."""
    name = Path(model.removeprefix("package:").lower()).name
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?", _VARIANT.sub(" ", name))
