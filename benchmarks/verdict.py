"""How often the verdict is wrong: simulations from the records of a real evaluation, printed as Markdown tables.

    python -m benchmarks.verdict                        # every simulation
    python -m benchmarks.verdict intervals own-words    # some of them; --list names them
    python -m benchmarks.verdict --runs 4000            # more runs of each: surer rates, more time
    python -m benchmarks.verdict shuffled-replies       # trains three adapters, some ten minutes: only if it is named
    python -m benchmarks.verdict shuffled-replies --train-tokens 10000 --threads 1

It needs the records of `dvc repro` (data/evaluation), shuffled-replies its data and its base (data/prepared,
models/base) as well. Runs with the same seed print the same numbers.
"""

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, t

from fine_tuning.common.errors import UserError, run
from fine_tuning.common.records import read_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.data_preparation.authorship import is_by_a_person
from fine_tuning.evaluation.learning_curve import score_adapter
from fine_tuning.evaluation.metric_modules.loading import columns_of, direction, load_metric
from fine_tuning.evaluation.records.measurements import (
    by_contender,
    describe,
    estimates,
    golden_lead,
    right_probability,
)
from fine_tuning.evaluation.records.record_types import Item, Likelihood, labelled_replies
from fine_tuning.evaluation.records.settings import EvaluateSettings, IntervalSettings
from fine_tuning.evaluation.records.statistics import Estimate, Resampling
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.forgetting import ANSWERS, SUITE, general_items, knowledge, reading, text_items
from fine_tuning.evaluation.suite.histories import prompt_lines, swapped_histories
from fine_tuning.evaluation.suite.items import label_runs, read_items
from fine_tuning.evaluation.verdict.comparison import CompareSettings, compare
from fine_tuning.evaluation.verdict.differences import Difference, non_inferiority
from fine_tuning.evaluation.verdict.guards import forgotten
from fine_tuning.schema.chat_format import ChatSettings, encode_conversation, load_tokenizer
from fine_tuning.schema.prepared import PreparedRow, read_rows
from fine_tuning.training.settings import TrainSettings

LEAD = 4.0  # nats, compare.golden_lead
MODULES = Path(__file__).parents[1] / "fine_tuning/evaluation/metric_modules"


@dataclass(frozen=True)
class Context:
    """What a simulation may use. `runs` is the number of simulated comparisons a row; `seed` makes them repeatable."""

    folder: Path
    runs: int
    seed: int
    intervals: IntervalSettings
    train_tokens: int | None = None  # of the adapters that shuffled-replies trains; None: all
    threads: int | None = None

    def rng(self, *keys: int) -> np.random.Generator:
        """A generator of its own for a simulation, or a row of one."""
        return np.random.default_rng([self.seed, *keys])

    @property
    def root(self) -> Path:
        """The checkout that the records belong to."""
        return self.folder.resolve().parents[1]

    def resampling(self, size: int) -> Resampling:
        """Draws over so many clusters."""
        return Resampling.over([f"{index:05d}" for index in range(size)], self.intervals.draws, self.seed)

    def records(self, *contenders: str) -> list[dict[str, Any]]:
        """Lines of items.jsonl, of the contenders named (all if none is)."""
        lines = read_lines(self.folder / "items.jsonl")
        return [line for line in lines if not contenders or line["contender"] in contenders]


Row = dict[str, Any]
SIMULATIONS: dict[str, Callable[[Context], list[Row]]] = {}
TRAINS: set[str] = set()  # simulations that train, run only where they are named


