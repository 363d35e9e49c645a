"""Home: what the app is for, where things stand, and the button that trains on what is new."""

import streamlit as st

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import changes_by_hand
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import about, round_seconds
from fine_tuning.integration import data_view, models_view
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_jobs import busy, confirm, say_failure, show_job, start
from fine_tuning.integration.app_parts import button, plain, read_conversations
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.chat_models import WHY_FIRST, ChatModel
from fine_tuning.integration.conversation_index import counts
from fine_tuning.integration.jobs import own_command
from fine_tuning.integration.models_view import Candidate
from fine_tuning.integration.registered_models import live_since
from fine_tuning.integration.round_policy import WATCH_LOCK, RoundsSettings, is_locked, waits_for

TRAIN, SEAL, BACK, STOP = "Train", "Seal", "Back", "Stop the canary"
IN_SHORT = {
    "PROMOTE": "The candidate is better",
    "HOLD": "Something speaks against the candidate",
    "INCONCLUSIVE": "There is too little evidence for or against the candidate",
}
GO_BACK = (
    "Results and models become those of the newest earlier commit whose candidate was worth promoting. The present "
    "state is committed first. Conversations, the champion and what is live stay."
)


def page() -> None:
    here = app()
    read_conversations(here.checkout)
    total, logged, sealed = counts(here.checkout)
    candidate = models_view.candidate(here.checkout)
    st.title("Whetstone")
    st.markdown("Sharpen the model behind your chats on the chats themselves. Nothing leaves this machine.")
    steps = _steps(here, total, logged + sealed, candidate)
    for column, (name, step, text) in zip([*st.columns(2), *st.columns(2)], steps, strict=True):
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{step}**")
            st.markdown(text)
            if (target := st.session_state.get("pages", {}).get(name)) is not None:
                st.page_link(target)
    _how_it_does(here)
    if here.owner:
        _train(here, logged, bool(logged + sealed) or candidate is None)


def _steps(here: App, total: int, new: int, candidate: Candidate | None) -> list[tuple[str, str, str]]:
    """(page, title, what is true now) of each step."""
    models = here.models()
    verdict = "No verdict yet."
    if candidate is not None:
        reason = f": {candidate.reasons[0]}" if candidate.reasons else ""
        verdict = f"{candidate.verdict}. {IN_SHORT.get(candidate.verdict, 'See the report')}{reason}."
    first = WHY_FIRST.get(models[0].name, models[0].label) if models else "no model yet"
    live = next((_live(here, m) for m in models if m.name == "Live"), f"Nothing is live. New chats: {first}.")
    return [
        ("chat", "1 · Chat", f"{count_of(total, 'conversation')}. Thumbs and edits say what a good reply is."),
        ("data", "2 · Train", f"{new:,} new or changed since the last training."),
        ("models", "3 · Judge", plain(verdict)),
        ("models", "4 · Promote", plain(live)),
    ]


def _live(here: App, model: ChatModel) -> str:
    since = model.version and live_since(here.checkout, here.name, here.host, model.version)
    return f"Live: {model.label}" + (f", since {since.astimezone():%Y-%m-%d %H:%M}." if since else ".")


def _how_it_does(here: App) -> None:
    """How people like it, how the canary does, how the last round failed, and what the next one waits for."""
    with st.container():
        if liked := data_view.liked(here.checkout):
            st.markdown(plain(f"{liked[0].upper()}{liked[1:]}."))
        say_failure(here.checkout)
        canary = Canary(here.checkout)
        state = canary.state()
        if state is not None and state.outcome is None:
            st.markdown(plain(f"Canary: {state.tag} answers {state.share:.0%} of new chats. {canary.counts()}."))
            if here.owner:
                stop = own_command("canary", "--stop")
                button(STOP, "front_hand", "stop-canary", start, STOP, stop, here.checkout, off=busy())
        elif state is not None:
            st.markdown(plain(f"The canary of {state.tag} is {state.outcome}: {state.why}."))
        if is_locked(here.checkout / WATCH_LOCK):
            waits = "; ".join(waits_for(here.checkout, read_params("rounds", RoundsSettings)))
            st.caption(plain(f"The next round waits: {waits}." if waits else "The next round begins within a minute."))
        show_job(STOP)


def _train(here: App, logged: int, anything: bool) -> None:
    try:
        changed = changes_by_hand(here.checkout)
        why = f"{count_of(len(changed), 'file')} changed and not committed: {changed[0]}" if changed else None
    except UserError as error:
        why = str(error)
    off = busy() or why
    with st.container(border=True):
        with st.container(horizontal=True):
            train = TRAIN, own_command("round"), here.checkout, True
            button("Train on what's new", "model_training", "train", start, *train, off=off, type="primary")
            sealing = busy() or (None if logged else "nothing was said since the last seal")
            note = "Hand what was said to the pipeline; deleting it cannot be undone then"
            seal = SEAL, own_command("seal"), here.checkout
            button("Seal only", "lock", "seal", start, *seal, off=sealing, help=note)
            if button("Back to the last good state", "undo", "back", off=off):
                confirm(here.checkout, BACK, ("round", "--back"), GO_BACK)
        if why:
            st.caption(f"Training is off: {plain(why)}.")
        elif not anything:
            st.caption("Nothing is new: only what you changed and committed would run.")
        else:
            st.caption(
                f"It takes {about(round_seconds(here.checkout))}: seal, clean, train, judge, and commit the result. "
                "You can chat meanwhile."
            )
        show_job(TRAIN, SEAL, BACK)
