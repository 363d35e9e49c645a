"""How pages show a command that runs, and what came of the last one."""

from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from fine_tuning.common.errors import UserError
from fine_tuning.common.stage_times import TRAINING, about, expected_seconds, seconds_left
from fine_tuning.integration.app_parts import button, plain
from fine_tuning.integration.jobs import Job, jobs, own_command
from fine_tuning.integration.parameters import check_all_params
from fine_tuning.integration.round_policy import last_failure

REFRESH_SECONDS = 1.0
SHOWN_LINES = 14


def start(title: str, command: list[str], checkout: Path, pipeline: bool = False) -> None:
    """Start a command from a button's callback; a refusal is a message. `pipeline`: check params.yaml first."""
    try:
        if pipeline:
            check_all_params(checkout / "params.yaml")
        jobs.start(title, command, checkout)
    except UserError as error:
        st.toast(str(error), icon=":material/error:")


def busy() -> str | None:
    return f"{jobs.running.title} is running" if jobs.running is not None else None


def say_failure(checkout: Path) -> None:
    if why := last_failure(checkout):
        st.warning(plain(f"{why[0].upper()}{why[1:]}. Everything is as it was."), icon=":material/error:")


@st.dialog("Are you sure?")
def confirm(checkout: Path, title: str, words: tuple[str, ...], what: str, reason: bool = False) -> None:
    """Start a command after a second click, with a reason as its last word where one is asked for."""
    st.markdown(what)
    why = (st.text_input("Why", key="why", max_chars=300).strip(),) if reason else ()
    if st.button(
        title, type="primary", key="confirm-now", disabled=why == ("",),
        on_click=start, args=(title, own_command(*words, *why), checkout),
    ):  # fmt: skip
        st.rerun()


def announce() -> None:
    """On every page: in the side bar how far a command is, and a notification when it has ended."""
    job = jobs.latest
    if job is not None and job.running:
        st.session_state["watched"] = job.started
        with st.sidebar:
            _live(job, brief=True)
    elif job is not None and st.session_state.pop("watched", None) == job.started:
        good = job.returncode == 0
        st.toast(f"{job.title}: {plain(job.outcome())}", icon=f":material/{'check' if good else 'error'}:")


def show_job(*titles: str) -> None:
    """The command that runs, live, with a stop button; or what came of the last one, if it has one of these titles."""
    job = jobs.latest
    if job is None or job.title not in titles:
        return
    if job.running:
        _live(job)
        return
    stopped_or_failed = job.stopped or job.returncode != 0
    say = st.warning if job.stopped else st.error if stopped_or_failed else st.success
    say(f"{job.title}: {plain(job.outcome())}", icon=":material/error:" if stopped_or_failed else ":material/check:")
    with st.expander("Its output"):
        st.code("\n".join(job.lines()[-200:]) or "(none)", language=None, wrap_lines=True)


def show_loss(curve: pd.DataFrame, height: int, **by: str) -> None:
    """Loss by step, a line for each value of the column `color`. st.line_chart draws symbols without a text."""
    st.altair_chart(alt.Chart(curve).mark_line(tooltip=True).encode(x="step", y="loss", **by), height=height)


def _how_far(job: Job) -> tuple[float, str] | None:
    """(share that is done, in words) of a command that runs the pipeline, by the time that stages took here before."""
    here, expected = Path.cwd(), expected_seconds(Path.cwd())
    stages = [stage for stage in job.stages() if stage in expected]
    if not stages:
        return None
    curve = _curve(job) if stages[-1] == "train" else None
    done = 0.0 if curve is None else float(curve["step"].iloc[-1] / curve["steps"].iloc[-1])
    left = seconds_left(here, stages[-1], done)
    return 1 - left / sum(expected.values()), f"stage {stages[-1]}, {about(left)} to the verdict"


def _curve(job: Job) -> pd.DataFrame | None:
    """Loss by step of the training that a command began; None before its first step."""
    path = Path(TRAINING)
    if not path.is_file() or path.stat().st_mtime < job.started:
        return None
    curve = pd.read_csv(path)
    return curve if len(curve) else None


@st.fragment(run_every=REFRESH_SECONDS)
def _live(job: Job, brief: bool = False) -> None:
    if not job.running:
        st.rerun()
    share, words = _how_far(job) or (0.0, "begins")
    st.progress(share, f"{job.title} · {job.seconds:.0f} s · {words}")
    if brief:
        return
    if (curve := _curve(job)) is not None:
        show_loss(curve, 180)
    with st.expander("Its output"):
        st.code("\n".join(job.lines()[-SHOWN_LINES:]) or "…", language=None, wrap_lines=True)
    if button("Stop", "stop_circle", "stop-job"):
        job.stop()
        st.rerun()
