"""Runs: start the pipeline or an experiment and watch it; what earlier ones gave, as a table and curves."""

from pathlib import Path

import pandas as pd
import streamlit as st

from fine_tuning.common.errors import UserError
from fine_tuning.integration import runs_view
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_jobs import show_job, start
from fine_tuning.integration.app_text import plain
from fine_tuning.integration.jobs import dvc_command, jobs
from fine_tuning.integration.runs_view import Line

REPRO, EXPERIMENT = "dvc repro", "dvc exp run"
TABLE_SECONDS = 300


def page() -> None:
    """The whole page."""
    here = app()
    st.title("Runs")
    _start(here)
    _table(here)


# -------------------------------------------------------------------------------------------------------------- start


def _start(here: App) -> None:
    busy = f"{jobs.running.title} is running" if jobs.running is not None else None
    with st.container(border=True):
        with st.container(horizontal=True):
            st.button(
                "Start dvc repro", icon=":material/play_arrow:", type="primary", key="repro",
                disabled=busy is not None, help=busy or "Run what is out of date, up to the verdict",
                on_click=start, args=(REPRO, dvc_command("repro"), here.checkout, True),
            )  # fmt: skip
            with st.popover("Start an experiment", icon=":material/science:", disabled=busy is not None):
                text = st.text_area(
                    "Changed parameters", key="overrides", placeholder="train.learning_rate=1.0e-4\ntrain.epochs=2"
                )
                st.caption(
                    "It runs here and leaves params.yaml as you set it: `dvc exp apply` brings another one back."
                )
                try:
                    arguments, problem = runs_view.overrides(text), None
                except UserError as error:
                    arguments, problem = [], str(error)
                if problem:
                    st.error(plain(problem))
                st.button(
                    "Start it", key="experiment", type="primary", disabled=not arguments,
                    on_click=start, args=(EXPERIMENT, dvc_command("exp", "run", *arguments), here.checkout, True),
                )  # fmt: skip
        for title in (REPRO, EXPERIMENT):
            show_job(title)


# ------------------------------------------------------------------------------------------------------------- results


def _table(here: App) -> None:
    st.subheader("All runs")
    with st.spinner("Asking DVC and MLflow…"):
        lines = _lines(str(here.checkout), _stamp(here.checkout))
    if st.button("Refresh", icon=":material/refresh:", key="refresh", type="tertiary"):
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
    st.subheader("Loss")
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
        st.line_chart(pd.concat(frames), x="step", y="loss", color="run", height=260)
    else:
        st.caption("No training yet.")


def _differences(labels: dict[str, Line]) -> None:
    st.subheader("What differs")
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
def _lines(checkout: str, stamp: tuple[int, ...]) -> list[Line]:
    here = Path(checkout)
    return runs_view.joined(runs_view.dvc_lines(here), runs_view.mlflow_lines(here))


def _stamp(checkout: Path) -> tuple[int, ...]:
    """Changes when a run has ended or a parameter was edited."""
    files = ("dvc.lock", "params.yaml", ".git/HEAD", ".git/logs/HEAD", "mlflow.db")
    return tuple((checkout / file).stat().st_mtime_ns if (checkout / file).exists() else 0 for file in files)
