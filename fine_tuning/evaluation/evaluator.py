"""Base, champion and candidate on the same frozen suite: one record for each of them and each item.

Scores depend on the model's bytes, the suite, a few settings and this code; they are kept under a hash of all that, so
that the same base is scored on the same items once.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fine_tuning.common.project import sha256_file
from fine_tuning.common.results import Memo
from fine_tuning.data_collection.personal_data.people import Find
from fine_tuning.evaluation.records.measurements import GUARDS, Metrics, describe, guard_metrics, left_out, summarise
from fine_tuning.evaluation.records.record_types import FEW_SHOT, PROMPTED, Item, Likelihood, Reply, conversation_of
from fine_tuning.evaluation.records.settings import ADAPTER, KINDS, PROMPT, EvaluateSettings, IntervalSettings
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, quantised_likelihoods, replies, scoring_hardware
from fine_tuning.evaluation.suite.contenders import Contender, of_kind
from fine_tuning.evaluation.suite.examples import Exchanges
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge, reading, text_items
from fine_tuning.evaluation.suite.histories import prompt_lines, swapped_histories
from fine_tuning.evaluation.suite.items import after, chat_format, sample, suite_sha256
from fine_tuning.evaluation.suite.memorisation import memory_items, recalled
from fine_tuning.evaluation.suite.preferences import preference_items, preference_lines
from fine_tuning.evaluation.suite.privacy import personal_data
from fine_tuning.evaluation.suite.prompting_baselines import NOTHING, Before, context, with_messages
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import ChatSettings, encode_prompt, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COSTED = 8  # prompts whose latency is measured


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


@dataclass(eq=False)
class Evaluator:
    """Runs contenders over one suite: those that share a tokenizer, and in `run` any.

    Args:
        items: the suite, encoded with `tokenizer`.
        chat: the system prompt, and the tokens of the longest item; replies come on top.
        memo: earlier results.
        find_people: finds names, addresses and dates of birth in replies.
        pairs: held-out pairs of a preferred and another reply.
        is_compared: whether a reply's author is one of the models that are compared.
        before: what stands before every conversation, which `items` have already.
        plain: the items without it; none: the same.
    """

    items: Sequence[Item]
    tokenizer: "PreTrainedTokenizerFast"
    chat: ChatSettings
    settings: EvaluateSettings
    memo: Memo
    find_people: Find | None = None
    pairs: Sequence[dict[str, Any]] = ()
    is_compared: Callable[[str], bool] = bool
    before: Before = NOTHING
    plain: Sequence[Item] = ()

    def __post_init__(self) -> None:
        plain, chat = self.plain or self.items, self.chat
        self.suite, self._plain_items = suite_sha256(plain, self.tokenizer), {item.id: item for item in plain}
        questions = [[{"role": "user", "content": text}] for text in self.settings.test_prompts]
        asked = [after(self.before(question), question) for question in questions]
        self.prompts = [encode_prompt(self.tokenizer, messages, chat.system_prompt) for messages in asked]
        longest = max([chat.max_length, *map(len, self.prompts)])
        self.context = longest + self.settings.generation.max_tokens
        self.hardware = scoring_hardware(self.settings.threads)

    def run(self, base: Contender, champion: Contender | None, candidate: Contender, train: Path) -> Results:
        """Everything that is asked of base, champion and candidate; `train` is the prepared training split."""
        found = Results()
        for contender in filter(None, (base, champion, candidate)):
            own = self._asking(contender, train)
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
        found.records += self._asking(candidate, train).score_quantised(candidate)
        # Other kinds are those baselines: they were compared on validation.
        found.records += self.score_prompting_baselines(base, train) if candidate.kind == ADAPTER else []
        found.memory = [line for contender in (base, candidate) for line in self.recall(contender, train)]
        return found

    def _asking(self, contender: Contender, train: Path) -> "Evaluator":
        """The suite in the tokens of a contender, after what stands before a question."""
        own = load_tokenizer(contender.folder)
        known = chat_format(own) == chat_format(self.tokenizer)
        if known and contender.kind == ADAPTER:
            return self
        chat, before = self.chat, self.before
        plain = items = self.items if known else with_messages(self.items, NOTHING, own, chat.max_length)
        if contender.kind != ADAPTER:
            before = context(contender.system_prompt, Exchanges.read(train), contender.examples)
            chat = chat.model_copy(update={"max_length": 2 * chat.max_length})
            items = with_messages(plain, before, own, chat.max_length)
        pairs = [pair | {"messages": after(before(pair["messages"]), pair["messages"])} for pair in self.pairs]
        return replace(self, items=items, tokenizer=own, chat=chat, pairs=pairs, before=before, plain=plain)

    def choose_kind(self, base: Contender, candidate: Contender, train: Path) -> tuple[Contender, dict[str, Any]]:
        """The candidate as a version of the kind that evaluate.kind names, and what is recorded of the kind.

        For `auto`, this evaluator's items are the validation split: a sample of them, as many as prompting baselines
        are scored on, is scored with each kind, and the one with the fewest nats a token is chosen. Without
        references there it is the adapter: by models' own words the model that wrote them would be chosen.

        Returns:
            (the contender, {"name", "system_prompt", "examples"} and for `auto` "validation": {"n",
            "nats_per_token": {kind: nats}})
        """
        kind, prompting, measured = self.settings.kind, self.settings.prompting_baselines, {}
        if kind == "auto":
            some = sample([item for item in self.items if item.references], prompting.items)
            few = replace(self, items=some)
            without = [ADAPTER, PROMPT] if prompting.system_prompt else [ADAPTER]
            possible = (KINDS if prompting.examples else without) if some else ()
            kinds = [of_kind(name, base, candidate, self.settings) for name in possible]
            scored = {one.kind: few._nats_per_token(one, train) for one in kinds}
            nats = {name: value for name, value in scored.items() if value is not None}
            kind = min(nats, key=lambda name: (nats[name], KINDS.index(name)), default=ADAPTER)
            measured = {"validation": {"n": len(some), "nats_per_token": nats}}
        chosen = of_kind(kind, base, candidate, self.settings)
        return chosen, {"name": kind, "system_prompt": chosen.system_prompt, "examples": chosen.examples} | measured

    def _nats_per_token(self, contender: Contender, train: Path) -> float | None:
        """Of the references; None where the chat template refuses some with what stands before them."""
        own = self._asking(contender, train)
        if len(own.items) < len(self.items):
            return None
        scores = own.score(contender, own.items, f"validation, {contender.kind}")
        turns = [s[place] for item, s in zip(own.items, scores, strict=True) for place in item.references]
        nats, tokens, _ = zip(*turns, strict=True)
        return None if None in nats else float(sum(nats) / sum(tokens))

    def cost(self, contender: Contender, train: Path) -> dict[str, Any]:
        """What standing examples and system prompt cost: mean tokens of the prompts of references, and the median
        seconds to the first token of its GGUF on up to COSTED of them, without and with what stands before."""
        own = self._asking(contender, train)
        pairs = [(self._plain_items[item.id], item) for item in own.items if item.references]
        prompts = [[item.prompt_ids(item.asked) for item in pair] for pair in pairs]
        few = prompts[:COSTED]

        def compute() -> list:
            def seconds(prompt: Sequence[int]) -> float:
                started = time.monotonic()
                engine.complete(prompt, 1)
                return time.monotonic() - started

            with own._engine(contender) as engine:
                engine.complete(few[0][0][-8:], 1)  # the first one also warms up
                return [[seconds(prompt) for prompt in column] for column in zip(*few, strict=True)]

        if not few:
            return {}
        key = ["cost", sha256_file(contender.gguf), few, *own._engine_key()]
        waited = self.memo.get(key, compute)
        return {
            "prompt_tokens": [statistics.fmean(map(len, column)) for column in zip(*prompts, strict=True)],
            "first_token_seconds": [round(statistics.median(column), 3) for column in waited],
        }

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
                asked_alone = self._plain_items[item.id].prompt_ids(item.asked)  # examples are others' words
                prompt = self.tokenizer.decode(asked_alone)
                line["personal_data"] = personal_data(line["predictions"], prompt, self.find_people)
            records.append(line)
        return records, answers[len(asked) :]

    def guard_lines(self, contender: Contender) -> dict[str, list[dict[str, Any]]]:
        """Lines of the file of each of MEASURES, by its stem; none of what is switched off."""
        name, found = contender.name, {guard: [] for guard in GUARDS}
        if self.settings.forgetting:
            items = general_items(self.tokenizer, self.chat.system_prompt, self.chat.max_length, self.before)
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
            asked[PROMPTED] = with_messages(items, context(chosen.system_prompt), self.tokenizer, longest)
        if chosen.examples and chosen.items:
            some, before = sample(items, chosen.items), context(None, Exchanges.read(train), chosen.examples)
            asked[FEW_SHOT] = with_messages(some, before, self.tokenizer, longest)
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
                return likelihoods(model, items, self.settings.batch_tokens, done)

        if not items:
            return []
        suite = suite_sha256(items, self.tokenizer)
        key = ["likelihoods", contender.weights_sha256(), suite, self.settings.batch_tokens, asdict(self.hardware)]
        return self.memo.get(key, compute)

    def score_quantised(self, contender: Contender) -> list[dict[str, Any]]:
        """Records of a sample of the items, scored by the contender's GGUF in llama.cpp, as `<name>_quantised`."""
        chosen = sample([item for item in self.items if item.references], self.settings.quantised_items)

        def compute() -> list:
            count = sum(len(item.runs) for item in chosen)
            with self._engine(contender) as engine, self._progress(contender, "scores as GGUF", count, "turn") as done:
                return quantised_likelihoods(engine, chosen, done)

        suite = suite_sha256(chosen, self.tokenizer)
        key = ["quantised", sha256_file(contender.gguf), suite, *self._engine_key()]
        found = self.memo.get(key, compute) if chosen else []
        name = f"{contender.name}_quantised"
        return [self._line(name, item, score, None) for item, score in zip(chosen, found, strict=True)]

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
