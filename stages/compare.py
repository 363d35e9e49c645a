"""Records of the evaluation in; the verdict with its reasons, plots and an offline report out."""

from pathlib import Path

from fine_tuning.errors import run
from fine_tuning.evaluation.charts import curve, interval_plot, standalone
from fine_tuning.evaluation.comparison import CompareSettings, compare
from fine_tuning.evaluation.contenders import champion_folder
from fine_tuning.evaluation.data_changes import changes_since
from fine_tuning.evaluation.evaluate_settings import EvaluateSettings
from fine_tuning.evaluation.metrics import load_metric
from fine_tuning.evaluation.report import Findings, write_report
from fine_tuning.evaluation.slices import slices
from fine_tuning.project import sha256_file
from fine_tuning.records import read_json, read_jsonl, replacing, write_json
from fine_tuning.settings import read_params

RECORDS = Path("data/evaluation/items.jsonl")
ANSWERS = Path("data/evaluation/prompts.jsonl")
GUARDS = {name: Path(f"data/evaluation/{name}.jsonl") for name in ("general", "general_text", "prompt_help")}
MEMORY = Path("data/evaluation/memory.jsonl")
EVALUATION = Path("metrics/evaluation.json")
LEARNING_CURVE = Path("metrics/learning_curve.json")
PREPARED = Path("metrics/prepare.json")
TRAIN = Path("data/prepared/train.parquet")
CHAMPION = Path("models/champion.json")
ADAPTER = Path("models/adapter/adapter_model.safetensors")
COMPARISON = Path("metrics/comparison.json")
REPORT = Path("metrics/report.html")
PLOTS = {"differences": Path("metrics/plots/differences.svg"), "curve": Path("metrics/plots/learning_curve.svg")}
MODULES = Path("fine_tuning/evaluation/metric_modules")


def main() -> None:
    settings, evaluate = read_params("compare", CompareSettings), read_params("evaluate", EvaluateSettings)
    metrics = [load_metric(name, MODULES) for name in evaluate.metrics]
    records, answers, memory = (list(read_jsonl(path)) for path in (RECORDS, ANSWERS, MEMORY))
    guarded = {name: list(read_jsonl(path)) for name, path in GUARDS.items()}
    evaluation, learning = read_json(EVALUATION), read_json(LEARNING_CURVE)
    verdict = compare(records, metrics, settings, evaluate.interval, guarded, answers, memory) | {
        "adapter_sha256": sha256_file(ADAPTER),
        "eval_set_sha256": evaluation["suite"]["sha256"],
    }
    write_json(COMPARISON, verdict)
    if learning["points"] and learning["train_sha256"] != sha256_file(TRAIN):
        learning["note"] = "measured on other training data than the candidate's: measure again"
    champion = champion_folder(CHAMPION) if read_json(CHAMPION).get("version") is not None else None
    changes = changes_since(champion, TRAIN) if champion else None
    where = slices(records, metrics, evaluate.interval)
    prepared = read_json(PREPARED)
    write_report(REPORT, Findings(verdict, evaluation, records, answers, where, changes, learning, prepared))
    rival = list(verdict["differences"])[-1:]
    shown = verdict["differences"][rival[0]] if rival else {}
    title = f"candidate against {rival[0]}: {verdict['verdict']}" if rival else verdict["verdict"]
    write_plot(PLOTS["differences"], standalone(interval_plot(shown), title))
    write_plot(PLOTS["curve"], standalone(curve(learning["points"]), "learning curve"))
    print(f"compare: {verdict['verdict']}")
    for reason in verdict["reasons"]:
        print(f"compare: {reason}")


def write_plot(path: Path, drawing: str) -> None:
    with replacing(path) as file:
        file.write(drawing.encode())


if __name__ == "__main__":
    run(main)
