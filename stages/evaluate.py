"""Base, champion, candidate, train and test split in; scores with intervals, replies and a page side by side out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import count_of, run
from fine_tuning.common.project import main_checkout
from fine_tuning.common.records import write_json, write_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.personal_data.people import Find, PeopleSettings, people_finder
from fine_tuning.evaluation.records.champion_records import (
    LEARNED,
    is_champion,
    method_sha256,
    take_back,
    without_learned,
)
from fine_tuning.evaluation.records.record_types import Reply, conversation_of
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.scoring.side_by_side import side_by_side
from fine_tuning.evaluation.suite.contenders import Contender, ProjectName, check_references, find_champion
from fine_tuning.evaluation.suite.items import chat_format, encoded_anew, read_items
from fine_tuning.evaluation.suite.privacy import personal_data
from fine_tuning.schema.chat_format import ChatSettings, load_tokenizer

TRAIN = Path("data/prepared/train.parquet")
TEST = Path("data/prepared/test.parquet")
BASE = Contender("base", Path("models/base"), Path("models/base/base-Q8_0.gguf"))
CANDIDATE = Contender("candidate", Path("models/merged"), Path("models/package/model.gguf"))
ADAPTER = Path("models/adapter/adapter_model.safetensors")
CHAMPION = Path("models/champion.json")
RECORDS = Path("data/evaluation/items.jsonl")
ANSWERS = Path("data/evaluation/prompts.jsonl")
MEMORY = Path("data/evaluation/memory.jsonl")
METRICS = Path("metrics/evaluation.json")
PAGE = Path("metrics/side_by_side.md")
MODULES = Path("fine_tuning/evaluation/metric_modules")


def main() -> None:
    settings, chat = read_params("evaluate", EvaluateSettings), read_params("chat", ChatSettings)
    people = read_params("clean", PeopleSettings)
    # These import PyTorch, which takes seconds: a refused parameter is reported before.
    from fine_tuning.evaluation.evaluator import Evaluator
    from fine_tuning.evaluation.metric_modules.loading import load_metric, signatures
    from fine_tuning.evaluation.records.measurements import GUARDS, guard_metrics, left_out, summarise

    find_people = people_finder(people)
    metrics = [load_metric(name, MODULES) for name in settings.metrics]
    champion, method = find_champion(CHAMPION), method_sha256(settings, chat, people)
    if champion and is_champion(CHAMPION, ADAPTER, CANDIDATE.gguf):
        if take_back(CHAMPION, METRICS, method):
            print("evaluate: the candidate is the champion: the records that it was promoted by are taken back")
            return
        champion = None  # a model is not compared with itself
    check_references(settings.references, BASE.folder, CHAMPION, read_params("deploy", ProjectName).name)
    tokenizer = load_tokenizer(BASE.folder)
    items, learned = without_learned(read_items(TEST, tokenizer, settings.references), CHAMPION)
    if learned:
        print(f"evaluate: {count_of(learned, 'held-out conversation')} {LEARNED}")
    memo = main_checkout() / ".whetstone/memo/evaluate"
    common = Evaluator(items, tokenizer, chat, settings, memo, find_people)

    records, guarded, answers = [], {name: [] for name in GUARDS}, {}
    for contender in filter(None, (BASE, champion, CANDIDATE)):
        own, evaluator = load_tokenizer(contender.folder), common
        if chat_format(own) != chat_format(tokenizer):
            evaluator = Evaluator(encoded_anew(items, own, chat.max_length), own, chat, settings, memo, find_people)
        if evaluator.items:
            lines, answers[contender.name] = evaluator.evaluate(contender)
            records += lines
            for name, found in evaluator.guard_lines(contender).items():
                guarded[name] += found
        asked = {item.id for item in evaluator.items}
        missing = [item for item in items if item.id not in asked]
        records += [left_out(contender.name, item) for item in missing]
        if missing:
            print(
                f"evaluate: {contender.name} is not asked {len(missing)} of {len(items)} windows: its chat "
                f"template refuses them or {chat.max_length} of its tokens do not hold them"
            )
    records += common.score_quantised(CANDIDATE) + common.score_rivals(BASE, TRAIN)
    memory = [line for contender in (BASE, CANDIDATE) for line in common.recall(contender, TRAIN)]

    table = {}
    for name in dict.fromkeys(line["contender"] for line in records):
        own_lines = [line for line in records if line["contender"] == name]
        table[name] = summarise(own_lines, metrics, settings.interval)
    for name, row in guard_metrics(guarded, settings.interval.confidence).items():
        table[name] |= row
    suite = {
        "sha256": common.suite,
        "conversations": len({conversation_of(item.id) for item in items}),
        "windows": len(items),
        "clusters": len({item.cluster for item in items}),
        "learned_by_champion": learned,
        "signatures": signatures(metrics),
        "method_sha256": method,
    }
    write_jsonl(RECORDS, records)
    for name in GUARDS:
        write_jsonl(RECORDS.with_name(f"{name}.jsonl"), guarded[name])
    write_jsonl(MEMORY, memory)
    write_jsonl(ANSWERS, answer_lines(settings.test_prompts, answers, find_people))
    PAGE.write_text(side_by_side(settings.test_prompts, answers), encoding="utf-8", errors="replace")
    write_json(METRICS, table | {"suite": suite})
    for name, row in table.items():
        shown = ", ".join(f"{key} {row[key]['value']:.3f}" for key in list(row)[:3] if row[key]["value"] is not None)
        count = max((cell["n"] for cell in row.values()), default=0)
        print(f"evaluate: {name} on {count_of(count, 'window')}: {shown}")


def answer_lines(prompts: list[str], answers: dict[str, list[Reply]], find_people: Find | None) -> list[dict[str, Any]]:
    """A line for each test prompt, with every contender's reply."""
    return [
        {
            "prompt": prompt,
            "replies": {
                name: asdict(reply) | {"personal_data": personal_data(reply.text, prompt, find_people)}
                for name, reply in ((name, replies[index]) for name, replies in answers.items())
            },
        }
        for index, prompt in enumerate(prompts)
    ]


if __name__ == "__main__":
    run(main)
