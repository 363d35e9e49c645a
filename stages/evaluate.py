"""Base, champion, candidate and the test split in; scores with intervals, replies and a page side by side out."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.data_preparation.tokenizer import ChatSettings, encode_prompt, load_tokenizer
from fine_tuning.errors import run
from fine_tuning.evaluation.evaluator import Contender, EvaluateSettings, Evaluator, find_champion, left_out, summarise
from fine_tuning.evaluation.forgetting import general_items, knowledge
from fine_tuning.evaluation.items import Item, chat_format, encoded_anew, read_items, suite_sha256
from fine_tuning.evaluation.metrics import load_metric
from fine_tuning.evaluation.privacy import personal_data
from fine_tuning.evaluation.scoring import Reply
from fine_tuning.evaluation.side_by_side import side_by_side
from fine_tuning.project import main_checkout
from fine_tuning.records import write_json, write_jsonl
from fine_tuning.settings import read_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEST = Path("data/prepared/test.parquet")
BASE = Contender("base", Path("models/base"), Path("models/base/base-Q8_0.gguf"))
CANDIDATE = Contender("candidate", Path("models/merged"), Path("models/package/model.gguf"))
CHAMPION = Path("models/champion.json")
RECORDS = Path("data/evaluation/items.jsonl")
ANSWERS = Path("data/evaluation/prompts.jsonl")
GENERAL = Path("data/evaluation/general.jsonl")
METRICS = Path("metrics/evaluation.json")
PAGE = Path("metrics/side_by_side.md")
MODULES = Path("fine_tuning/evaluation/metric_modules")


def main() -> None:
    settings, chat = read_params("evaluate", EvaluateSettings), read_params("chat", ChatSettings)
    metrics = [load_metric(name, MODULES) for name in settings.metrics]
    tokenizer = load_tokenizer(BASE.folder)
    items = read_items(TEST, tokenizer)

    records, known, answers = [], [], {}
    for contender in contenders():
        own = load_tokenizer(contender.folder)
        asked = items if chat_format(own) == chat_format(tokenizer) else encoded_anew(items, own, chat.max_length)
        if asked:
            evaluator = evaluator_of(asked, own, settings, chat)
            lines, answers[contender.name], knows = ask(contender, evaluator, own, chat)
            records, known = records + lines, known + knows
        missing = [item for item in items if item.id not in {other.id for other in asked}]
        records += [left_out(contender.name, item) for item in missing]
        if missing:
            print(
                f"evaluate: {contender.name} is not asked {len(missing)} of {len(items)} conversations: its chat "
                f"template refuses them or {chat.max_length} of its tokens do not hold them"
            )
    records += evaluator_of(items, tokenizer, settings, chat).score_quantised(CANDIDATE)

    table = {}
    for name in dict.fromkeys(line["contender"] for line in records):
        own = [line for line in records if line["contender"] == name]
        table[name] = summarise(own, metrics, settings.interval)
    clusters = len({item.cluster for item in items})
    write_jsonl(RECORDS, records)
    write_jsonl(GENERAL, known)
    write_jsonl(
        ANSWERS,
        (
            {
                "prompt": prompt,
                "replies": {
                    name: asdict(replies[index]) | {"personal_data": personal_data(replies[index].text, prompt)}
                    for name, replies in answers.items()
                },
            }
            for index, prompt in enumerate(settings.test_prompts)
        ),
    )
    PAGE.write_text(side_by_side(settings.test_prompts, answers), encoding="utf-8", errors="replace")
    suite = {"sha256": suite_sha256(items, tokenizer), "conversations": len(items), "clusters": clusters}
    write_json(METRICS, table | {"suite": suite})
    for name, row in table.items():
        shown = ", ".join(f"{key} {row[key]['value']:.3f}" for key in list(row)[:3] if row[key]["value"] is not None)
        count = max((cell["n"] for cell in row.values()), default=0)
        print(f"evaluate: {name} on {count} conversations: {shown}")


def contenders() -> list[Contender]:
    """Base, champion if there is one, candidate."""
    # A temporary experiment's folder has no files that no stage depends on.
    folder = CHAMPION.with_suffix("")
    if not folder.is_dir():
        folder = main_checkout() / folder
    champion = find_champion(CHAMPION, folder)
    return [BASE, *([champion] if champion else []), CANDIDATE]


def evaluator_of(
    items: Sequence[Item], tokenizer: "PreTrainedTokenizerFast", settings: EvaluateSettings, chat: ChatSettings
) -> Evaluator:
    """The evaluator of all models that share a tokenizer."""
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": text}], chat.system_prompt)
        for text in settings.test_prompts
    ]
    memo = main_checkout() / ".whetstone/memo/evaluate"
    return Evaluator(items, suite_sha256(items, tokenizer), prompts, chat.max_length, settings, memo)


def ask(
    contender: Contender, evaluator: Evaluator, tokenizer: "PreTrainedTokenizerFast", chat: ChatSettings
) -> tuple[list[dict[str, Any]], list[Reply], list[dict[str, Any]]]:
    """Records of the items, replies to the test prompts, and what the contender knows in general."""
    records, answers = evaluator.evaluate(contender)
    prompted = {item.id: tokenizer.decode(item.prompt_ids(item.asked)) for item in evaluator.items if item.references}
    for line in records:
        if "predictions" in line:
            line["personal_data"] = personal_data(line["predictions"], prompted[line["id"]])
    if not evaluator.settings.forgetting:
        return records, answers, []
    general, suite = general_items(tokenizer, chat.system_prompt, chat.max_length)
    scores = evaluator.score(contender, general, suite, "general knowledge")
    return records, answers, knowledge(contender.name, general, scores)


if __name__ == "__main__":
    run(main)
