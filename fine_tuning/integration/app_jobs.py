"""How pages show a command that runs, and what came of the last one."""

from pathlib import Path

import streamlit as st

from fine_tuning.common.errors import UserError
from fine_tuning.common.stage_times import about, expected_seconds, seconds_left
from fine_tuning.integration.app_text import plain
from fine_tuning.integration.jobs import Job, jobs
from fine_tuning.integration.parameters import check_all_params

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


def show_job(title: str | None = None) -> None:
    """The command that runs, live, with a stop button; or what came of the last one. `title`: only of this one."""
    job = jobs.latest
    if job is None or (title is not None and job.title != title):
        return
    if job.running:
        _live(job)
        return
    stopped_or_failed = job.stopped or job.returncode != 0
    say = st.warning if job.stopped else st.error if stopped_or_failed else st.success
    say(f"{job.title}: {plain(job.outcome())}", icon=":material/error:" if stopped_or_failed else ":material/check:")
    with st.expander("Its output"):
        st.code("\n".join(job.lines()[-200:]) or "(none)", language=None, wrap_lines=True)


@st.fragment(run_every=REFRESH_SECONDS)
def _live(job: Job) -> None:
    if not job.running:
        st.rerun()
    expected = expected_seconds(Path.cwd())
    done = [stage for stage in job.stages() if stage in expected]
    note = f"{job.title} · {job.seconds:.0f} s"
    if done:
        left = seconds_left(Path.cwd(), done[-1])
        share = 1 - left / sum(expected.values())
        st.progress(share, f"{note} · stage {done[-1]}, {about(left)} from its start to the verdict")
    else:
        st.caption(note)
    st.code("\n".join(job.lines()[-SHOWN_LINES:]) or "…", language=None, wrap_lines=True)
    if st.button("Stop", icon=":material/stop_circle:", key="stop-job"):
        job.stop()
        st.rerun()
