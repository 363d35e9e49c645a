"""Records of the evaluation in; the verdict with its reasons, plots and an offline report out."""

import sys
from pathlib import Path

from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import csv_pairs, read_json, read_object, write_json, write_text
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.evaluation.records.champion_records import called_champion, champion_folder, is_champion
from fine_tuning.evaluation.records.data_changes import changes_since
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.report.charts import curve, interval_plot, standalone
from fine_tuning.evaluation.report.report import Findings, write_report
from fine_tuning.evaluation.verdict.settings import CompareSettings
from fine_tuning.schema.prepared import split_sha256

RECORDS = Path("data/evaluation")
EVALUATION = Path("metrics/evaluation.json")
LEARNING_CURVE = Path("metrics/learning_curve.json")
VOTES = Path("data/votes")
PREPARED, PACKAGE = Path("metrics/prepare.json"), Path("metrics/package.json")
TRAIN = Path("data/prepared/train")
CHAMPION = Path("models/champion.json")
ADAPTER = Path("models/adapter/adapter_model.safetensors")
GGUF = Path("models/package/model.gguf")
COMPARISON = Path("metrics/comparison.json")
REPORT = Path("metrics/report.html")
TRAINING, BASE = Path("metrics/train.json"), Path("models/base/base.json")
LOSSES = {  # file, column
    "train": (Path("metrics/plots/train_loss.csv"), "loss"),
    "validation": (Path("metrics/plots/validation_loss.csv"), "validation_loss"),
}
PLOTS = {"differences": Path("metrics/plots/differences.svg"), "curve": Path("metrics/plots/learning_curve.svg")}


def main() -> None:
    settings, evaluate = read_params("compare", CompareSettings), read_params("evaluate", EvaluateSettings)
    # These take seconds to import: a refused parameter is reported before. evaluate would import transformers, and with
    # it PyTorch, for pipelines that nothing here uses.
    transformers = sys.modules.setdefault("transformers", None)
    from fine_tuning.evaluation.verdict.comparison import Evidence
    from fine_tuning.evaluation.verdict.slices import slices

    if transformers is None:
        del sys.modules["transformers"]  # a user's metric may want it
    found = Evidence.read(RECORDS, evaluate, VOTES)
    evaluation, learning = read_json(EVALUATION), read_json(LEARNING_CURVE)
    verdict = found.verdict(settings, sha256_file(ADAPTER), evaluation["suite"])
    if is_champion(CHAMPION, ADAPTER, GGUF, verdict["kind"]):
        verdict = called_champion(verdict, read_json(CHAMPION))
    write_json(COMPARISON, verdict)
    if learning["points"] and learning["train_sha256"] != split_sha256(TRAIN):
        learning["note"] = "measured on other training data than the candidate's: measure again"
    champion = champion_folder(CHAMPION) if read_json(CHAMPION).get("version") is not None else None
    changes = changes_since(champion, TRAIN) if champion else None
    where = slices(found.records, found.metrics, evaluate.interval)
    losses = {name: csv_pairs(path.read_text(), "step", column) for name, (path, column) in LOSSES.items()}
    losses = {name: line for name, line in losses.items() if line}  # of an adopted adapter there is none of training
    made_of = read_json(PREPARED), read_json(TRAINING), read_json(BASE), losses, read_object(PACKAGE)
    write_report(
        REPORT, Findings(verdict, evaluation, found.records, found.answers, where, changes, learning, *made_of)
    )
    baseline = list(verdict["differences"])[-1:]
    shown = verdict["differences"][baseline[0]] if baseline else {}
    title = f"candidate against {baseline[0]}: {verdict['verdict']}" if baseline else verdict["verdict"]
    write_text(PLOTS["differences"], standalone(interval_plot(shown), title))
    write_text(PLOTS["curve"], standalone(curve(learning["points"]), "learning curve"))
    print(f"compare: {verdict['verdict']}")
    for reason in verdict["reasons"]:
        print(f"compare: {reason}")


if __name__ == "__main__":
    run_stage(main)