def simulation(
    name: str, trains: bool = False
) -> Callable[[Callable[[Context], list[Row]]], Callable[[Context], list[Row]]]:
    """Register a function that returns the rows of one table; its docstring stands above the table."""

    def register(function: Callable[[Context], list[Row]]) -> Callable[[Context], list[Row]]:
        SIMULATIONS[name] = function
        TRAINS.update({name} if trains else ())
        return function

    return register


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of the evaluation.

    Raises:
        UserError: there has been no evaluation.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro evaluate`, or `dvc pull` where it was made elsewhere")
    return list(read_jsonl(path))


def metrics(*names: str) -> list[Any]:
    """The metric modules of these names."""
    return [load_metric(name, MODULES) for name in names]


# -----------------------------------------------------------------------------
# intervals and requirements, on resampled records

LEVELS = (0.025, 0.0025)  # one-sided: of a single look, and of one of twenty or so at the same test split
SIZES = (20, 50, 100)


@dataclass(frozen=True)
class Paired:
    """A metric's sums for each cluster, of candidate and base; a simulated test split draws clusters of these."""

    metric: Any
    sums: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, metric: Any, records: Sequence[Row]) -> "Paired":
        """From the lines of candidate and base."""
        columns = columns_of(metric)
        by_id = [
            {line["id"]: line for line in records if line["contender"] == name and set(columns) <= line.keys()}
            for name in ("candidate", "base")
        ]
        ids = sorted(by_id[0].keys() & by_id[1].keys())
        clusters = Resampling.over([by_id[0][id]["cluster"] for id in ids], 1, 0)
        tables = (metric.statistics(**{c: [lines[id][c] for id in ids] for c in columns}) for lines in by_id)
        return cls(metric, tuple(clusters.totals(table.astype(float)) for table in tables))

    def drawn(self, rng: np.random.Generator, size: int, swapped: bool = False) -> list[np.ndarray]:
        """The sums of `size` clusters; with `swapped` a coin decides for each which model is which: they are equal."""
        chosen = rng.integers(0, len(self.sums[0]), size)
        ours, theirs = (part[chosen] for part in self.sums)
        if swapped:
            turned = rng.random(size)[:, None] < 0.5
            ours, theirs = np.where(turned, theirs, ours), np.where(turned, ours, theirs)
        return [ours, theirs]


@simulation("intervals")
def intervals(context: Context) -> list[Row]:
    """How often an end of the interval of a gain lies beyond the true gain, in per cent; in brackets what it should be.
    "Too high" promotes what is no gain, "too low" holds what is one. The population are the clusters of the records,
    candidate against base (perplexity as its logarithm); test splits are drawn from it with replacement.
    """
    records, rows = context.records("candidate", "base"), []
    modules = {"perplexity": "perplexity", "nll_per_byte": "nll_per_byte", "token_accuracy": "token_accuracy"}
    for number, (name, module) in enumerate((modules | {"rougeL": "rouge", "bleu": "bleu", "chrf": "chrf"}).items()):
        (metric,) = metrics(module)
        paired, sign = Paired.of(metric, records), direction(metric, name)
        whole = [part.sum(axis=0, keepdims=True) for part in paired.sums]
        truth = estimates(metric, whole, Resampling.over(["all"], 1, 0))[name].value
        runs = max(1, context.runs // (20 if module in ("bleu", "chrf") else 1))  # a hundred times slower than others
        for size in SIZES:
            rng, resampling = context.rng(number, size), context.resampling(size)
            missed: dict[str, np.ndarray] = {}
            for _ in range(runs):
                for method, found in methods(metric, name, paired.drawn(rng, size), resampling).items():
                    bounds = [found.interval(1 - 2 * level) for level in LEVELS]
                    beyond = [[bound.low > truth, bound.high < truth][::sign] for bound in bounds]
                    missed[method] = missed.get(method, 0) + np.array(beyond).ravel()
            for method, counts in missed.items():
                row = {"metric": name, "clusters": size, "interval": method}
                heads = [f"{end} ({100 * level:g})" for level in LEVELS for end in ("too high", "too low")]
                row |= {head: f"{100 * count / runs:.2f}" for head, count in zip(heads, counts, strict=True)}
                rows.append(row | {"runs": runs})
    return rows


def methods(metric: Any, name: str, statistics: Sequence[np.ndarray], resampling: Resampling) -> dict[str, Estimate]:
    """The interval that the verdict uses, first, and for ratios of sums those that it might use instead."""
    found = estimates(metric, statistics, resampling)[name]
    if not found.studentised:
        return {"percentile": found}
    over, under = metric.ratios[name]
    ours, theirs = (resampling.sums(part) for part in statistics)
    plain = ours[:, over] / ours[:, under] - theirs[:, over] / theirs[:, under]
    return {
        "bootstrap-t": found,
        "Student's t": replace(found, draws=t.ppf((np.arange(4000) + 0.5) / 4000, resampling.clusters - 1)),
        "percentile": replace(found, draws=plain, studentised=False),
    }


@simulation("unchanged")
def unchanged(context: Context) -> list[Row]:
    """How many unchanged models pass a requirement. The two models differ in every cluster as much as candidate and
    base do, and a coin decides which is which, so that neither is better. "Always" is what passes if the loss has to be
    ruled out whatever the number of items; "as it is" has it a requirement only while the standard error is at most a
    third of the margin.
    """
    records, rows = context.records("candidate", "base"), []
    wanted = (("token_accuracy", "token_accuracy", 0.02), ("token_accuracy", "token_accuracy", 0.03))
    for number, (module, name, margin) in enumerate((*wanted, ("rouge", "rougeL", 0.03))):
        (metric,) = metrics(module)
        paired, runs = Paired.of(metric, records), max(1, context.runs // 2)
        for size in (40, 88, 200, 400, 800):
            rng, resampling, counts = context.rng(number, size), context.resampling(size), np.zeros(3)
            for _ in range(runs):
                found = estimates(metric, paired.drawn(rng, size, swapped=True), resampling)[name]
                low, high = (getattr(found.interval(context.intervals.confidence), end) for end in ("low", "high"))
                one = Difference(name, "base", 0.5, 0.5, low, high, found, False, 1, size, size)
                cells, reasons, _ = non_inferiority({"base": {name: one}}, {name: margin})
                cell = cells[name]["base"]
                counts += cell["non_inferior"], not reasons, cell["requirement"]
            row = {"metric": name, "margin": margin, "clusters": size}
            heads = ("always", "as it is", "a requirement in")
            rows.append(row | {head: percent(count / runs) for head, count in zip(heads, counts, strict=True)})
    return rows


# -----------------------------------------------------------------------------
# whose words

NOISE = 0.1  # of a weight matrix's standard deviation: two such models are as far apart as two short trainings
REPLIES = 60
SHARES = {"as A wrote it": 0.0, "1 % of the words edited": 0.01, "10 %": 0.1, "50 %": 0.5, "80 %": 0.8}


@simulation("own-words")
def own_words(context: Context) -> list[Row]:
    """Two equal models, A and B: the base with noise of its own on the weights of each. A's sampled replies to held-out
    questions are all liked, or edited (the end, at least one word, gives way to words of the person's own reply), and
    counted as references: how often is one of the two surely better in perplexity on 50 of them? The last column says
    how many are a reference by the rule that a model has to be named, and that four fifths of an edit's words have to
    be the person's.
    """
    rows = []
    for number, (name, lines, references) in enumerate(scored_edits(context)):
        rng, better, runs = context.rng(number), np.zeros(2), max(1, context.runs // 2)
        paired, resampling = Paired.of(metrics("perplexity")[0], lines), context.resampling(50)
        for _ in range(runs):
            found = estimates(paired.metric, paired.drawn(rng, 50), resampling)["perplexity"].interval(0.95)
            better += found.high < 0, found.low > 0
        row = {"replies": name, "A surely better": percent(better[0] / runs)}
        row |= {"B surely better": percent(better[1] / runs)}
        rows.append(row | {"references": f"{references} of {len(lines) // 2}"})
    return rows


def scored_edits(context: Context) -> Iterator[tuple[str, list[Row], int]]:
    """(name, lines with the scores of A and B, how many are references): persons' replies, then each share of edits."""
    from fine_tuning.evaluation.scoring.scorer import likelihoods

    items, models, tokenizer, said = replies_of_a(context)

    def scored(name: str, texts: Sequence[str], references: int) -> tuple[str, list[Row], int]:
        asked = [item_of(tokenizer, item, text) for item, text in zip(items, texts, strict=True)]
        lines = []
        for contender, one in zip(("candidate", "base"), models, strict=True):
            for item, score in zip(asked, likelihoods(one, asked, 1024), strict=True):
                ((nll, tokens, _),) = score
                about = {"contender": contender, "id": item.id, "cluster": item.cluster}
                lines.append(about | {"nll": nll, "tokens": tokens})
        return name, lines, references

    yield scored("persons' own", [item.texts[-1] for item in items], len(items))
    for name, share in SHARES.items():
        texts = [edited(text, item.texts[-1], share) for text, item in zip(said, items, strict=True)]
        edits = [text if share else None for text in texts]
        yield scored(name, texts, sum(map(is_reference, said, edits)))


def is_reference(reply: str, edit: str | None) -> bool:
    """Whether an edit of a reply of A's is a person's."""
    said = {"id": "a", "role": "assistant", "content": reply, "model": "A"}
    return is_by_a_person({"source": "chat", "messages": [{"id": "q", "role": "user", "content": ""}, said]}, 1, edit)


@simulation("short-edits")
def short_edits(context: Context) -> list[Row]:
    """Persons' own replies to held-out questions, each saved as an edit of what A wrote to the same question: how many
    are references? Nothing of A's was kept; words that both happen to have in the same order count as A's.
    """
    items, _, _, said = replies_of_a(context)
    counts: dict[str, list[bool]] = {"1 to 5": [], "6 to 20": [], "more": []}
    for item, reply in zip(items, said, strict=True):
        own = item.texts[-1]
        words = len(own.split())
        counts["1 to 5" if words <= 5 else "6 to 20" if words <= 20 else "more"].append(is_reference(reply, own))
    return [{"words": name, "edits": len(found), "references": sum(found)} for name, found in counts.items()]


def replies_of_a(context: Context) -> tuple[list[Item], list[Any], Any, list[str]]:
    """(held-out conversations, the models A and B, their tokenizer, what A answers to the last question of each)."""
    from fine_tuning.evaluation.scoring.scorer import loaded, scoring_hardware
    from fine_tuning.evaluation.suite.items import read_items, sample
    from fine_tuning.schema.chat_format import load_tokenizer

    base, test = (context.root / path for path in ("models/base", "data/prepared/test"))
    tokenizer = load_tokenizer(base)
    items = sample(read_items(test, tokenizer), REPLIES)
    with loaded(base, scoring_hardware(None)) as model:
        models = [noisy(model, context.seed + number) for number in range(2)]
    prompts = [item.input_ids[: item.runs[-1][0]] for item in items]
    return items, models, tokenizer, sampled(models[0], tokenizer, prompts, context.seed)


def noisy(model: Any, seed: int) -> Any:
    """A copy of the model with noise on its weight matrices, those of embeddings apart."""
    import torch

    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, weights in copied.named_parameters():
        if weights.dim() == 2 and "embed" not in name and "lm_head" not in name:
            drawn = torch.randn(weights.shape, generator=generator)
            weights.data += NOISE * weights.std() * drawn
    return copied


def sampled(model: Any, tokenizer: Any, prompts: Sequence[list[int]], seed: int) -> list[str]:
    """Replies as the chat app draws them by default."""
    import torch

    torch.manual_seed(seed)
    texts = []
    for start in range(0, len(prompts), 15):
        batch = prompts[start : start + 15]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        options = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "min_new_tokens": 6, "max_new_tokens": 48}
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        texts += [tokenizer.decode(row[width:], skip_special_tokens=True).strip() or "." for row in found]
    return texts


def edited(text: str, own: str, share: float) -> str:
    """The text with this share of its words, if any at least one, replaced at its end by those of a person's own."""
    words = text.split()
    new = int(np.ceil(share * len(words)))
    return " ".join([*words[: len(words) - new], *itertools.islice(itertools.cycle(own.split()), new)])


def item_of(tokenizer: Any, item: Any, reply: str) -> Any:
    """The item with another last reply, which alone is scored."""
    from fine_tuning.evaluation.suite.items import label_runs
    from fine_tuning.schema.chat_format import encode_conversation

    last = max(place for place, message in enumerate(item.messages) if message["role"] == "assistant")
    messages = [*item.messages[:last], {"role": "assistant", "content": reply}]
    trained = [False] * last + [True]
    encoded = encode_conversation(tokenizer, messages, None, 1024, trained)
    runs = label_runs(encoded.labels)
    return replace(item, messages=messages, input_ids=encoded.input_ids, labels=encoded.labels, runs=runs)


@simulation("coin-toss")
def coin_toss(context: Context) -> list[Row]:
    """Judgements by the toss of a coin: how often do they call one of two equal models surely better? Blind votes
    between the two decide by the interval of the win rate. Thumbs on what A alone wrote say nothing of B: whatever the
    coin, the liked half are A's words (the table above, as A wrote it), and no reference.
    """
    rng, rows = context.rng(0), []
    for votes in SIZES:
        runs = 20 * context.runs
        wins = rng.binomial(votes, 0.5, runs)
        bounds = np.array([binomtest(won, votes).proportion_ci(method="wilson") for won in range(votes + 1)])[wins]
        beyond = [(bounds[:, 0] > 0.5).mean(), (bounds[:, 1] < 0.5).mean()]
        row = {"judgements": f"{votes} blind votes", "A surely better": percent(beyond[0])}
        rows.append(row | {"B surely better": percent(beyond[1])})
    return rows


# -----------------------------------------------------------------------------
# general knowledge and the help of the prompt


def files_of(context: Context) -> dict[str, list[dict[str, Any]]]:
    """Lines of the files that the guards judge."""
    return {name: read_lines(context.folder / f"{name}.jsonl") for name in ("general", "general_text", "prompt_help")}


@simulation("ending-cost")
def ending_cost(context: Context) -> list[Row]:
    """What ending a turn costs, in nats, added to every answer of a model that prefers every right answer (1 nat a byte
    instead of 1.5) and of the base, of whose answers the content alone is recorded. Before, nats of answer and end were
    divided by the bytes of the answer, and the likelier answer was known; now the content of the answers decides."""
    questions = {line["id"]: line for line in read_jsonl(SUITE)}
    base = by_contender(files_of(context)["general"])["base"]
    sizes = {id: [len(line[answer].encode()) for answer in ANSWERS] for id, line in questions.items()}
    answers = {
        "made up": {id: (right, 1.5 * wrong) for id, (right, wrong) in sizes.items()},
        "base": {id: (line["right"], line["wrong"]) for id, line in base.items()},
    }
    rows = []
    for cost in (0, 2, 4, 8):
        row: Row = {"ending costs": f"{cost} nats"}
        for name, nats in answers.items():
            known = [
                (right + cost) / sizes[id][0] < (wrong + cost) / sizes[id][1] for id, (right, wrong) in nats.items()
            ]
            row[f"{name}: known before"] = f"{sum(known)} of {len(known)}"
        row["base: known now"] = f"{sum(golden_lead(line) > 0 for line in base.values())} of {len(base)}"
        row["base: mean probability now"] = f"{np.mean([right_probability(line) for line in base.values()]):.3f}"
        rows.append(row)
    return rows


@simulation("general-knowledge")
def general_knowledge(context: Context) -> list[Row]:
    """How often a candidate passes the general questions: base and candidate on as many questions as there are, drawn
    with replacement from the real ones, the candidate's leads less a loss that is the same on all of them."""
    found = by_contender(files_of(context)["general"])
    leads = {name: np.array([golden_lead(found[name][id]) for id in found["base"]]) for name in ("base", "candidate")}
    count, rows = len(found["base"]), []
    for number, loss in enumerate((0.0, 0.25, 0.5, 1.0, 2.0)):
        rng, passed, mean, goldens = context.rng(11, number), 0, 0.0, 0
        for _ in range(context.runs):
            drawn = rng.integers(0, count, count)
            values = {"base": leads["base"][drawn], "candidate": leads["candidate"][drawn] - loss}
            lines = [
                {"contender": name, "id": str(index), "right": 0.0, "wrong": float(lead)}
                for name, column in values.items()
                for index, lead in enumerate(column)
            ]
            table, reasons, _ = forgotten({"general": lines}, LEAD)
            passed += not reasons
            mean += table["base"]["difference"] / context.runs
            goldens += bool(table["base"]["goldens_lost"])
        rows.append(
            {"loss on every question": f"{loss:g} nats", "mean probability": f"{100 * mean:+.1f} points"}
            | {"pass": percent(passed / context.runs), "lose a golden": percent(goldens / context.runs)}
        )
    return rows


@simulation("shuffled-replies", trains=True)
def shuffled_replies(context: Context) -> list[Row]:
    """Adapters trained anew with none, half and all of the training replies shuffled among the conversations, each
    against the base on the held-out ones. Without a look at the prompts a gain in perplexity promotes them all."""
    from fine_tuning.training.lora_trainer import train_adapter

    home, prepared = context.root / "models/base", context.root / "data/prepared"
    tokenizer, evaluate = load_tokenizer(home), read_params("evaluate", EvaluateSettings)
    chat, limits = read_params("chat", ChatSettings), read_params("compare", CompareSettings)
    settings = read_params("train", TrainSettings).model_copy(
        update={"start_from": None, "launch": "single", "threads": context.threads}
    )
    items = read_items(prepared / "test", tokenizer)
    swaps = swapped_histories(items, len(items), tokenizer, 2 * chat.max_length)
    questions = general_items(tokenizer, chat.system_prompt, chat.max_length)
    texts, variants = text_items(tokenizer), [item for swap in swaps for item in swap.variants]

    def lines_of(name: str, score: Callable[[Sequence[Item]], Sequence[Likelihood]]) -> dict[str, list[dict[str, Any]]]:
        return {
            "items": [describe(name, *pair, None) for pair in zip(items, score(items), strict=True)],
            "general": knowledge(name, questions, score(questions)),
            "general_text": reading(name, texts, score(texts)),
            "prompt_help": prompt_lines(name, swaps, score(variants)),
        }

    with loaded(home, scoring_hardware(context.threads)) as model:
        base = lines_of("base", lambda asked: likelihoods(model, asked, evaluate.batch_tokens))
    rows = []
    measured = metrics("perplexity", "token_accuracy")
    limits = limits.model_copy(update={"secondary": {"token_accuracy": 0.03}})
    for share in (0.0, 0.5, 1.0):
        trained = shuffled_rows(share, context, tokenizer, chat)
        with tempfile.TemporaryDirectory() as folder:
            adapter, validation = Path(folder) / "adapter", read_rows(prepared / "validation")
            train_adapter(home, "base", trained, validation, settings, adapter, Path(folder) / "checkpoints")
            candidate = lines_of(
                "candidate",
                lambda asked, adapter=adapter: score_adapter(
                    home, adapter, asked, evaluate.batch_tokens, context.threads
                ),
            )
        files = {name: base[name] + candidate[name] for name in base}
        blind = limits.model_copy(update={"prompt_help": None})
        found, before = (compare(files["items"], measured, one, context.intervals, files) for one in (limits, blind))
        row = found["differences"]["base"]
        rows.append(
            {"replies shuffled": percent(share), "conversations": len(trained)}
            | {name: shown(row[name]) for name in ("perplexity", "prompt_help", "general_knowledge", "general_text")}
            | {"without prompt_help": before["verdict"], "verdict": found["verdict"], "reason": found["reasons"][0]}
        )
    return rows


def shuffled_rows(share: float, context: Context, tokenizer: Any, chat: ChatSettings) -> list[PreparedRow]:
    """Training rows with the contents of that share of the trained replies dealt anew among them."""
    found, kept = [], 0
    for row in read_rows(context.root / "data/prepared/train", ("id", "messages", "input_ids", "labels")):
        kept += len(row.input_ids)
        if context.train_tokens is None or kept <= context.train_tokens:
            found.append((row.id, row.messages, len(label_runs(row.labels))))
    replies = [reply for _, messages, count in found for reply in labelled_replies(messages, count)]
    rng = context.rng(12)
    chosen = rng.permutation(len(replies))[: round(share * len(replies))]
    contents = [replies[index]["content"] for index in np.roll(chosen, 1)]
    for index, content in zip(chosen, contents, strict=True):
        replies[index]["content"] = content
    rows = []
    for id, messages, _ in found:
        trained = [any(message is reply for reply in replies) for message in messages]
        encoded = encode_conversation(tokenizer, messages, None, chat.max_length, trained)
        rows.append(PreparedRow(id, encoded.input_ids, encoded.labels))
    return rows


def shown(row: Row) -> str:
    """Candidate against base, with the interval of the difference."""
    low, high = (f"{row[end]:+.3g}" for end in ("low", "high"))
    return f"{row['candidate']:.3g} to {row['baseline']:.3g} ({row['difference']:+.3g} [{low}, {high}])"


# -----------------------------------------------------------------------------
# output


def percent(share: float) -> str:
    """A rate with one decimal."""
    return f"{100 * share:.1f} %"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; columns in the order in which rows name them first."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_simulations(
    simulations: Mapping[str, Callable[[int, np.random.Generator], Iterator[Row]]],
    doc: str | None,
    what: str,
    runs: int,
) -> None:
    """The program of benchmarks whose simulations need a number of runs, `what` each of them is, and random numbers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(simulations)}; all if none is named")
    parser.add_argument("--runs", type=int, default=runs, help=what)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - simulations.keys():
        raise UserError(f"no simulation is named {', '.join(sorted(unknown))}: choose from {', '.join(simulations)}")
    for name in arguments.names or simulations:
        text = " ".join((simulations[name].__doc__ or "").split())
        rows = list(simulations[name](arguments.runs, np.random.default_rng(arguments.seed)))
        print(f"\n**{name}.** {text}\n\n{markdown(rows)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="simulations to run; all if none is named")
    parser.add_argument("--list", action="store_true", help="name the simulations")
    parser.add_argument("--folder", type=Path, default=Path("data/evaluation"), help="records of an evaluation")
    parser.add_argument("--runs", type=int, default=1000, help="simulated comparisons a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-tokens", type=int, help="of the adapters that shuffled-replies trains; all by default")
    parser.add_argument("--threads", type=int, help="of that training and scoring")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - SIMULATIONS.keys():
        raise UserError(f"no simulation is named {', '.join(sorted(unknown))}: choose from {', '.join(SIMULATIONS)}")
    if arguments.list:
        print("\n".join(SIMULATIONS))
        return
    intervals = IntervalSettings(draws=2000, confidence=0.95, seed=arguments.seed)
    context = Context(
        arguments.folder, arguments.runs, arguments.seed, intervals, arguments.train_tokens, arguments.threads
    )
    for name in arguments.names or (name for name in SIMULATIONS if name not in TRAINS):
        text = " ".join((SIMULATIONS[name].__doc__ or "").split())
        print(f"\n**{name}.** {text}\n\n{markdown(SIMULATIONS[name](context))}", flush=True)


if __name__ == "__main__":
    run(main)
