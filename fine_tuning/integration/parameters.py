"""params.yaml as a whole, checked before a pipeline starts: DVC removes a stage's outputs before it runs the stage."""

from pathlib import Path

from fine_tuning.common.settings import Settings, check_params
from fine_tuning.data_collection.data_cleaner import CleanSettings
from fine_tuning.data_collection.data_export import ExportSettings
from fine_tuning.data_collection.storage.shards import IntakeSettings
from fine_tuning.data_preparation.dataset_builder import PrepareSettings
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.verdict.settings import CompareSettings
from fine_tuning.integration.chat_models import AppSettings
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.packaging.model_package import PackageSettings
from fine_tuning.runtime.base_model import BaseSettings
from fine_tuning.schema.chat_format import ChatSettings
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
    "deploy": DeploySettings,
}


def check_all_params(path: Path) -> None:
    """See that every section of params.yaml can be read.

    Raises:
        UserError: one cannot; names the parameter.
    """
    check_params(MODELS, path)
