"""Base, champion and candidate on the same frozen suite: one record for each of them and each item.

Scores depend on the model's bytes, the suite, a few settings and this code; they are kept under a hash of all that, so
that the same base is scored on the same items once.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fine_tuning.common.project import sha256_file
from fine_tuning.data_collection.personal_data.people import Find
from fine_tuning.evaluation.records.measurements import GUARDS, Metrics, describe, guard_metrics, left_out, summarise
from fine_tuning.evaluation.records.record_types import FEW_SHOT, PROMPTED, Item, Likelihood, Reply, conversation_of
from fine_tuning.evaluation.records.settings import EvaluateSettings, IntervalSettings
from fine_tuning.evaluation.scoring.memo import Memo
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, quantised_likelihoods, replies, scoring_hardware
from fine_tuning.evaluation.suite.contenders import Contender
from fine_tuning.evaluation.suite.examples import Exchanges
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge, reading, text_items
from fine_tuning.evaluation.suite.histories import prompt_lines, swapped_histories
from fine_tuning.evaluation.suite.items import chat_format, encoded_anew, sample, suite_sha256
from fine_tuning.evaluation.suite.memorisation import memory_items, recalled
from fine_tuning.evaluation.suite.preferences import preference_items, preference_lines
from fine_tuning.evaluation.suite.privacy import personal_data
from fine_tuning.evaluation.suite.prompting_baselines import with_examples, with_system_prompt
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import ChatSettings, encode_prompt, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Results:
    """What the models were found to do: records, lines of the guards by file, lines of memory.jsonl, and the replies of
    each contender to the test prompts."""

    records: list[dict[str, Any]] = field(default_factory=list)
    guarded: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in GUARDS})
    memory: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, list[Reply]] = field(default_factory=dict)

    def table(self, metrics: Metrics, settings: IntervalSettings) -> dict[str, dict[str, Any]]:
        """{contender: {metric: {value, low, high, n}}}"""
        by_name: dict[str, list[dict[str, Any]]] = {}
        for line in self.records:
            by_name.setdefault(line["contender"], []).append(line)
        found = {name: summarise(lines, metrics, settings) for name, lines in by_name.items()}
        for name, row in guard_metrics(self.guarded, settings.confidence).items():
            found[name] |= row
        return found

    def answer_lines(self, prompts: Sequence[str], find_people: Find | None) -> list[dict[str, Any]]:
        """Lines of prompts.jsonl: each test prompt with every contender's reply and the personal data in it."""

        def line(prompt: str, reply: Reply) -> dict[str, Any]:
            return asdict(reply) | {"personal_data": personal_data(reply.text, prompt, find_people)}

        return [
            {"prompt": prompt, "replies": {name: line(prompt, its[index]) for name, its in self.answers.items()}}
            for index, prompt in enumerate(prompts)
        ]


