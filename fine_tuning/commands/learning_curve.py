"""`learning-curve`: train on shares of the data, to see whether more conversations would help."""

import argparse
import shutil
from pathlib import Path

BASE, CHAMPION = Path("models/base"), Path("models/champion.json")
TRAIN = Path("data/prepared/train")
VALIDATION = Path("data/prepared/validation")
CURVE = Path("metrics/learning_curve.json")


def learning_curve(arguments: argparse.Namespace) -> None:
    """Write metrics/learning_curve.json. Neither the pipeline's adapter nor another of its outputs is touched. Every
    share that was trained once with the same base, data and parameters is kept: an interrupted run continues."""
    from fine_tuning.evaluation.learning_curve import advice, measure, parse_fractions, score_adapter

    fractions = parse_fractions(arguments.fractions)

    from fine_tuning.common.project import main_checkout
    from fine_tuning.common.records import write_json
    from fine_tuning.common.results import Memo
    from fine_tuning.common.settings import read_params
    from fine_tuning.evaluation.metric_modules.loading import load_metric
    from fine_tuning.evaluation.records.record_types import Likelihood
    from fine_tuning.evaluation.records.settings import EvaluateSettings
    from fine_tuning.evaluation.suite.contenders import ProjectName, check_references
    from fine_tuning.evaluation.suite.items import read_items, suite_sha256
    from fine_tuning.runtime.base_model import read_base_card
    from fine_tuning.schema.chat_format import load_tokenizer
    from fine_tuning.schema.prepared import PreparedRow, read_rows, split_sha256
    from fine_tuning.training.checkpoints import checkpoint_key
    from fine_tuning.training.lora_trainer import train_adapter
    from fine_tuning.training.settings import TrainSettings

    evaluate = read_params("evaluate", EvaluateSettings)
    settings = read_params("train", TrainSettings).model_copy(update={"start_from": None, "launch": "single"})
    check_references(evaluate.references, BASE, CHAMPION, read_params("deploy", ProjectName).name)
    base, tokenizer = read_base_card(BASE), load_tokenizer(BASE)
    items = read_items(VALIDATION, tokenizer, evaluate.references)
    rows, validation = read_rows(TRAIN), read_rows(VALIDATION)
    scratch = main_checkout() / ".whetstone"
    memo, suite = Memo(scratch / "memo/learning_curve", "evaluate"), suite_sha256(items, tokenizer)

    def scores_of(chosen: list[PreparedRow]) -> list[Likelihood]:
        key = checkpoint_key(settings, chosen, base["sha256"], validation)
        measured = [key, suite, evaluate.batch_tokens, evaluate.threads]
        folder = scratch / "learning_curve" / key

        def compute() -> list:
            count, every = (len({row.id for row in some}) for some in (chosen, rows))
            print(f"learning-curve: training on {count} of {every} conversations", flush=True)
            name = base["model"]
            train_adapter(BASE, name, chosen, validation, settings, folder / "adapter", folder / "checkpoints")
            scores = score_adapter(BASE, folder / "adapter", items, evaluate.batch_tokens, evaluate.threads)
            shutil.rmtree(folder)
            return scores

        return memo.get(measured, compute)

    metrics = [load_metric("perplexity", Path("fine_tuning/evaluation/metric_modules"))]
    points = measure(rows, fractions, items, scores_of, metrics, evaluate.interval)
    write_json(CURVE, {"train_sha256": split_sha256(TRAIN), "points": points})
    for point in points:
        print(
            f"{point['fraction']:>5g} of the data, {point['conversations']} conversations: validation perplexity "
            f"{point['perplexity']:.4g} [{point['low']:.4g}, {point['high']:.4g}]"
        )
    print(advice(points))
    print(f"kept in {CURVE}; `dvc repro compare` puts it into metrics/report.html")
