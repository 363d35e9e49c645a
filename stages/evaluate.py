"""Base, champion, candidate, train and test split in; scores with intervals, replies and a page side by side out."""

from pathlib import Path

from fine_tuning.common.errors import count_of
from fine_tuning.common.project import main_checkout
from fine_tuning.common.records import write_json, write_jsonl, write_text
from fine_tuning.common.results import Memo
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.personal_data.people import PeopleSettings, people_finder
from fine_tuning.evaluation.records.champion_records import (
    LEARNED,
    is_champion,
    method_sha256,
    restore_records,
    without_learned,
)
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.scoring.side_by_side import side_by_side
from fine_tuning.evaluation.suite.contenders import (
    Contender,
    ProjectName,
    check_references,
    compared_models,
    find_champion,
)
from fine_tuning.evaluation.suite.items import read_items
from fine_tuning.schema.chat_format import ChatSettings, load_tokenizer
from fine_tuning.schema.preferences import read_preferences

TRAIN = Path("data/prepared/train")
VALIDATION = Path("data/prepared/validation")
TEST, PAIRS = Path("data/prepared/test"), Path("data/preferences/test.parquet")
BASE = Contender("base", Path("models/base"), Path("models/base/base-Q8_0.gguf"))
CANDIDATE = Contender("candidate", Path("models/merged"), Path("models/package/model.gguf"))
ADAPTER = Path("models/adapter/adapter_model.safetensors")
CHAMPION = Path("models/champion.json")
RECORDS = Path("data/evaluation")
METRICS = Path("metrics/evaluation.json")
PAGE = Path("metrics/side_by_side.md")
TASKS = Path("configs/benchmarks")
MODULES = Path("fine_tuning/evaluation/metric_modules")
MEMO = Path(".whetstone/memo/evaluate")


def main() -> None:
    settings, chat = read_params("evaluate", EvaluateSettings), read_params("chat", ChatSettings)
    people = read_params("clean", PeopleSettings)
    # These import PyTorch, which takes seconds: a refused parameter is reported before.
    from fine_tuning.evaluation.evaluator import Evaluator
    from fine_tuning.evaluation.metric_modules.loading import load_metric, signatures
    from fine_tuning.evaluation.records.measurements import BENCHMARKS
    from fine_tuning.evaluation.scoring.benchmarks import Benchmarks

    find_people = people_finder(people)
    metrics = [load_metric(name, MODULES) for name in settings.metrics]
    benchmarks = Benchmarks(settings.benchmarks, settings.benchmark_questions, TASKS)
    name = read_params("deploy", ProjectName).name
    check_references(settings.references, BASE.folder, CHAMPION, name)
    tokenizer, memo = load_tokenizer(BASE.folder), Memo(main_checkout() / MEMO, "evaluate")
    given = tokenizer, chat, settings, memo, find_people
    # Chosen on validation: the best of several on the test split would be the luckiest.
    validation = read_items(VALIDATION, tokenizer, settings.references, needed=False)
    candidate, kind = Evaluator(validation, *given).choose_kind(BASE, CANDIDATE, TRAIN)
    champion, method = find_champion(CHAMPION), method_sha256(settings, chat, people)
    if champion and is_champion(CHAMPION, ADAPTER, CANDIDATE.gguf, kind):
        if restore_records(CHAMPION, METRICS, method):
            print("evaluate: the candidate is the champion: the records that it was promoted by are restored")
            return
        champion = None  # a model is not compared with itself
    items, learned = without_learned(read_items(TEST, tokenizer, settings.references), CHAMPION)
    if learned:
        print(f"evaluate: {count_of(learned, 'held-out conversation')} {LEARNED}")

    is_compared = compared_models(BASE.folder, CHAMPION, name)
    evaluator = Evaluator(items, *given, read_preferences(PAIRS), is_compared)
    kind |= {} if candidate.kind == CANDIDATE.kind else evaluator.cost(candidate, TRAIN)
    found, contenders = evaluator.run(BASE, champion, candidate, TRAIN), [c for c in (BASE, champion, candidate) if c]
    asked = chat.system_prompt, evaluator.hardware, memo
    found.guarded[BENCHMARKS] = [line for one in contenders for line in benchmarks.ask(one, *asked)]
    write_jsonl(RECORDS / "items.jsonl", found.records)
    for name, lines in found.guarded.items():
        write_jsonl(RECORDS / f"{name}.jsonl", lines)
    write_jsonl(RECORDS / "memory.jsonl", found.memory)
    write_jsonl(RECORDS / "prompts.jsonl", found.answer_lines(settings.test_prompts, find_people))
    write_text(PAGE, side_by_side(settings.test_prompts, found.answers))
    ggufs = {one.name: one.identity(TRAIN) for one in contenders}
    identity = {"learned_by_champion": learned, "signatures": signatures(metrics), "method_sha256": method}
    identity |= {"ggufs": ggufs, "kind": kind}
    table = found.table(metrics, settings.interval)
    write_json(METRICS, table | {"suite": evaluator.describe_suite() | identity})
    for name, row in table.items():
        shown = ", ".join(f"{key} {row[key]['value']:.3f}" for key in list(row)[:3] if row[key]["value"] is not None)
        count = max((cell["n"] for cell in row.values()), default=0)
        print(f"evaluate: {name} on {count_of(count, 'window')}: {shown}")


if __name__ == "__main__":
    run_stage(main)
