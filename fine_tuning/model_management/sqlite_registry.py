"""Model versions read straight from MLflow's SQLite file, without importing MLflow, which takes seconds.

Only stores whose tables are known are read: `SCHEMAS` names the revisions (table `alembic_version`) whose columns were
compared with MLflow's models in mlflow/store/model_registry/dbmodels. Of any other store `read_versions` returns None,
and the caller asks MLflow.
"""

import os
import sqlite3
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fine_tuning.training.tracking import EXPERIMENT

SCHEMAS = {"dc11669786a5"}  # MLflow 3.17
DELETED = "Deleted_Internal"  # stage of a version that was deleted
BUSY_SECONDS = 1.0  # for another process to finish its write; MLflow is asked after that, and waits longer


@dataclass(frozen=True)
class ModelVersion:
    """One registered version. `created_at` is in UTC; `artifacts` is the address of its files."""

    name: str
    number: int
    run_id: str
    artifacts: str
    tags: dict[str, str]
    aliases: tuple[str, ...]
    created_at: datetime

    @property
    def tag(self) -> str:
        """Its name in Ollama."""
        return f"{self.name}:{self.number}"


def read_versions(uri: str, name: str, artifacts: Path) -> list[ModelVersion] | None:
    """All versions of the model `name`, the oldest first.

    Args:
        uri: MLflow's tracking address.
        artifacts: folder of artifacts of this checkout. If its own store (the mlflow.db beside it) is missing, it has
            no versions; reading does not create it.

    Returns:
        None if MLflow has to be asked: the store is not SQLite, has other tables, is locked or damaged, uses MLflow's
        workspaces, or was moved, so that MLflow's addresses have to be corrected first.
    """
    if not uri.startswith("sqlite:///") or os.environ.get("MLFLOW_WORKSPACE"):
        return None
    file = Path(uri.removeprefix("sqlite:///"))
    own = file == artifacts.parent / "mlflow.db"
    if not file.is_file():
        return [] if own and not file.exists() else None
    try:
        address = f"{file.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as store:
            store.execute("BEGIN")  # one snapshot for all questions
            if {revision for (revision,) in store.execute("SELECT version_num FROM alembic_version")} - SCHEMAS:
                return None
            query = "SELECT artifact_location FROM experiments WHERE name = ?"
            located = [location for (location,) in store.execute(query, [EXPERIMENT])]
            if own and located != [artifacts.resolve().as_uri()]:
                return None
            return _versions(store, name)
    except sqlite3.Error:
        return None


def _versions(store: sqlite3.Connection, name: str) -> list[ModelVersion]:
    tags: dict[int, dict[str, str]] = defaultdict(dict)
    for number, key, value in store.execute(
        "SELECT version, key, value FROM model_version_tags WHERE name = ?", [name]
    ):
        tags[number][key] = value
    aliases: dict[int, list[str]] = defaultdict(list)
    query = "SELECT version, alias FROM registered_model_aliases WHERE name = ? ORDER BY alias"
    for number, alias in store.execute(query, [name]):
        aliases[number].append(alias)
    query = (
        "SELECT version, run_id, source, creation_time FROM model_versions "
        "WHERE name = ? AND current_stage <> ? ORDER BY version"
    )
    return [
        ModelVersion(
            name, number, run_id or "", source, tags[number], tuple(aliases[number]),
            datetime.fromtimestamp(created / 1000, UTC),
        )
        for number, run_id, source, created in store.execute(query, [name, DELETED])
    ]  # fmt: skip
