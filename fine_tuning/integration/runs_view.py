"""What the page Runs shows: DVC's commits and experiments and MLflow's runs as one table, and curves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import run_command
from fine_tuning.common.settings import parse_settings, read_comments
from fine_tuning.evaluation.looks import record_looks
from fine_tuning.integration.jobs import dvc_command
from fine_tuning.integration.parameters import MODELS
from fine_tuning.training.tracking import checkout_store, flatten, has_store

LOSS = Path("metrics/plots/train_loss.csv")
COMMITS = 10  # that are shown
# What the page may change: numbers and switches, never code, paths, addresses or what guards a promotion.
MAY_CHANGE = frozenset(
    f"{section}.{name}"
    for section, names in {
        "chat": "system_prompt max_length",
        "prepare": "train_on validation_fraction test_fraction salt latest_from decontamination_words max_train_tokens "
        "max_sample_tokens max_held_out_tokens canaries",
        "intake": "sample",
        "clean": "drop_near_duplicates near_duplicate_threshold max_same_reply max_user_share",
        "clean.filters": "min_length max_length min_turns max_turns max_repetition max_special_characters max_echo",
        "train": "objective method seed epochs max_steps learning_rate schedule warmup_ratio weight_decay "
        "max_grad_norm optimizer batch_tokens packing acceleration gradient_accumulation precision threads "
        "gradient_checkpointing neftune_alpha validations early_stopping_patience checkpoint_steps",
        "train.preference": "minimum order loss beta label_smoothing sft_weight",
        "train.lora": "rank alpha dropout target_modules top_layers rslora dora",
        "package": "merged_dtype quantisation",
        "package.parameters": "num_ctx temperature top_p top_k min_p repeat_penalty repeat_last_n presence_penalty "
        "frequency_penalty",
        "evaluate": "kind batch_tokens threads quantised_items forgetting other_histories",
        "evaluate.generation": "items max_tokens slots",
        "evaluate.interval": "draws confidence seed",
        "evaluate.prompting_baselines": "system_prompt examples items",
        "evaluate.memory": "conversations",
    }.items()
    for name in names.split()
)
SAME_RUN = ("train_loss", "validation_loss")  # numbers that a DVC experiment and its MLflow run share to the last digit
JUDGED = "comparison.adapter_sha256"
OF_AN_ADAPTER = ("package.", "evaluation.", "comparison.")


@dataclass
class Line:
    kind: str
    name: str
    when: datetime | None
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    status: str = ""


def dvc_lines(checkout: Path) -> list[Line]:
    """The workspace, those of the last commits that have results, and their experiments, the newest first. Raises
    UserError if DVC does not answer."""
    answer = run_command(*dvc_command("exp", "show", "--json", "--num", str(COMMITS)), cwd=checkout)
    lines = []
    for commit in json.loads(answer):
        start = _dvc_line("workspace" if commit["rev"] == "workspace" else "commit", commit)
        if start.kind == "workspace" or start.metrics:
            lines.append(start)
        for experiment in commit.get("experiments") or []:
            for revision in (experiment.get("revs") or [])[:1]:
                named = revision | {"name": experiment.get("name") or revision.get("name")}
                line = _dvc_line("experiment", named)
                line.status = str((experiment.get("executor") or {}).get("state") or "")
                # A run that is not finished, or failed, has the metrics of the commit it started from.
                finished = line.status in ("", "success")
                line.metrics = own_metrics(line.metrics, start.metrics) if finished else {}
                lines.append(line)
    return lines


def record_lines(lines: list[Line]) -> None:
    """Add the verdicts of lines that are shown to the ledger of looks; those of a champion are none. Raises UserError
    if the ledger is damaged."""
    shown = [line.metrics for line in lines if not any(key.startswith("comparison.champion.") for key in line.metrics)]
    record_looks(
        {"eval_set_sha256": one.get("comparison.eval_set_sha256"), "adapter_sha256": one.get(JUDGED)}
        | ({"kind": {"name": kind}} if (kind := one.get("comparison.kind.name")) else {})
        for one in shown
    )


def own_metrics(of_experiment: dict[str, Any], of_start: dict[str, Any]) -> dict[str, Any]:
    """An experiment's metrics without those of another adapter: what it did not run has the numbers it started from."""
    trained_anew = any(of_experiment.get(key) != of_start.get(key) for key in of_start if key.startswith("train."))
    if not trained_anew or of_experiment.get(JUDGED) != of_start.get(JUDGED):
        return of_experiment
    return {key: value for key, value in of_experiment.items() if not key.startswith(OF_AN_ADAPTER)}


def _dvc_line(kind: str, revision: dict) -> Line:
    data = revision.get("data") or {}
    name = revision.get("name") or ""
    short = "" if revision["rev"] == "workspace" else revision["rev"][:7]
    return Line(
        kind=kind,
        name=" ".join(part for part in (name, short) if part) or kind,
        when=datetime.fromisoformat(data["timestamp"]).astimezone(UTC) if data.get("timestamp") else None,
        params=_contents(data.get("params"), with_file=False),
        metrics=_contents(data.get("metrics"), with_file=True),
    )


