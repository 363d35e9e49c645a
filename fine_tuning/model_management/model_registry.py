"""Model versions in MLflow: registered once each, with aliases that move only from where they were seen."""

import hashlib
import logging
import math
import os
import random
import shutil
import socket
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import check_model_name
from fine_tuning.common.project import artifact_root, main_checkout, tracking_uri
from fine_tuning.model_management.sqlite_registry import ModelVersion, read_versions
from fine_tuning.training.tracking import data_inputs, open_store

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
CONTENT_TAG = "content_sha256"
ADAPTER_TAG = "adapter_sha256"
LOCK_SECONDS = 120.0
CLAIM, CLAIM_SECONDS = "promotes.", 300.0
ANSWERS = ("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")  # errors that are answers to a question of ours


class ModelRegistry:
    """The versions of one model.

    Args:
        name: registered model's name; the same as in Ollama.
        uri: MLflow's address.
        artifacts: folder of artifacts for a SQLite store.
        locks: folder of lock files. They serialise this machine's processes; promotions from other machines exclude
            each other by a tag in the registry.
        patience: seconds to keep trying while the database is locked or another machine promotes.

    Raises:
        UserError: the store does not open.
    """

    def __init__(self, name: str, uri: str, artifacts: Path, locks: Path, *, patience: float = 30.0) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # It prints a traceback for every attempt on a locked database; `_PatientClient` has the one line for it.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self.name = check_model_name(name)
        self.uri = uri
        self.patience = patience
        self._artifacts, self._locks = artifacts, locks
        if read_versions(uri, name, artifacts) is None:
            self.store  # noqa: B018 (opened now, so that the error comes here)

    @cached_property
    def store(self) -> tuple[Any, str]:
        """(MlflowClient, experiment id), opened when MLflow is needed: importing it takes seconds."""
        return open_store(self.uri, self._artifacts, self._locks / "mlflow.lock")

    @cached_property
    def _client(self) -> "_PatientClient":
        return _PatientClient(self.store[0], self.uri, self.patience)

    # ------------------------------------------------------------------------------------------------------- register

    def register(
        self,
        content_sha256: str,
        folder: Path,
        tags: dict[str, str],
        metrics: dict[str, float],
        description: str | None = None,
        data: dict[str, Path] | None = None,
    ) -> tuple[ModelVersion, bool]:
        """Register the files in `folder` as a version, unless a version of this content exists.

        The files are stored before the version appears, so a version that can be seen is whole. The version belongs
        to the training run that wrote the adapter (found by its tag `adapter_sha256`), else to a run made here.

        Args:
            description: Markdown that MLflow shows.
            data: {context: path} of the data sets behind the version; `metrics` were measured on `test`.

        Returns:
            (the version, whether it is new)

        Raises:
            UserError: a metric is not a finite number, or the store stays locked.
        """
        wrong = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if wrong:
            raise UserError(f"the metric {wrong[0]} is not a finite number: `dvc repro -f -s evaluate && dvc repro`")
        with self._lock():
            self._ensure_model()
            found = self.find(content_sha256)
            if found:
                return found, False
            run_id, uri = self._run_of(tags.get(ADAPTER_TAG))
            place = f"versions/{content_sha256[:16]}"
            self._client.log_artifacts(run_id, str(folder), place)
            inputs = data_inputs(data or {})
            self._client.log_inputs(run_id, inputs)
            self._log_metrics(run_id, metrics, {entry.tags[0].value: entry.dataset for entry in inputs}.get("test"))
            tags = {**tags, CONTENT_TAG: content_sha256}
            made = self._client.create_model_version(
                self.name, f"{uri}/{place}", run_id, tags=tags, description=description
            )
            return self.version(int(made.version)), True

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name, None, "Chat models of one project, each with its verdict.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _run_of(self, adapter_sha256: str | None) -> tuple[str, str]:
        """(id, artifact address) of the newest run with this adapter, or of a new one."""
        if adapter_sha256:
            wanted, newest = f"tags.{ADAPTER_TAG} = '{adapter_sha256}'", ["attributes.start_time DESC"]
            runs = self._client.search_runs([self.store[1]], wanted, order_by=newest, max_results=1)
            if runs:
                return runs[0].info.run_id, runs[0].info.artifact_uri
        tags = {ADAPTER_TAG: adapter_sha256} if adapter_sha256 else {}
        run = self._client.create_run(self.store[1], run_name="promote", tags=tags)
        self._client.set_terminated(run.info.run_id)
        return run.info.run_id, run.info.artifact_uri

    def _log_metrics(self, run_id: str, metrics: dict[str, float], test: Any) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        measured_on = {"dataset_name": test.name, "dataset_digest": test.digest} if test else {}
        entries = [Metric(name, float(value), now, 0, **measured_on) for name, value in metrics.items()]
        for start in range(0, len(entries), 500):
            self._client.log_batch(run_id, metrics=entries[start : start + 500])

    # ------------------------------------------------------------------------------------------------------- questions

    def versions(self) -> list[ModelVersion]:
        """All versions, the oldest first."""
        known = read_versions(self.uri, self.name, self._artifacts)
        return self._ask_mlflow() if known is None else known

    def _ask_mlflow(self) -> list[ModelVersion]:
        from mlflow.exceptions import MlflowException

        entries = self._client.search_model_versions(f"name = '{self.name}'")
        try:
            aliases = self._client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            aliases = {}
        names: dict[int, list[str]] = defaultdict(list)  # searching leaves the aliases out
        for alias, number in aliases.items():
            names[int(number)].append(alias)
        found = [_version(entry, names[int(entry.version)]) for entry in entries]
        return sorted(found, key=lambda version: version.number)

    def version(self, number: int) -> ModelVersion:
        """One version. Raises UserError if there is none of that number."""
        found = next((version for version in self.versions() if version.number == number), None)
        if found is None:
            raise UserError(f"the registry has no version {number} of {self.name}: see `python -m fine_tuning list`")
        return found

    def find(self, content_sha256: str) -> ModelVersion | None:
        return next((v for v in self.versions() if v.tags.get(CONTENT_TAG) == content_sha256), None)

    def by_alias(self, alias: str) -> ModelVersion | None:
        """The version that `champion`, `previous` or `candidate` names."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def download(self, version: ModelVersion, path: str, folder: Path) -> Path:
        """Fetch a file or folder of a version's artifacts into `folder`. Raises UserError if the artifact is gone."""
        gone = f"{path} of version {version.number} is gone from the registry: `python -m fine_tuning verify`"
        if version.artifacts.startswith("file:///"):
            source = Path(unquote(urlsplit(version.artifacts).path), path)
            target = folder / path
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    return shutil.copytree(source, target, dirs_exist_ok=True)
                return shutil.copyfile(source, target)
            except OSError:
                raise UserError(gone) from None
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            address = f"{version.artifacts}/{path}"
            return Path(download_artifacts(address, dst_path=str(folder), tracking_uri=self.uri))
        except (MlflowException, OSError):
            raise UserError(gone) from None

    def read(self, version: ModelVersion, path: str) -> bytes | None:
        """A file of a version's artifacts, None if the registry does not have it."""
        self._locks.mkdir(parents=True, exist_ok=True)
        # Where `forget` finds what a killed process leaves: the file may list conversations.
        with tempfile.TemporaryDirectory(dir=self._locks) as folder, suppress(UserError, OSError):
            return self.download(version, path, Path(folder)).read_bytes()
        return None

    # --------------------------------------------------------------------------------------------------------- changes

    def promote(self, number: int, replaces: int | None) -> ModelVersion | None:
        """Make a version the champion and the champion it replaces `previous`. Doing it again changes nothing.

        `previous` moves first: killed in between, the old champion is still there and a rerun has the same result.

        Args:
            replaces: number of the champion that this one was compared with; None for none.

        Returns:
            the version that was champion before, None if there was none.

        Raises:
            UserError: somebody made another version champion in the meantime, or is promoting.
        """
        with self._lock(), self._claim():
            self.version(number)
            old = self.by_alias(CHAMPION)
            if old is not None and old.number == number:
                return self.by_alias(PREVIOUS)
            if (old.number if old else None) != replaces:
                raise UserError(
                    f"version {old.number if old else 'none'} became champion in the meantime: `dvc repro` compares "
                    "with it, then promote again"
                )
            if old is not None:
                self._move(PREVIOUS, old.number)
            self._move(CHAMPION, number)
            if (candidate := self.by_alias(CANDIDATE)) is not None and candidate.number == number:
                self._client.delete_registered_model_alias(self.name, CANDIDATE)
            return old and self.version(old.number)

    def nominate(self, number: int) -> None:
        with self._lock():
            if CHAMPION not in self.version(number).aliases:
                self._move(CANDIDATE, number)

    def _move(self, alias: str, number: int) -> None:
        self._client.set_registered_model_alias(self.name, alias, str(number))
        if alias not in self.version(number).aliases:
            raise UserError(f"another process moved the alias {alias} at the same time: check with `list`, then repeat")

    def set_tags(self, number: int, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(self.name, str(number), key, value)

    def delete_tags(self, number: int, keys: Iterable[str]) -> None:
        for key in keys:
            self._client.delete_model_version_tag(self.name, str(number), key)

    def remove(self, number: int) -> None:
        """Take a version out of the registry. Its files stay in the run that made it. Raises UserError if it is the
        champion or the way back from it."""
        with self._lock():
            version = self.version(number)
            held = [alias for alias in (CHAMPION, PREVIOUS) if alias in version.aliases]
            if held:
                raise UserError(f"version {number} is the {held[0]} and stays: promote another one first")
            self._client.delete_model_version(self.name, str(number))

    # ----------------------------------------------------------------------------------------------------------- store

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self._locks / f"registry-{self.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise UserError(f"another process holds the registry for two minutes: end it, or remove {path}") from None

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Keep promotions from other machines out: MLflow (3.17) moves an alias wherever it points by then.

        A claim is a tag of the model. Who writes one and then sees no other is alone: whoever comes later sees it, and
        once it is gone, the new champion. Two that see each other step back and try again. A checkout's claims have one
        name: its lock file keeps its processes apart, and what a killed one left is written over.
        """
        here = f"{socket.gethostname()} {uuid.getnode()} {self._locks.resolve()}"
        key, end = CLAIM + hashlib.sha256(here.encode()).hexdigest()[:16], time.monotonic() + self.patience
        while True:
            self._client.set_registered_model_tag(self.name, key, str(time.time()))
            try:
                tags = self._client.get_registered_model(self.name).tags
                others = [tag for tag in tags if tag.startswith(CLAIM) and tag != key]
                if all(time.time() - float(tags[tag]) > CLAIM_SECONDS for tag in others):
                    yield
                    return
            finally:
                self._client.delete_registered_model_tag(self.name, key)
            if time.monotonic() > end:
                raise UserError(
                    f"another machine promotes a version of {self.name}: promote again when it is done (a promotion "
                    f"that was killed blocks others for {CLAIM_SECONDS / 60:.0f} minutes)"
                )
            time.sleep(random.uniform(0.1, 1.0))


class _PatientClient:
    """An MlflowClient whose calls are made again and again while the database is locked, until `patience` is over."""

    def __init__(self, client: Any, uri: str, patience: float) -> None:
        self._client, self._uri, self._patience = client, uri, patience

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        from mlflow.exceptions import MlflowException

        end = time.monotonic() + self._patience
        wait = 0.1
        while True:
            try:
                return getattr(self._client, name)(*arguments, **options)
            except MlflowException as error:
                if error.error_code in ANSWERS:
                    raise
                if "database is locked" not in str(error):
                    reason = " ".join(str(error).split())[:200]
                    raise UserError(f"the registry at {self._uri} failed ({reason}): fix it, then run again") from None
                if time.monotonic() + wait > end:
                    raise UserError(
                        f"the registry's database stayed locked for {self._patience:.0f} s: end the program that "
                        "writes to it (an MLflow server?), then run again"
                    ) from None
            time.sleep(wait)
            wait = min(wait * 2, 2.0)


def _version(entry: Any, aliases: Iterable[str]) -> ModelVersion:
    created, tags = datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC), dict(entry.tags or {})
    number, run_id = int(entry.version), entry.run_id or ""
    return ModelVersion(entry.name, number, run_id, entry.source, tags, tuple(sorted(aliases)), created)


def registry_locks(checkout: Path | None = None) -> Path:
    """Where the main checkout keeps lock files."""
    return main_checkout(checkout) / ".whetstone"


def open_registry(name: str, checkout: Path | None = None) -> ModelRegistry:
    """The registry of a checkout, by default of the current folder."""
    return ModelRegistry(name, tracking_uri(checkout), artifact_root(checkout), registry_locks(checkout))
