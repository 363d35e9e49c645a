"""Records of the evaluation in; the verdict with its reasons and an offline report out."""

from pathlib import Path

from fine_tuning.errors import run
from fine_tuning.evaluation.comparison import CompareSettings, compare
from fine_tuning.evaluation.evaluator import EvaluateSettings
from fine_tuning.evaluation.metrics import load_metric
from fine_tuning.evaluation.report import write_report
from fine_tuning.project import sha256_file
from fine_tuning.records import read_json, read_jsonl, write_json
from fine_tuning.settings import read_params

RECORDS = Path("data/evaluation/items.jsonl")
ANSWERS = Path("data/evaluation/prompts.jsonl")
GENERAL = Path("data/evaluation/general.jsonl")
EVALUATION = Path("metrics/evaluation.json")
ADAPTER = Path("models/adapter/adapter_model.safetensors")
COMPARISON = Path("metrics/comparison.json")
REPORT = Path("metrics/report.html")
MODULES = Path("fine_tuning/evaluation/metric_modules")


def main() -> None:
    settings, evaluate = read_params("compare", CompareSettings), read_params("evaluate", EvaluateSettings)
    metrics = [load_metric(name, MODULES) for name in evaluate.metrics]
    records, general, answers = (list(read_jsonl(path)) for path in (RECORDS, GENERAL, ANSWERS))
    evaluation = read_json(EVALUATION)
    verdict = compare(records, metrics, settings, evaluate.interval, general, answers) | {
        "adapter_sha256": sha256_file(ADAPTER),
        "eval_set_sha256": evaluation["suite"]["sha256"],
    }
    write_json(COMPARISON, verdict)
    write_report(REPORT, verdict, evaluation, records, answers)
    print(f"compare: {verdict['verdict']}")
    for reason in verdict["reasons"]:
        print(f"compare: {reason}")


if __name__ == "__main__":
    run(main)
