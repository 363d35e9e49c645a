"""models/base and the prepared train and validation rows in; models/adapter, metrics and the loss curves out."""

import os
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import git_commit, main_checkout, sha256_file, versions
from fine_tuning.common.records import read_json, read_object, write_csv, write_json, write_text
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import run_stage
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.runtime.hardware import is_main_process
from fine_tuning.schema.chat_format import load_tokenizer
from fine_tuning.schema.preferences import read_pairs, read_thumbs, rows_of
from fine_tuning.schema.prepared import PreparedRow, read_rows, split_sha256
from fine_tuning.training.adopted import ORIGIN
from fine_tuning.training.checkpoints import alone_with, checkpoint_key, remove_checkpoints
from fine_tuning.training.items import Prepared, choose_items
from fine_tuning.training.launch import launch, train_without_output
from fine_tuning.training.model_card import model_card, name_base
from fine_tuning.training.row_checks import check_only_assistants_train
from fine_tuning.training.settings import TrainSettings
from fine_tuning.training.speed import SPEED, Speed, read_speed, record_speed
from fine_tuning.training.tracking import checkout_store, find_adapter, flatten, training_runs

BASE = Path("models/base")
TRAIN = Path("data/prepared/train")
VALIDATION = Path("data/prepared/validation")
PAIRS, THUMBS = Path("data/preferences"), Path("data/thumbs")  # with a file for each split
LEARNED_FROM = {"train": TRAIN, "preferences": PAIRS, "thumbs": THUMBS}
PREPARED = Path("metrics/prepare.json")  # printed only: what is trained depends on the rows alone
ADAPTER = Path("models/adapter")
METRICS = Path("metrics/train.json")
LOSS_CURVE = Path("metrics/plots/train_loss.csv")
VALIDATION_CURVE = Path("metrics/plots/validation_loss.csv")
PREFERENCE_CURVE = Path("metrics/plots/preferences.csv")
LIVE = {  # rewritten at the end with what was measured before this session
    LOSS_CURVE: {name: name for name in ("step", "loss", "learning_rate", "grad_norm")},
    VALIDATION_CURVE: {"step": "step", "validation_loss": "eval_loss"},
}
SCRATCH = main_checkout() / ".whetstone"


def main() -> None:
    settings = read_params("train", TrainSettings)
    # These import PyTorch, which takes seconds: a refused parameter is reported before.
    from fine_tuning.training import run_report as report
    from fine_tuning.training.lora_trainer import train_adapter
    from fine_tuning.training.progress import progress_bar

    client, experiment = checkout_store()
    if settings.max_steps == 0 and not settings.start_from:
        raise UserError("train.max_steps: 0 takes the adapter of train.start_from as it is: set train.start_from too")
    start = find_adapter(client, experiment, settings.start_from, SCRATCH / "start") if settings.start_from else None
    if settings.launch != "single" and "RANK" not in os.environ:
        launch(Path(f"configs/accelerate/{settings.launch}.yaml"), "stages.train")
    base, prepared = read_base_card(BASE), [read_prepared(path) for path in (TRAIN, VALIDATION)]
    items, validation, learning_from = choose_items(settings, *prepared)
    rows = rows_of(items)
    check_only_assistants_train([*rows, *rows_of(validation)], load_tokenizer(BASE))
    checkpoints = SCRATCH / "checkpoints" / checkpoint_key(settings, items, base["sha256"], validation)
    what = (BASE, base["model"], items, validation, settings, ADAPTER, checkpoints)
    if not is_main_process():
        train_without_output(lambda: train_adapter(*what, None, start, SCRATCH / "references"))
        return
    left_out = read_json(PREPARED).get("left_out", {}) if PREPARED.is_file() else {}
    conversations = {item.id for item in items if isinstance(item, PreparedRow)}
    size = len(conversations), sum(len(row.input_ids) for row in rows)
    for line in report.announcement(settings, *size, left_out, read_speed(main_checkout() / SPEED)):
        print(f"train: {line}", flush=True)
    print(f"train: {learning_from}", flush=True)
    parameters, tags = flatten(settings.model_dump()), run_tags(base["model"])
    with alone_with(checkpoints):
        with training_runs(client, experiment, parameters, tags) as (pipeline, tracked):
            with progress_bar(tracked, LIVE) as progress:
                result = train_adapter(*what, progress, start, SCRATCH / "references")
            metrics = report.quality(result)
            write_json(METRICS, metrics)
            write_csv(LOSS_CURVE, *report.learning_curve(result))
            write_csv(VALIDATION_CURVE, *report.validation_curve(result))
            write_csv(PREFERENCE_CURVE, *report.preference_curve(result))
            hashes = {"train": split_sha256(TRAIN), "validation": split_sha256(VALIDATION)}
            name_base(ADAPTER, base, BASE)
            origin = read_object(ADAPTER / ORIGIN).get("origin")
            write_text(ADAPTER / "README.md", model_card(base, parameters, metrics, hashes, origin))
            for one in (pipeline, tracked):
                one.log_data({"validation": VALIDATION} | ({} if origin else LEARNED_FROM))
                one.tag(adapter_sha256=sha256_file(ADAPTER / "adapter_model.safetensors"), **vars(result.hardware))
            tracked.log_step({**metrics, **report.speed(result)}, 0)
            pipeline.log_artifacts(ADAPTER, "adapter")
        remove_checkpoints(checkpoints)
    pace = Speed(result.tokens_per_second, f"{base['model']}, {settings.method}", base["parameters"])
    record_speed(main_checkout() / SPEED, pace, result.steps)
    print(report.summary(settings, result))


def read_prepared(rows: Path) -> Prepared:
    judged = f"{rows.name}.parquet"
    return Prepared(read_rows(rows), read_pairs(PAIRS / judged), read_thumbs(THUMBS / judged))


def run_tags(base: str) -> dict[str, str]:
    """What an MLflow run says of the code and the packages that it was made with."""
    commit, dirty = git_commit(Path.cwd())
    tags = {"git_commit": commit or "none", "git_dirty": str(dirty), "base_model": base}
    tags |= {"mlflow.source.name": "python -m stages.train", "mlflow.source.type": "LOCAL"}  # MLflow's page shows them
    tags |= {"mlflow.source.git.commit": commit} if commit else {}
    return tags | {f"version_{name}": version for name, version in versions().items()}


if __name__ == "__main__":
    run_stage(main)