class Evaluator:
    """Runs contenders over one suite: those that share a tokenizer, and in `run` any.

    Args:
        items: the suite, encoded with `tokenizer`.
        chat: the system prompt, and the tokens of the longest item; replies come on top.
        memo: folder of earlier results.
        find_people: finds names, addresses and dates of birth in replies.
        pairs: held-out pairs of a preferred and another reply.
        is_compared: whether a reply's author is one of the models that are compared.
    """

    def __init__(
        self,
        items: Sequence[Item],
        tokenizer: "PreTrainedTokenizerFast",
        chat: ChatSettings,
        settings: EvaluateSettings,
        memo: Path,
        find_people: Find | None = None,
        pairs: Sequence[dict[str, Any]] = (),
        is_compared: Callable[[str], bool] = bool,
    ) -> None:
        self.items = items
        self.tokenizer = tokenizer
        self.chat = chat
        self.settings = settings
        self.suite = suite_sha256(items, tokenizer)
        self.prompts = [
            encode_prompt(tokenizer, [{"role": "user", "content": text}], chat.system_prompt)
            for text in settings.test_prompts
        ]
        longest = max([chat.max_length, *(len(prompt) for prompt in self.prompts)])
        self.context = longest + settings.generation.max_tokens
        self.hardware = scoring_hardware(settings.threads)
        self.memo = Memo(memo)
        self.find_people = find_people
        self.pairs = pairs
        self.is_compared = is_compared

    def run(self, base: Contender, champion: Contender | None, candidate: Contender, train: Path) -> Results:
        """Everything that is asked of base, champion and candidate; `train` is the prepared training split."""
        found = Results()
        for contender in filter(None, (base, champion, candidate)):
            own = self._with_tokenizer_of(contender)
            if own.items:
                lines, found.answers[contender.name] = own.evaluate(contender)
                found.records += lines
                for name, guarded in own.guard_lines(contender).items():
                    found.guarded[name] += guarded
            asked = {item.id for item in own.items}
            missing = [item for item in self.items if item.id not in asked]
            found.records += [left_out(contender.name, item) for item in missing]
            if missing:
                print(
                    f"evaluate: {contender.name} is not asked {len(missing)} of {len(self.items)} windows: its chat "
                    f"template refuses them or {self.chat.max_length} of its tokens do not hold them"
                )
        found.records += self.score_quantised(candidate) + self.score_prompting_baselines(base, train)
        found.memory = [line for contender in (base, candidate) for line in self.recall(contender, train)]
        return found

    def _with_tokenizer_of(self, contender: Contender) -> "Evaluator":
        own = load_tokenizer(contender.folder)
        if chat_format(own) == chat_format(self.tokenizer):
            return self
        items = encoded_anew(self.items, own, self.chat.max_length)
        more = self.memo.folder, self.find_people, self.pairs, self.is_compared
        return Evaluator(items, own, self.chat, self.settings, *more)

    def describe_suite(self) -> dict[str, Any]:
        """Identity and size of the suite, for metrics/evaluation.json."""
        return {
            "sha256": self.suite,
            "conversations": len({conversation_of(item.id) for item in self.items}),
            "windows": len(self.items),
            "clusters": len({item.cluster for item in self.items}),
        }

    def evaluate(self, contender: Contender) -> tuple[list[dict[str, Any]], list[Reply]]:
        """Records of the contender's items, and its replies to the test prompts."""
        scores = self.score(contender, self.items)
        asked = sample([item for item in self.items if item.references], self.settings.generation.items)
        answers = self.answer(contender, [*(item.prompt_ids(item.asked) for item in asked), *self.prompts])
        by_id = {item.id: reply for item, reply in zip(asked, answers, strict=False)}
        records = []
        for item, score in zip(self.items, scores, strict=True):
            line = self._line(contender.name, item, score, by_id.get(item.id))
            if "predictions" in line:
                prompt = self.tokenizer.decode(item.prompt_ids(item.asked))
                line["personal_data"] = personal_data(line["predictions"], prompt, self.find_people)
            records.append(line)
        return records, answers[len(asked) :]

    def guard_lines(self, contender: Contender) -> dict[str, list[dict[str, Any]]]:
        """Lines of the file of each of MEASURES, by its stem; none of what is switched off."""
        name, found = contender.name, {guard: [] for guard in GUARDS}
        if self.settings.forgetting:
            items = general_items(self.tokenizer, self.chat.system_prompt, self.chat.max_length)
            found["general"] = knowledge(name, items, self.score(contender, items, "general knowledge"))
            items = text_items(self.tokenizer)
            found["general_text"] = reading(name, items, self.score(contender, items, "general text"))
        count, longest = self.settings.other_histories, 2 * self.chat.max_length
        swaps = swapped_histories(self.items, count, self.tokenizer, longest)
        items = [item for swap in swaps for item in swap.variants]
        found["prompt_help"] = prompt_lines(name, swaps, self.score(contender, items, "other histories"))
        items = preference_items(self.pairs, self.tokenizer, self.chat.system_prompt, self.chat.max_length)
        found |= preference_lines(name, self.pairs, items, self.score(contender, items, "pairs"), self.is_compared)
        return found

    def score_prompting_baselines(self, base: Contender, train: Path) -> list[dict[str, Any]]:
        """Records of the base with another system prompt, and with examples out of the prepared split `train`."""
        chosen, longest = self.settings.prompting_baselines, 2 * self.chat.max_length
        items = [item for item in self.items if item.references]
        asked = {}
        if chosen.system_prompt is not None:
            asked[PROMPTED] = with_system_prompt(items, chosen.system_prompt, self.tokenizer, longest)
        if chosen.examples and chosen.items:
            some = sample(items, chosen.items)
            asked[FEW_SHOT] = with_examples(some, Exchanges.read(train), chosen.examples, self.tokenizer, longest)
        return [
            self._line(name, item, score, None)
            for name, found in asked.items()
            for item, score in zip(found, self.score(base, found, name.replace("_", " ")), strict=True)
        ]

    def recall(self, contender: Contender, train: Path) -> list[dict[str, Any]]:
        """What the contender memorised of the prepared split `train`: lines of memory.jsonl."""
        count, chat = self.settings.memory.conversations, self.chat
        items = memory_items(train, count, self.tokenizer, chat.system_prompt, chat.max_length)
        return recalled(contender.name, items, self.score(contender, items, "memory"))

    def score(self, contender: Contender, items: Sequence[Item], what: str = "scores") -> list[Likelihood]:
        """Likelihood of every item's replies by the contender's folder."""

        def compute() -> list:
            with (
                loaded(contender.folder, self.hardware) as model,
                self._progress(contender, what, len(items), "conversation") as done,
            ):
                return [score.as_json() for score in likelihoods(model, items, self.settings.batch_tokens, done)]

        if not items:
            return []
        suite = suite_sha256(items, self.tokenizer)
        key = ["likelihoods", contender.weights_sha256(), suite, self.settings.batch_tokens, asdict(self.hardware)]
        return [Likelihood.from_json(turns) for turns in self.memo.get(key, compute)]

    def score_quantised(self, contender: Contender) -> list[dict[str, Any]]:
        """Records of a sample of the items, scored by the contender's GGUF in llama.cpp, as `<name>_quantised`."""
        chosen = sample([item for item in self.items if item.references], self.settings.quantised_items)

        def compute() -> list:
            count = sum(len(item.runs) for item in chosen)
            with self._engine(contender) as engine, self._progress(contender, "scores as GGUF", count, "turn") as done:
                return [score.as_json() for score in quantised_likelihoods(engine, chosen, done)]

        key = ["quantised", sha256_file(contender.gguf), self.suite, [item.id for item in chosen], *self._engine_key()]
        found = self.memo.get(key, compute) if chosen else []
        return [
            self._line(f"{contender.name}_quantised", item, Likelihood.from_json(turns), None)
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
        key = ["replies", sha256_file(contender.gguf), [list(prompt) for prompt in prompts], most, *self._engine_key()]
        return [Reply(**fields) for fields in self.memo.get(key, compute)]

    def _line(self, contender: str, item: Item, likelihood: Likelihood, reply: Reply | None) -> dict[str, Any]:
        return describe(contender, item, likelihood, reply) | {"suite": self.suite}

    def _engine_key(self) -> list[Any]:
        return [self.context, self.settings.generation.slots, asdict(self.hardware)]

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
