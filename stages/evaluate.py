"""Base, champion, candidate and the test split in; scores with intervals, replies and a page side by side out."""

from dataclasses import asdict
from pathlib import Path

from fine_tuning.data_preparation.tokenizer import ChatSettings, encode_prompt, load_tokenizer
from fine_tuning.errors import UserError, run
from fine_tuning.evaluation.evaluator import Contender, EvaluateSettings, Evaluator, find_champion, summarise
from fine_tuning.evaluation.forgetting import general_items, knowledge
from fine_tuning.evaluation.items import read_items, suite_sha256
from fine_tuning.evaluation.metrics import load_metric
from fine_tuning.evaluation.privacy import personal_data
from fine_tuning.evaluation.side_by_side import side_by_side
from fine_tuning.project import main_checkout
from fine_tuning.records import write_json, write_jsonl
from fine_tuning.settings import read_params

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
    suite = suite_sha256(items, tokenizer)
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": text}], chat.system_prompt)
        for text in settings.test_prompts
    ]
    evaluator = Evaluator(
        items, suite, prompts, chat.max_length, settings, main_checkout() / ".whetstone/memo/evaluate"
    )

    general, general_suite = general_items(tokenizer, chat.system_prompt, chat.max_length)
    records, known, answers = [], [], {}
    for contender in contenders():
        lines, answers[contender.name] = evaluator.evaluate(contender)
        prompted = {item.id: tokenizer.decode(item.prompt_ids(item.asked)) for item in items if item.references}
        for line in lines:
            if "predictions" in line:
                line["personal_data"] = personal_data(line["predictions"], prompted[line["id"]])
        records += lines
        if settings.forgetting:
            scores = evaluator.score(contender, general, general_suite, "general knowledge")
            known += knowledge(contender.name, general, scores)
    records += evaluator.score_quantised(CANDIDATE)

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
    write_json(METRICS, table | {"suite": {"sha256": suite, "conversations": len(items), "clusters": clusters}})
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
    if champion is not None and load_tokenizer(champion.folder).backend_tokenizer.to_str() != tokenizer_of(BASE):
        raise UserError("the champion has another tokenizer than models/base: promote this candidate with `python -m fine_tuning promote --force WHY`")
    return [BASE, *([champion] if champion else []), CANDIDATE]


def tokenizer_of(contender: Contender) -> str:
    """The tokenizer of a contender as text."""
    return load_tokenizer(contender.folder).backend_tokenizer.to_str()


if __name__ == "__main__":
    run(main)
