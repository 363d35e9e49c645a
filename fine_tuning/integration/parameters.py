"""params.yaml as a whole, checked before a pipeline starts: DVC removes a stage's outputs before it runs the stage."""

from importlib import metadata
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import LIBRARY
from fine_tuning.common.settings import Settings, check_params
from fine_tuning.data_collection.data_cleaner import CleanSettings
from fine_tuning.data_collection.data_export import ExportSettings
from fine_tuning.data_collection.storage.shards import IntakeSettings
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.verdict.settings import CompareSettings
from fine_tuning.integration.chat_models import AppSettings
from fine_tuning.integration.gateway.recorder import GatewaySettings
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.packaging.model_package import PackageSettings
from fine_tuning.runtime.base_model import BaseSettings
from fine_tuning.schema.chat_format import ChatSettings
from fine_tuning.training.settings import TrainSettings

METRICS = LIBRARY / "evaluation/metric_modules"
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
    "deploy": DeploySettings,
}


def check_all_params(path: Path) -> None:
    """See that every section of params.yaml can be read, and that the metrics and the package that it names are there.

    Raises:
        UserError: one cannot, or is not; names the parameter.
    """
    found = check_params(MODELS, path)
    metrics = sorted({file.stem for file in METRICS.glob("*.py")} - {"__init__", "loading"})
    for name in found["evaluate"].metrics:
        if name not in metrics:
            raise UserError(f"{path}: evaluate.metrics names {name!r}: choose among {', '.join(metrics)}")
    package = found["base"].model.partition("package:")[2]
    if package and not _is_installed(package):
        raise UserError(f"{path}: base.model names the package {package}, which is not installed: check its spelling")


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.distribution(package))
    except (metadata.PackageNotFoundError, ValueError):
        return False
