"""What the tests of evaluation share: the tiny base, a candidate that knows the answers, held-out conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_tuning.common.records import replacing
from fine_tuning.common.results import Memo
from fine_tuning.evaluation.evaluator import Evaluator
from fine_tuning.evaluation.records.record_types import Item
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.suite.contenders import Contender
from fine_tuning.evaluation.suite.items import read_items
from fine_tuning.runtime.gguf_writer import write_gguf
from fine_tuning.schema.chat_format import ChatSettings, encode_conversation, load_tokenizer
from fine_tuning.schema.prepared import PreparedRow, encoded_row, row_batch, write_batches

SETTINGS = EvaluateSettings.model_validate(
    {
        "metrics": ["perplexity", "nll_per_byte", "token_accuracy", "bleu", "chrf", "rouge", "exact_match", "replies"],
        "references": ["person"],
        "batch_tokens": 256,
        "threads": 1,
        "generation": {"items": 6, "max_tokens": 24, "slots": 2},
        "quantised_items": 4,
        "prompting_baselines": {"system_prompt": "Say where it is.", "examples": 2, "items": 3},
        "memory": {"conversations": 4},
        "forgetting": True,
        "other_histories": 8,
        "interval": {"draws": 500, "confidence": 0.95, "seed": 0},
        "test_prompts": ["Where is the router?"],
    }
)
CHAT = ChatSettings(system_prompt=None, max_length=200)
MODULES = Path(__file__).parents[1] / "fine_tuning/evaluation/metric_modules"
THINGS = ("router", "password", "cable", "fox", "dog", "France", "Paris", "help")


@dataclass(frozen=True)
class Suite:
    """Models, items and where they lie."""

    base: Contender
    candidate: Contender
    parquet: Path
    items: list[Item]


def evaluator_of(items: list[Item], model: Path, memo: Path, **changes: object) -> Evaluator:
    """An evaluator of `items` in the tokens of the model folder `model`."""
    return Evaluator(items, load_tokenizer(model), CHAT, SETTINGS.model_copy(update=changes), Memo(memo, "evaluate"))


def conversation(text: str, reply: str, **fields: object) -> list[dict]:
    """A question and its answer, by a person where no model is named; `fields` go to the answer."""
    author = {} if "model" in fields else {"person": True}
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply, **author, **fields}]


def write_rows(folder: Path, rows: Sequence[PreparedRow]) -> None:
    """Write encoded rows as a split of one file."""
    with replacing(folder / "rows.parquet") as file:
        write_batches(file, [row_batch(rows)])


def write_items(path: Path, model: Path, conversations: dict[str, list[dict]], max_length: int = 200) -> Path:
    """A prepared split of `conversations` by id, each its own cluster."""
    tokenizer = load_tokenizer(model)
    examples = []
    for id, messages in conversations.items():
        trained = [message.get("rating", 0) >= 0 for message in messages]
        encoded = encode_conversation(tokenizer, messages, None, max_length, trained)
        examples.append(encoded_row(encoded, id=id, source="sample", cluster=id))
    write_rows(path, examples)
    return path


def build_suite(folder: Path, base: Path) -> Suite:
    """Train a copy of the tiny base on the very items, so that it is surely better, and write both GGUF files."""
    import torch
    from transformers import AutoModelForCausalLM

    conversations = {
        f"c{index:02d}": conversation(f"Where is the {thing}?", f"The {thing} is in the box, number {index}.")
        for index, thing in enumerate(THINGS)
    }
    parquet = write_items(folder / "test", base, conversations)
    tokenizer = load_tokenizer(base)
    items = read_items(parquet, tokenizer)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        for item in items:
            loss = model(torch.tensor([item.input_ids]), labels=torch.tensor([item.labels])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    candidate = folder / "candidate"
    model.save_pretrained(candidate)
    tokenizer.save_pretrained(candidate)
    for source, gguf in ((base, folder / "base.gguf"), (candidate, folder / "candidate.gguf")):
        write_gguf(source, gguf, "F16")
    return Suite(
        Contender("base", base, folder / "base.gguf"),
        Contender("candidate", candidate, folder / "candidate.gguf"),
        parquet,
        items,
    )