def _contents(files: dict | None, with_file: bool) -> dict[str, Any]:
    """{"train.seed": 42} of DVC's {file: {"data": …}}; metrics are named after their file, `metrics/` left out."""
    flat: dict[str, Any] = {}
    for path, content in (files or {}).items():
        values = flatten(content["data"]) if isinstance(content.get("data"), dict) else {}
        prefix = f"{Path(path).stem}." if with_file else ""
        flat |= {f"{prefix}{key}": value for key, value in values.items()}
    return flat


def mlflow_lines(checkout: Path) -> list[Line]:
    """The runs of the store, the newest first; none where there is no store yet."""
    if not has_store(checkout):
        return []
    client, experiment = checkout_store(checkout)
    runs = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=100)
    return [
        Line(
            kind="MLflow run",
            name=run.info.run_name or run.info.run_id[:8],
            when=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            params={f"train.{key}": value for key, value in run.data.params.items()},
            metrics={f"train.{key}": value for key, value in run.data.metrics.items()},
            run_id=run.info.run_id,
            status=run.info.status.lower(),
        )
        for run in runs
    ]


def joined(dvc: list[Line], mlflow: list[Line]) -> list[Line]:
    """One table: a run is joined with the commit or experiment that has its numbers, the others on their own."""
    unmatched = list(mlflow)
    for line in dvc:
        numbers = [line.metrics.get(f"train.{name}") for name in SAME_RUN]
        if None in numbers:
            continue
        for run in mlflow:
            if numbers == [run.metrics.get(f"train.{name}") for name in SAME_RUN]:
                line.run_id = run.run_id
                line.metrics = run.metrics | line.metrics
                if run in unmatched:
                    unmatched.remove(run)
                break
    return dvc + unmatched


def numeric(lines: list[Line]) -> list[str]:
    """Names of the metrics that are numbers, those that people ask for first."""
    names = {
        name
        for line in lines
        for name, value in line.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    first = ["evaluation.candidate.perplexity.value", "evaluation.base.perplexity.value", "train.validation_loss",
             "train.train_loss", "train.tokens_per_second"]  # fmt: skip
    return [name for name in first if name in names] + sorted(names - set(first))


def changed(line: Line, against: Line) -> dict[str, Any]:
    return {name: value for name, value in line.params.items() if against.params.get(name) != value}


def differences(one: Line, other: Line) -> list[dict[str, Any]]:
    rows = []
    for what in ("params", "metrics"):
        left, right = getattr(one, what), getattr(other, what)
        for name in sorted(left.keys() | right.keys()):
            if left.get(name) != right.get(name):
                rows.append({"what": what, "name": name, one.name: _shown(left.get(name)),
                             other.name: _shown(right.get(name))})  # fmt: skip
    return rows


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def loss_history(checkout: Path, run_id: str) -> list[dict[str, float]]:
    """[{"step", "loss"}] of an MLflow run."""
    history = checkout_store(checkout)[0].get_metric_history(run_id, "loss")
    return [{"step": point.step, "loss": point.value} for point in history]


@dataclass(frozen=True)
class Parameter:
    """A parameter that the page may change: its name, its value and comment in params.yaml, and the JSON schemas of
    the forms that it may have, such as {"type": "integer", "minimum": 1}."""

    name: str
    value: Any
    comment: str
    forms: list[dict[str, Any]]

    @property
    def optional(self) -> bool:
        return {"type": "null"} in self.forms


def changeable(path: Path) -> list[Parameter]:
    """The parameters of MAY_CHANGE in the order of params.yaml."""
    values, comments = flatten(_load(path)), read_comments(path)
    return [Parameter(name, values[name], comments[name], _forms(name)) for name in comments if name in MAY_CHANGE]


def _forms(name: str) -> list[dict[str, Any]]:
    section, *names = name.split(".")
    schema = found = MODELS[section].model_json_schema()
    for part in names:
        found = found["properties"][part]
        found = schema["$defs"][found["$ref"].rpartition("/")[2]] if "$ref" in found else found
    return found.get("anyOf") or [found]


def overrides(path: Path, changes: Mapping[str, Any]) -> list[str]:
    """`-S` arguments that set parameters of the YAML file at `path` for one experiment. Raises UserError if a parameter
    is not in MAY_CHANGE, or a value is none that it could have."""
    params, arguments = _load(path), []
    for name, value in changes.items():
        if name not in MAY_CHANGE:
            raise UserError(f"{name[:60]} is not changed from here: use `dvc exp run -S` in a terminal")
        *sections, key = name.split(".")
        reduce(lambda section, part: section[part], sections, params)[key] = value
        text = json.dumps(value, ensure_ascii=False)
        if "$" in text or "\\" in text:  # `$` begins an interpolation, which reads the environment
            raise UserError(f"{name} takes no $, quotation mark, backslash or line break here: edit params.yaml")
        arguments += ["-S", f"{name}={text}"]
    for section in {name.partition(".")[0] for name in changes}:
        parse_settings(section, params[section], MODELS[section], path)
    return arguments


def _load(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_bytes())
