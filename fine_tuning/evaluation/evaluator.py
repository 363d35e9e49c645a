"""Base, champion and candidate on the same frozen suite: one record for each of them and each item.

Scores depend on the model's bytes, the suite, a few settings and this code; they are kept under a hash of all that, so
that the same base is scored on the same items once.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from fine_tuning.errors import UserError
from fine_tuning.evaluation.items import Item, sample
from fine_tuning.evaluation.llama_engine import LlamaEngine
from fine_tuning.evaluation.metrics import LIKELIHOOD_COLUMNS, ItemwiseMetric, SummedMetric, columns_of
from fine_tuning.evaluation.scoring import (
    Likelihood,
    Reply,
    finite,
    likelihoods,
    loaded,
    quantised_likelihoods,
    replies,
    scoring_hardware,
)
from fine_tuning.evaluation.statistics import Resampling, bootstrap, interval
from fine_tuning.project import sha256_file
from fine_tuning.records import read_json, write_json
from fine_tuning.settings import Settings


class GenerationSettings(Settings):
    """Section `evaluate.generation`."""

    items: int = Field(ge=0)
    max_tokens: int = Field(ge=1)
    slots: int = Field(ge=1)


class IntervalSettings(Settings):
    """Section `evaluate.interval`."""

    draws: int = Field(ge=100)
    confidence: float = Field(gt=0.5, lt=1)
    seed: int


class EvaluateSettings(Settings):
    """Section `evaluate` of params.yaml."""

    metrics: list[str] = Field(min_length=1)
    batch_tokens: int = Field(ge=1)
    threads: int | None = Field(ge=1)
    generation: GenerationSettings
    quantised_items: int = Field(ge=0)
    forgetting: bool
    interval: IntervalSettings
    test_prompts: list[str]


# -----------------------------------------------------------------------------
# contenders


@dataclass(frozen=True)
class Contender:
    """A model in its two forms: the folder that is scored and the GGUF that replies."""

    name: str
    folder: Path
    gguf: Path

    def weights_sha256(self) -> str:
        """Hash of the folder's weights and configuration.

        Raises:
            UserError: there are none.
        """
        files = [*sorted(self.folder.glob("*.safetensors")), self.folder / "config.json"]
        if len(files) == 1 or not files[-1].is_file():
            raise UserError(f"{self.folder} holds no model: run `dvc repro`, or `dvc pull` where it was made elsewhere")
        return hashlib.sha256("".join(file.name + sha256_file(file) for file in files).encode()).hexdigest()


def find_champion(record: Path, folder: Path) -> Contender | None:
    """The champion that the JSON file `record` names, with its files below `folder`; None before there is one.

    Raises:
        UserError: its files are missing or are not those that were promoted.
    """
    champion = read_json(record)
    if champion.get("version") is None:
        return None
    found = Contender("champion", folder / "merged", folder / "package" / "model.gguf")
    if not (found.folder / "config.json").is_file() or not found.gguf.is_file():
        raise UserError(f"the champion's files are missing in {folder}: run `dvc pull {folder}`")
    expected = champion.get("gguf_sha256")
    if expected and sha256_file(found.gguf) != expected:
        raise UserError(f"{found.gguf} is not the file that was promoted: run `dvc checkout --force {folder}`")
    return found


# -----------------------------------------------------------------------------
# scores


class Evaluator:
    """Runs contenders over one suite.

    Args:
        items: the suite, all encoded with the same tokenizer.
        suite: its identity.
        prompts: token ids of further prompts that every contender answers.
        context: tokens of the longest item; replies come on top.
        memo: folder of earlier results.
    """

    def __init__(
        self,
        items: Sequence[Item],
        suite: str,
        prompts: Sequence[Sequence[int]],
        context: int,
        settings: EvaluateSettings,
        memo: Path,
    ) -> None:
        self.items = items
        self.suite = suite
        self.prompts = prompts
        self.settings = settings
        self.hardware = scoring_hardware(settings.threads)
        self.context = max([context, *(len(prompt) for prompt in prompts)]) + settings.generation.max_tokens
        self.memo = Memo(memo)

    def evaluate(self, contender: Contender) -> tuple[list[dict[str, Any]], list[Reply]]:
        """Records of the contender's items, and its answers to the further prompts."""
        scores = self.score(contender, self.items, self.suite)
        asked = sample([item for item in self.items if item.references], self.settings.generation.items)
        answers = self.answer(contender, [*(item.prompt_ids(item.asked) for item in asked), *self.prompts])
        by_id = {item.id: reply for item, reply in zip(asked, answers, strict=False)}
        records = [
            describe(contender.name, item, score, by_id.get(item.id))
            for item, score in zip(self.items, scores, strict=True)
        ]
        return records, answers[len(asked) :]

    def score(self, contender: Contender, items: Sequence[Item], suite: str, what: str = "scores") -> list[Likelihood]:
        """Likelihood of every item's replies by the contender's folder; `suite` identifies the items."""

        def compute() -> list:
            with (
                loaded(contender.folder, self.hardware) as model,
                self._progress(contender, what, len(items), "conversation") as done,
            ):
                return [score.as_json() for score in likelihoods(model, items, self.settings.batch_tokens, done)]

        # Not the number of threads: it moves the last digits only.
        key = ["likelihoods", contender.weights_sha256(), suite, self.hardware.precision, self.hardware.device]
        return [Likelihood.from_json(turns) for turns in self.memo.get(key, compute)]

    def score_quantised(self, contender: Contender) -> list[dict[str, Any]]:
        """Records of a sample of the items, scored by the contender's GGUF in llama.cpp, as `<name>_quantised`."""
        chosen = sample([item for item in self.items if item.references], self.settings.quantised_items)

        def compute() -> list:
            count = sum(len(item.runs) for item in chosen)
            with self._engine(contender) as engine, self._progress(contender, "scores as GGUF", count, "turn") as done:
                return [score.as_json() for score in quantised_likelihoods(engine, chosen, done)]

        key = ["quantised", sha256_file(contender.gguf), self.suite, [item.id for item in chosen]]
        found = self.memo.get(key, compute) if chosen else []
        return [
            describe(f"{contender.name}_quantised", item, Likelihood.from_json(turns), None)
            for item, turns in zip(chosen, found, strict=True)
        ]

    def answer(self, contender: Contender, prompts: Sequence[Sequence[int]]) -> list[Reply]:
        """Greedy replies of the contender's GGUF."""
        most = self.settings.generation.max_tokens

        def compute() -> list:
            count = len(prompts)
            with self._engine(contender) as engine, self._progress(contender, "answers", count, "prompt") as done:
                return [asdict(reply) for reply in replies(engine, prompts, most, done)]

        if not prompts:
            return []
        key = ["replies", sha256_file(contender.gguf), [list(prompt) for prompt in prompts], most, self.context]
        return [Reply(**fields) for fields in self.memo.get(key, compute)]

    def _engine(self, contender: Contender) -> LlamaEngine:
        return LlamaEngine(contender.gguf, self.context, self.hardware.threads, self.settings.generation.slots)

    @contextlib.contextmanager
    def _progress(self, contender: Contender, what: str, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
        """A bar on a terminal, one line at the end elsewhere."""
        started = time.monotonic()
        with tqdm(total=total, desc=f"evaluate: {contender.name} {what}", unit=unit, disable=None) as bar:
            yield bar.update
        if bar.disable:
            seconds = time.monotonic() - started
            print(f"evaluate: {contender.name} {what}: {total} {unit}s in {seconds:.0f} s", flush=True)


def describe(contender: str, item: Item, likelihood: Likelihood, reply: Reply | None) -> dict[str, Any]:
    """One line of the records: all that metrics, slices and the report need about one contender and one item.

    The columns of the metrics cover references alone and are absent where an item has none; `turns` covers all.
    """
    turns = [
        {
            "author": author,
            "reference": index in item.references,
            "nll": finite(nll),
            "tokens": tokens,
            "correct": correct,
            "bytes": len(text.encode("utf-8", "surrogatepass")),
        }
        for index, (author, text, (nll, tokens, correct)) in enumerate(
            zip(item.authors, item.texts, likelihood.turns, strict=True)
        )
    ]
    line: dict[str, Any] = {
        "contender": contender,
        "id": item.id,
        "source": item.source,
        "cluster": item.cluster,
        "length": len(item.input_ids),
        "turns": turns,
        **likelihood_columns([turn for turn in turns if turn["reference"]]),
    }
    if reply is not None:
        line |= {"predictions": reply.text, "references": item.texts[item.asked]}
        line |= {"finished": reply.finished, "reply_tokens": reply.tokens}
    return line


def left_out(contender: str, item: Item) -> dict[str, Any]:
    """The line of an item that the contender cannot be asked: it has no columns, so no metric counts it."""
    return {"contender": contender, "id": item.id, "source": item.source, "cluster": item.cluster, "turns": []}


def likelihood_columns(turns: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    """Sums over turns, {} over none; null where a term is."""
    if not turns:
        return {}
    return {
        name: None if any(turn[name] is None for turn in turns) else sum(turn[name] for turn in turns)
        for name in LIKELIHOOD_COLUMNS
    }


class Memo:
    """Results on disk under a hash of all that they depend on, so that the same base is scored once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The JSON value stored under `key`, or that of `compute()`, stored. `key` names versions and inputs."""
        name = hashlib.sha256(json.dumps([code_version(), *key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}.json"
        try:
            value = read_json(path)
        except (OSError, ValueError):
            value = compute()
            write_json(path, value)
            return read_json(path)
        return value


def code_version() -> str:
    """Hash of the code that scores and of the libraries under it."""
    digest = hashlib.sha256()
    for name in ("evaluator.py", "scoring.py", "items.py", "llama_engine.py", "llama_server.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    for package in ("torch", "transformers", "xllamacpp"):
        digest.update(f"{package}={importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# metrics


Metrics = Sequence[SummedMetric | ItemwiseMetric]


def summarise(records: Sequence[dict[str, Any]], metrics: Metrics, settings: IntervalSettings) -> dict[str, dict]:
    """{metric: {value, low, high, n}} of one contender's records; n counts conversations, null where undefined."""
    table: dict[str, dict] = {}
    for metric in metrics:
        columns = columns_of(metric)
        usable = [line for line in records if all(column in line for column in columns)]
        if not usable:
            continue
        statistics = metric.statistics(**{column: [line[column] for line in usable] for column in columns})
        resampling = Resampling.over([line["cluster"] for line in usable], settings.draws, settings.seed)
        for name, (value, draws) in bootstrap(metric.values, statistics, resampling).items():
            found = asdict(interval(value, draws, settings.confidence, resampling.clusters))
            table[name] = {key: finite(number) for key, number in found.items()} | {"n": len(usable)}
    return table
