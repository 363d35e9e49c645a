"""Runs in MLflow: one store for the checkout and all its temporary experiments."""

import contextlib
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fine_tuning.common.dvc_files import md5_path
from fine_tuning.common.errors import UserError, no_space
from fine_tuning.common.project import artifact_root, main_checkout, sha256_file, tracking_uri

EXPERIMENT = "whetstone"
WEIGHTS = "adapter_model.safetensors"
# Columns of MLflow's tables that hold addresses below the experiment's location.
ADDRESSES = ("experiments.artifact_location", "runs.artifact_uri", "logged_models.artifact_location")
ADDRESSES += ("model_versions.source", "model_versions.storage_location")


def checkout_store(checkout: Path | None = None) -> tuple[Any, str]:
    """The MLflow store of a checkout, by default of the current folder: see `open_store`."""
    lock = main_checkout(checkout) / ".whetstone/mlflow.lock"
    return open_store(tracking_uri(checkout), artifact_root(checkout), lock)


def has_store(checkout: Path) -> bool:
    """Whether there is a store; opening it would create one."""
    uri = tracking_uri(checkout)
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def open_store(uri: str, artifacts: Path, lock: Path) -> tuple[Any, str]:
    """Open (and the first time create) the MLflow store.

    Args:
        uri: tracking address; a SQLite one should hold an absolute path.
        artifacts: folder for artifacts when the store is SQLite; a server keeps its own. An mlflow.db beside it belongs
            to it: moved or copied with it, the store's addresses are made those of the new place.
        lock: lock file around the creation of tables and experiment, which MLflow does not guard itself.

    Returns:
        (MlflowClient, experiment id)

    Raises:
        UserError: the store cannot be opened.
    """
    import logging

    # MLflow's default of seven retries takes four minutes when the server is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if file and file.exists():
        _refuse_foreign_file(file)
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=120):
            own = file == artifacts.parent / "mlflow.db"
            if file and not (file.exists() and file.stat().st_size):
                # A store whose creation was killed never opens again: it is created beside its place and renamed.
                new = file.with_name(f".{file.name}.new")
                new.unlink(missing_ok=True)
                mlflow.MlflowClient(f"sqlite:///{new}", f"sqlite:///{new}").search_experiments()
                if own:
                    new.chmod(0o600)
                new.replace(file)
            if file and own:
                _own_store(file, artifacts)
            client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment:
                return client, experiment.experiment_id
            location = artifacts.resolve().as_uri() if uri.startswith("sqlite:") else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=location)
    except Timeout:
        raise UserError(f"another process holds the MLflow store for two minutes: end it, or remove {lock}") from None
    except (MlflowException, OSError, sqlite3.Error, SQLAlchemyError, ImportError) as error:
        if no_space(error):
            raise
        raise UserError(
            f"the MLflow store at {uri} does not open ({type(error).__name__}): check MLFLOW_TRACKING_URI or the server"
        ) from None


def _own_store(database: Path, artifacts: Path) -> None:
    """Make the folder readable by its owner only, and rebase addresses that name another folder.

    MLflow stores absolute addresses only: a copy of the project would write into the original, and delete from it.
    """
    artifacts.mkdir(mode=0o700, exist_ok=True)
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        if not connection.execute("SELECT name FROM sqlite_master WHERE name = 'experiments'").fetchall():
            return
        query = "SELECT artifact_location FROM experiments WHERE name = ? AND artifact_location <> ?"
        for (old,) in connection.execute(query, [EXPERIMENT, new := artifacts.resolve().as_uri()]).fetchall():
            for table, column in (address.split(".") for address in ADDRESSES):
                change = f"UPDATE {table} SET {column} = ?1 || substr({column}, ?2) WHERE substr({column}, 1, ?2)"
                connection.execute(f"{change} IN (?3, ?3 || '/')", [new, len(old) + 1, old])
        # MLflow's experiment 0 would keep its files below the folder in which the store was created.
        default = (artifacts.resolve() / "default").as_uri()
        query = "SELECT 1 FROM experiments WHERE experiment_id = 0 AND artifact_location <> ?"
        if connection.execute(query, [default]).fetchall():
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", [default])


