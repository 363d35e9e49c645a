"""Models: the candidate and its verdict, the registry's versions, and the switches, each with its confirmation."""

from pathlib import Path

import pandas as pd
import streamlit as st

from fine_tuning.integration import models_view
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_jobs import busy, confirm, say_failure, show_job
from fine_tuning.integration.app_parts import button, plain
from fine_tuning.integration.models_view import PROMOTE, Candidate, RegistryState
from fine_tuning.model_management.model_registry import ModelRegistry, ModelVersion, open_registry
from fine_tuning.training.tracking import has_store

COLOURS = {"PROMOTE": "green", "HOLD": "red", "INCONCLUSIVE": "orange"}
TITLES = ("Promote", "Deploy", "Switch", "Roll back")
REPORT_HEIGHT = 800
PROMOTION = (
    "The candidate becomes a version in the registry and the champion; the current champion becomes `previous`. What "
    "answers in Ollama stays until you deploy."
)


def page() -> None:
    if len(st.session_state.get("reports", ())) > 1:
        st.set_page_config(layout="wide")
    here = app()
    st.title("Models")
    say_failure(here.checkout)
    show_job(*TITLES)
    _candidate(here, models_view.candidate(here.checkout))
    st.header("Versions")
    if not has_store(here.checkout):
        st.info("No version yet: the first promotion registers one.", icon=":material/inventory_2:")
        return
    with st.spinner("Opening the registry…"):
        registry = _registry(str(here.checkout), here.name)
        state = models_view.registry_state(registry, here.probe())
    if state.server_error:
        st.warning(plain(state.server_error), icon=":material/cloud_off:")
    if not state.versions:
        st.info("No version yet: the first promotion registers one.", icon=":material/inventory_2:")
        return
    rows = [models_view.row(version, state.live) for version in reversed(state.versions)]
    registered = st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm")
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config={"registered": registered})
    _version(here, registry, state)
    _reports(here, registry, state.versions)


def _reports(here: App, registry: ModelRegistry, versions: list[ModelVersion]) -> None:
    """Reports of versions and of the candidate, several side by side; on a phone one below the other."""
    names = {f"version {version.number}": version for version in reversed(versions)}
    chosen = st.multiselect("Reports", [*names, "the candidate"], key="reports", placeholder="one, or two side by side")
    for name, column in zip(chosen, st.columns(max(1, len(chosen))), strict=False):
        version, path = names.get(name), here.checkout / models_view.REPORT
        found = (
            registry.read(version, "reports/report.html") if version else path.read_bytes() if path.is_file() else None
        )
        made = f" · {version.created_at:%Y-%m-%d} · commit {version.tags.get('git_commit', '')[:10]}" if version else ""
        column.caption(f"{name}{made}" if found else f"{name}: no report is kept")
        if found:
            column.iframe(models_view.as_page(found), height=REPORT_HEIGHT, alt=f"Report of {name}")


@st.cache_resource(show_spinner=False)
def _registry(checkout: str, name: str) -> ModelRegistry:
    return open_registry(name, Path(checkout))


# ---------------------------------------------------------------------------------------------------------- candidate


def _candidate(here: App, found: Candidate | None) -> None:
    with st.container(border=True):
        st.header("Candidate")
        if found is None:
            st.markdown("No comparison yet: train on the page Home.")
            return
        st.badge(found.verdict, color=COLOURS.get(found.verdict, "gray"))
        st.markdown("\n".join(f"- {plain(reason)}" for reason in found.reasons))
        obstacle = found.obstacle or busy()
        with st.container(horizontal=True):
            gate = None if found.verdict == PROMOTE else f"the verdict is {found.verdict}"
            if button("Promote", "workspace_premium", "promote", off=obstacle or gate, type="primary"):
                confirm(here.checkout, "Promote", _promotion(here), PROMOTION)
            if gate and st.button("Promote anyway…", key="force", disabled=bool(obstacle), help=obstacle):
                against = f"The verdict is **{found.verdict}**. The reason that you give is recorded. {PROMOTION}"
                confirm(here.checkout, "Promote", (*_promotion(here), "--force"), against, reason=True)
        if reason := obstacle or gate:
            st.caption(f"Promotion is off: {plain(reason)}.")
        report = here.checkout / models_view.REPORT
        if report.is_file() and st.toggle("Show the report", key="report"):
            st.iframe(models_view.as_page(report.read_bytes()), height=REPORT_HEIGHT, alt="Report")


# ----------------------------------------------------------------------------------------------------------- versions


def _version(here: App, registry: ModelRegistry, state: RegistryState) -> None:
    numbers = [version.number for version in reversed(state.versions)]
    number = st.selectbox("Version", numbers, key="version")
    version = next(version for version in state.versions if version.number == number)
    current = state.live.version if state.live else None
    off = busy() or ("Ollama does not answer" if state.server_error else None)
    with st.container(horizontal=True):
        deploy = off or ("it is live already" if current == number else None)
        switch = off or _why_no_switch(number, current, state)
        back = off or (None if state.earlier else "nothing was live before")
        if button("Deploy", "rocket_launch", "deploy", off=deploy):
            what = f"Version {number} is put on Ollama, proved, and answers."
            confirm(here.checkout, "Deploy", ("deploy", str(number)), what)
        if button("Switch to it", "swap_horiz", "switch", off=switch):
            confirm(here.checkout, "Switch", ("switch", str(number)), f"Version {number} answers from now on.")
        if button("Roll back", "undo", "rollback", off=back):
            confirm(here.checkout, "Roll back", ("rollback",), f"Version {state.earlier[-1]} answers again.")
    reasons: dict[str, list[str]] = {}
    for name, reason in (("Deploy", deploy), ("Switch", switch), ("Roll back", back)):
        if reason:
            reasons.setdefault(reason, []).append(name)
    if reasons:
        st.caption(" ".join(f"{', '.join(names)}: off, {plain(reason)}." for reason, names in reasons.items()))
    _about(registry, version, current == number)


def _why_no_switch(number: int, current: int | None, state: RegistryState) -> str | None:
    if current == number:
        return "it is live already"
    return None if number in state.deployed else "it is not on Ollama: deploy it"


def _promotion(here: App) -> tuple[str, ...]:
    """Promote in the name of whoever is signed in; the command knows git's name by itself."""
    return ("promote", *(("--by", here.person) if here.person else ()))


def _about(registry: ModelRegistry, version: ModelVersion, live: bool) -> None:
    tags = version.tags
    st.badge(tags.get("verdict", "no verdict"), color=COLOURS.get(tags.get("verdict", ""), "gray"))
    if forced := tags.get("forced_reason"):
        st.markdown(f"Forced: {plain(forced)}")
    if reasons := models_view.reasons(registry, version):
        st.markdown("\n".join(f"- {plain(reason)}" for reason in reasons))
    names = [f"version {version.number}", *version.aliases]
    st.graphviz_chart(models_view.lineage(tags, names, live), width="content")
    with st.expander("Tags"):
        st.dataframe(pd.DataFrame(sorted(tags.items()), columns=["tag", "value"]), hide_index=True, width="stretch")
