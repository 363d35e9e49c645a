"""What MLflow keeps of models that learned from a forgotten conversation: marked, withdrawn, their runs removed."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.records import write_json
from fine_tuning.erasure.object_stores import WEIGHTS
from fine_tuning.erasure.traces import Traces
from fine_tuning.model_management.model_registry import ModelRegistry, ModelVersion

FORGOTTEN_TAG = "forgotten"
MEMBERS = "provenance/conversations.json"
LEARNED_FROM = "train"


class ForgottenModels:
    """The versions and runs of one registry, seen from the conversations that are forgotten. `scratch` is a folder for
    temporary copies."""

    def __init__(self, registry: ModelRegistry, scratch: Path) -> None:
        self.registry, self._scratch = registry, scratch
        self._client, self._experiment = registry.store

    # ------------------------------------------------------------------------------------------------------- questions

    def versions(self, ids: set[str], adapters: set[str]) -> list[ModelVersion]:
        """The versions that were trained on one of the conversations, or have one of these adapters."""
        return [
            version
            for version in self.registry.versions()
            if version.tags.get("adapter_sha256") in adapters or ids & set(self._members(version).get(LEARNED_FROM, []))
        ]

    def continued(self, adapters: set[str]) -> set[str]:
        """The adapters, and those whose training went on from one of them, by the parameters of the runs."""
        runs = [run.data for run in self._runs()]
        starts = [(run.tags.get("adapter_sha256"), run.params.get("start_from", "None")) for run in runs]
        starts = [(adapter, start) for adapter, start in starts if adapter is not None and start != "None"]
        found = set(adapters)
        while True:
            further = {adapter for adapter, start in starts if any(sha256.startswith(start) for sha256 in found)}
            if further <= found:
                return found
            found |= further

    def runs(self, adapters: set[str]) -> list[str]:
        """Ids of the runs that trained one of the adapters, but for those of registered versions."""
        kept = {version.tags.get("adapter_sha256") for version in self.registry.versions()}
        return [run.info.run_id for run in self._runs() if run.data.tags.get("adapter_sha256") in adapters - kept]

    def _runs(self) -> list[Any]:
        from mlflow.entities import ViewType

        runs, token = [], None
        while True:
            page = self._client.search_runs([self._experiment], run_view_type=ViewType.ALL, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _members(self, version: ModelVersion) -> dict[str, list[str]]:
        with suppress(ValueError):
            return json.loads(self.registry.read(version, MEMBERS) or b"{}")
        return {}

    # --------------------------------------------------------------------------------------------------------- changes

    def mark(self, number: int, conversations: int, day: str) -> None:
        """Tag a version as one that learned from what was forgotten."""
        known = self.registry.version(number).tags.get(FORGOTTEN_TAG)
        note = f"{count_of(conversations, 'conversation')}, {day}"
        if known is None or note not in known:
            self.registry.set_tags(number, {FORGOTTEN_TAG: f"{known}; {note}" if known else note})

    def hide(self, names: Traces, stand_in: Callable[[str], str]) -> None:
        """Put `stand_in(id)` in the place of the ids wherever the registry lists the conversations of a version."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        for version in self.registry.versions():
            members = self._members(version)
            hidden = {
                split: [stand_in(i) if any(names.ids_in(i)) else i for i in kept] for split, kept in members.items()
            }
            if hidden != members:
                with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
                    write_json(Path(folder) / Path(MEMBERS).name, hidden)
                    # Not by the client, which keeps the place of a run's artifacts although the registry was copied.
                    repository = get_artifact_repository(version.artifacts, tracking_uri=self.registry.uri)
                    repository.log_artifact(str(Path(folder) / Path(MEMBERS).name), str(Path(MEMBERS).parent))

    def withdraw(self, number: int) -> None:
        """Take a version out of the aliases and out of the registry; doing it again changes nothing."""
        with suppress(UserError):  # it is gone already
            version = self.registry.version(number)
            for alias in version.aliases:
                self._client.delete_registered_model_alias(self.registry.name, alias)
            self.registry.remove(number)

    def remove_runs(self, run_ids: list[str]) -> None:
        """Delete runs and their artifacts for good; with SQLite, overwrite what the database held of them."""
        from mlflow.exceptions import MlflowException

        for run_id in run_ids:
            with suppress(MlflowException):
                self._client.delete_run(run_id)
        uri = self.registry.uri
        if not run_ids or uri.startswith(("http://", "https://")):
            return
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--run-ids", ",".join(run_ids)]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0 and "not found" not in done.stderr:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"`mlflow gc` failed ({reason[:200]}): fix it, `python -m fine_tuning forget --resume`")
        if database := re.fullmatch(r"sqlite:///(.+)", uri):
            with closing(sqlite3.connect(database[1], timeout=60)) as connection:
                connection.execute("VACUUM")

    # --------------------------------------------------------------------------------------------------------- content

    def artifacts_holding(self, holds: Callable[[Path, str], bool], remove: bool = False) -> tuple[list[str], int]:
        """(artifacts of all runs that `holds(file, name)` is true of, how many were searched); no weights."""
        from mlflow.artifacts import download_artifacts
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        found, count = [], 0
        for run in self._runs():
            repository = get_artifact_repository(run.info.artifact_uri, tracking_uri=self.registry.uri)
            for path in _files(repository, None):
                if path.endswith(WEIGHTS):
                    continue
                count += 1
                with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
                    address = f"{run.info.artifact_uri}/{path}"
                    local = download_artifacts(address, dst_path=folder, tracking_uri=self.registry.uri)
                    if not holds(Path(local), f"MLflow: {run.info.run_id}/{path}"):
                        continue
                found.append(f"{run.info.run_id}/{path}")
                if remove:
                    repository.delete_artifacts(path)
        return found, count


def _files(repository: Any, folder: str | None) -> list[str]:
    files = []
    for entry in repository.list_artifacts(folder):
        files += _files(repository, entry.path) if entry.is_dir else [entry.path]
    return files
