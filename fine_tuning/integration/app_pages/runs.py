"""Runs: train with other parameters; what earlier runs gave, as a table and curves."""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import stamp
from fine_tuning.integration import runs_view
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_jobs import busy, say_failure, show_job, show_loss, start
from fine_tuning.integration.app_parts import button, plain
from fine_tuning.integration.jobs import dvc_command
from fine_tuning.integration.runs_view import Line, Parameter

EXPERIMENT = "dvc exp run"
USUAL = ("train.learning_rate", "train.epochs", "train.lora.rank", "prepare.max_train_tokens")
TABLE_SECONDS = 300
# change when a run has ended or a parameter was edited
RECORDS = ("dvc.lock", "params.yaml", ".git/HEAD", ".git/logs/HEAD", "mlflow.db")


def page() -> None:
    here = app()
    st.title("Runs")
    say_failure(here.checkout)
    _start(here)
    _table(here)


# -------------------------------------------------------------------------------------------------------------- start


def _start(here: App) -> None:
    """The training form: the parameters that somebody chose to change, each with its bounds and its comment."""
    path = here.checkout / "params.yaml"
    parameters = {parameter.name: parameter for parameter in runs_view.changeable(path)}
    with st.expander("Train with other parameters", icon=":material/science:"):
        st.caption("It runs here as an experiment and leaves params.yaml as it is.")
        chosen = st.multiselect("Parameters", list(parameters), [n for n in USUAL if n in parameters], key="parameters")
        values = {name: _field(parameters[name]) for name in chosen}
        changes = {name: value for name, value in values.items() if value != parameters[name].value}
        try:
            arguments, problem = runs_view.overrides(path, changes), None
        except UserError as error:
            arguments, problem = [], str(error)
        if problem:
            st.error(plain(problem))
        off = busy() or problem or (None if changes else "nothing is changed")
        command = dvc_command("exp", "run", *arguments)
        run = EXPERIMENT, command, here.checkout, True
        button("Start the experiment", "", "experiment", start, *run, off=off, type="primary")
    show_job(EXPERIMENT)


def _field(parameter: Parameter) -> Any:
    """The widget of a parameter, with its comment; returns its value."""
    name, value, form = parameter.name, parameter.value, parameter.forms[0]
    key, kind = f"set-{name}", form.get("type")
    if kind == "boolean":
        found: Any = st.toggle(name, value, key=key)
    elif kind in ("integer", "number"):
        found = _number(parameter, int if kind == "integer" else float, form)
    elif "enum" in form and len(parameter.forms) == 1:
        found = st.selectbox(name, form["enum"], form["enum"].index(value), key=key)
    else:
        shown = ", ".join(value) if isinstance(value, list) else value or ""
        found = st.text_input(name, shown, key=key) or (None if parameter.optional else "")
        if any(other.get("type") == "array" for other in parameter.forms) and found not in form.get("enum", ()):
            found = [word.strip() for word in found.split(",")]
    st.caption(plain(parameter.comment))
    return found


def _number(parameter: Parameter, kind: type, form: dict[str, Any]) -> float | None:
    low, high = form.get("minimum", form.get("exclusiveMinimum")), form.get("maximum", form.get("exclusiveMaximum"))
    value, low, high = (None if number is None else kind(number) for number in (parameter.value, low, high))
    step, style = (1, None) if kind is int else (float(f"{(value or 1) / 10:.0e}"), "%g")
    empty = "null" if parameter.optional else "as it is"
    found = st.number_input(
        parameter.name, low, high, value, step, style, key=f"set-{parameter.name}", placeholder=empty
    )
    return parameter.value if found is None and not parameter.optional else found


# ------------------------------------------------------------------------------------------------------------- results


def _table(here: App) -> None:
    st.header("All runs")
    with st.spinner("Asking DVC and MLflow…"):
        lines = _lines(str(here.checkout), tuple(stamp(here.checkout / file) for file in RECORDS))
    runs_view.record_lines(lines)
    if button("Refresh", "refresh", "refresh", type="tertiary"):
        _lines.clear()
        st.rerun()
    names = runs_view.numeric(lines)
    shown = st.multiselect("Metrics", names, names[:3], key="metrics", format_func=_short)
    against = lines[0]
    rows = [
        {"what": line.kind, "name": line.name, "when": line.when, "status": line.status}
        | {_short(name): line.metrics.get(name) for name in shown}
        | {"parameters that differ": _assignments(line, against)}
        for line in lines
    ]
    when = st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm")
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config={"when": when})
    labels = {line.name if line.kind == "workspace" else f"{line.kind} {line.name}": line for line in reversed(lines)}
    _curves(here.checkout, labels)
    _differences(labels)


def _assignments(line: Line, against: Line) -> str:
    if line is against or line.kind == "MLflow run":
        return ""
    return ", ".join(f"{name}={value}" for name, value in runs_view.changed(line, against).items())


def _short(metric: str) -> str:
    return metric.removeprefix("evaluation.").removesuffix(".value")


def _curves(checkout: Path, labels: dict[str, Line]) -> None:
    st.header("Loss")
    with_runs = [label for label, line in reversed(labels.items()) if line.run_id is not None]
    chosen = st.multiselect("Runs", with_runs, with_runs[:1], key="curves")
    frames = []
    for label in chosen:
        history = pd.DataFrame(runs_view.loss_history(checkout, str(labels[label].run_id)))
        frames.append(history.assign(run=label))
    path = checkout / runs_view.LOSS
    if not frames and path.is_file():
        frames.append(pd.read_csv(path)[["step", "loss"]].assign(run="workspace"))
    frames = [frame for frame in frames if "loss" in frame]
    if frames:
        show_loss(pd.concat(frames), 260, color="run")
    else:
        st.caption("No training yet.")


def _differences(labels: dict[str, Line]) -> None:
    st.header("What differs")
    names = list(reversed(labels))
    with st.container(horizontal=True):
        one = st.selectbox("Between", names, key="one")
        other = st.selectbox("and", names, index=min(1, len(names) - 1), key="other")
    rows = runs_view.differences(labels[one], labels[other])
    if rows:
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
    else:
        st.caption("Nothing.")


@st.cache_data(ttl=TABLE_SECONDS, show_spinner=False)
def _lines(checkout: str, stamps: object) -> list[Line]:
    here = Path(checkout)
    return runs_view.joined(runs_view.dvc_lines(here), runs_view.mlflow_lines(here))
