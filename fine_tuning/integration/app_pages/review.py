"""Review: which of two replies is better, one pair after the other. Whose they are is not shown, nor who is ahead."""

from pathlib import Path

import streamlit as st

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import EVALUATION, person_name
from fine_tuning.common.records import stamp
from fine_tuning.evaluation import review
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_parts import plain, show_text
from fine_tuning.integration.review_pairs import open_pairs
from fine_tuning.schema.conversation import short_hash
from fine_tuning.schema.votes import Choice

REFRESH_SECONDS = 0.5
ANSWERS: tuple[tuple[str, str, Choice], ...] = (
    ("1 is better", "1", "left"), ("2 is better", "2", "right"), ("As good", "3", "tie"), ("Both bad", "4", "both bad"),
)  # fmt: skip
"""Label, key and what it says"""


def page() -> None:
    st.set_page_config(layout="wide")
    here = app()
    st.title("Review")
    try:
        found = _review(here)
        shown = found.current()
    except UserError as error:
        st.info(plain(str(error)), icon=":material/how_to_vote:")
        return
    total = len(found.pairs.order)
    st.progress(found.done / total, f"{found.done} of {count_of(total, 'prompt')} done")
    if shown is not None:
        _pair(shown)
        _buttons(found, shown)
    elif found.queue():
        _writing(found)
    else:
        st.success("Every pair is voted on.", icon=":material/check:")
    _finish(here, found)


def _review(here: App) -> review.Review:
    """This visitor's; a new one where candidate, champion or data changed."""
    models = (review.CANDIDATE.gguf, review.ADAPTER, review.CHAMPION, EVALUATION)
    files = (*models, review.TEST, review.TRAIN, Path("params.yaml"))
    key = short_hash([stamp(path) for path in files])
    person = here.person or person_name(None)
    if st.session_state.get("review-of") != (key, person):
        with st.spinner("Reading the held-out prompts…"):
            st.session_state["review"] = review.Review(_pairs(key), person)
        st.session_state["review-of"] = (key, person)
    return st.session_state["review"]


@st.cache_resource(show_spinner=False, max_entries=1)
def _pairs(key: str) -> review.Pairs:
    return open_pairs()


@st.fragment(run_every=REFRESH_SECONDS)
def _writing(found: review.Review) -> None:
    try:
        ready = found.current() is not None or not found.queue()
    except UserError:
        ready = True  # the page says why
    if ready:
        st.rerun()
    st.caption("The models are writing their replies…")


def _pair(shown: review.Shown) -> None:
    for message in shown.item.history:
        if message["role"] != "system":
            with st.chat_message("user" if message["role"] == "user" else "assistant"):
                show_text(message["content"], typed=message["role"] == "user")
    for column, number, reply in zip(st.columns(2, border=True), "12", (shown.left, shown.right), strict=True):
        with column:
            st.markdown(f"**{number}**")
            show_text(reply.text or "(nothing)")
            if not reply.finished:
                st.caption("cut off")


def _buttons(found: review.Review, shown: review.Shown) -> None:
    with st.bottom, st.container(horizontal=True):  # in view however long the replies are
        for label, key, answer in ANSWERS:
            st.button(label, key=f"answer-{key}", shortcut=key, on_click=_do, args=(found, shown, answer))
        st.button("Skip", key="skip", shortcut="s", type="tertiary", on_click=found.skip, args=(shown,))
        nothing = found.last is None
        st.button("Undo", "undo", on_click=_undo, args=(found,), shortcut="u", type="tertiary", disabled=nothing)


def _do(found: review.Review, shown: review.Shown, answer: Choice) -> None:
    try:
        found.vote(shown, answer)
    except UserError as error:
        st.toast(plain(str(error)), icon=":material/error:")


def _undo(found: review.Review) -> None:
    if not found.undo():
        st.toast("Nothing to take back: the vote was handed over.")


def _finish(here: App, found: review.Review) -> None:
    st.divider()
    with st.container(horizontal=True):
        if here.owner and st.button("Hand the votes over", key="seal", icon=":material/inventory_2:"):
            try:
                count = review.seal_votes()
                st.success(f"{count_of(count, 'vote')} in data/votes: the next `dvc repro` counts them.")
            except UserError as error:
                st.error(plain(str(error)), icon=":material/error:")
        if st.button("Results", key="results", type="tertiary", help="Votes after this are marked."):
            st.markdown("  \n".join(plain(line) for line in found.result_lines()))