def _refuse_foreign_file(path: Path) -> None:
    """MLflow adds its tables to any SQLite database, and tries a folder for minutes."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as store:
            names = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            # Alembic's temporary table, left by a migration that was killed.
            foreign = bool(names) and not names & {"experiments", "_alembic_tmp_experiments"}
    except sqlite3.DatabaseError as error:
        # Readonly: a command that was killed left a journal, which the next one that writes rolls back.
        foreign = not any(state in str(error) for state in ("locked", "readonly"))
    if foreign:
        raise UserError(f"{path} is not an MLflow store, so nothing was written to it: correct MLFLOW_TRACKING_URI")


class Run:
    """An MLflow run that is being written."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.id = run_id

    def log_step(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def log_artifacts(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.id, str(folder), name)

    def log_data(self, files: dict[str, Path]) -> None:
        """Note the data sets that the run read, by what they were for."""
        self.client.log_inputs(self.id, data_inputs(files))

    def tag(self, **tags: Any) -> None:
        for key, value in tags.items():
            self.client.set_tag(self.id, key, str(value))


def data_inputs(files: dict[str, Path]) -> list[Any]:
    """MLflow's entries for data sets by context (train, test): path in the project and DVC's hash, and no content."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(path.name, str(md5_path(path)), "local", json.dumps({"uri": path.as_posix()})),
            [InputTag("mlflow.data.context", context)],
        )
        for context, path in files.items()
        if path.exists()
    ]


@contextmanager
def tracked_run(
    client: Any,
    experiment_id: str,
    name: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    parent: Run | None = None,
    system_metrics: bool = False,
) -> Iterator[Run]:
    """An MLflow run around a block: FINISHED when the block ends, FAILED or KILLED when it raises.

    Args:
        parent: the run that this one is nested under.
        system_metrics: record CPU, memory, disk and GPU while the block runs.
    """
    from mlflow.entities import Param
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    nested = {"mlflow.parentRunId": parent.id} if parent else {}
    run_id = client.create_run(experiment_id, run_name=name, tags={**tags, **nested}).info.run_id
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flatten(parameters).items()])
    monitor = SystemMetricsMonitor(run_id, tracking_uri=client.tracking_uri) if system_metrics else None
    if monitor:
        monitor.start()
    status = "FAILED"
    try:
        yield Run(client, run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if monitor:
            monitor.finish()
        client.set_terminated(run_id, status)


@contextmanager
def training_runs(
    client: Any, experiment_id: str, parameters: dict[str, Any], tags: dict[str, str]
) -> Iterator[tuple[Run, Run]]:
    """(the pipeline's run, the run of its training nested in it) around a block."""
    with (
        tracked_run(client, experiment_id, "pipeline", {}, tags) as pipeline,
        tracked_run(client, experiment_id, "train", parameters, tags, pipeline, system_metrics=True) as tracked,
    ):
        yield pipeline, tracked


def find_adapter(client: Any, experiment_id: str, sha256: str, folder: Path) -> Path:
    """The adapter whose weights' SHA-256 starts with `sha256`: from `folder`, or from the run that trained it. Raises
    UserError if no run, or more than one adapter, has such a hash, or its files are damaged."""
    from mlflow.artifacts import download_artifacts

    for kept in folder.glob(f"{sha256}*"):
        if sha256_file(kept / WEIGHTS) == kept.name:
            return kept
    runs = client.search_runs([experiment_id], f"tags.adapter_sha256 LIKE '{sha256}%'")
    found = {run.data.tags["adapter_sha256"] for run in runs}
    if len(found) != 1:
        known = "no adapter" if not found else "more than one adapter"
        raise UserError(f"train.start_from = {sha256}: {known} in MLflow has such a SHA-256: see models/champion.json")
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        with contextlib.suppress(Exception), tempfile.TemporaryDirectory(dir=folder) as fetched:
            local = download_artifacts(
                artifact_uri=f"{run.info.artifact_uri}/adapter", dst_path=fetched, tracking_uri=client.tracking_uri
            )
            if sha256_file(Path(local) / WEIGHTS) in found:
                target = folder / found.pop()
                with contextlib.suppress(OSError):  # another process was faster
                    Path(local).replace(target)
                return target
    raise UserError(f"train.start_from = {sha256}: its artifacts in MLflow are gone or damaged: choose another")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"rank": 8}} -> {"lora.rank": 8}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
