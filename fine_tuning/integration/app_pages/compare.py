"""Compare: two models answer the same message side by side, unnamed and in random order, until somebody votes."""

import random
from dataclasses import dataclass
from functools import partial

import streamlit as st

from fine_tuning.common.errors import UserError
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.integration import votes
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_parts import button, plain, show_text
from fine_tuning.integration.chat_models import ChatModel, Sampling, default_sampling, stream_reply
from fine_tuning.integration.reply import Reply
from fine_tuning.integration.served_examples import after_examples

REFRESH_SECONDS = 0.2
SIDES = ("Left", "Right")


@dataclass
class Duel:
    """One message, two replies on their way, and the vote. The order of `models` is the order on the page."""

    prompt: str
    models: tuple[ChatModel, ChatModel]
    sampling: Sampling
    replies: tuple[Reply, Reply]
    vote: votes.Vote | None = None
    problem: str | None = None


def page() -> None:
    st.set_page_config(layout="wide")
    here = app()
    st.title("Compare")
    models = {model.label: model for model in here.models()}
    if len(models) < 2:
        st.info("It takes two models: `make repro` makes a candidate beside the base.", icon=":material/balance:")
        return
    labels = list(models)
    with st.container(horizontal=True):
        one = st.selectbox("One model", labels, key="one-model")
        other = st.selectbox("The other", labels, index=1, key="other-model")
    prompts = read_params("evaluate", EvaluateSettings).test_prompts
    st.pills("Test prompts", prompts, key="test", on_change=_take_test_prompt)
    with st.form("ask", clear_on_submit=False, border=False):
        prompt = st.text_area("Message for both", key="prompt", height=100)
        asked = st.form_submit_button("Ask both", type="primary", icon=":material/send:", key="ask-both")
    if asked and prompt.strip():
        if one == other:
            st.warning("Choose two different models.")
        else:
            st.session_state["duel"] = _ask(here, prompt, models[one], models[other])
    duel: Duel | None = st.session_state.get("duel")
    if duel is not None:
        if any(reply.writing for reply in duel.replies):
            _writing(duel)
        else:
            _replies(duel)
            _judge(here, duel)
    _standings(here)


def _take_test_prompt() -> None:
    st.session_state["prompt"] = st.session_state["test"] or ""


def _ask(here: App, prompt: str, one: ChatModel, other: ChatModel) -> Duel:
    models = (one, other) if random.random() < 0.5 else (other, one)
    sampling, messages = default_sampling(here.settings), [{"role": "user", "content": prompt}]
    given = {"checkout": here.checkout, "settings": here.settings, "client": here.client()}

    def reply(model: ChatModel) -> Reply:
        examples, system_prompt = here.before(model, messages, sampling.max_tokens)
        asked = after_examples(messages, examples)
        return Reply(partial(stream_reply, model, asked, sampling, system_prompt=system_prompt, **given))

    left, right = map(reply, models)
    return Duel(prompt, models, sampling, (left, right))


@st.fragment(run_every=REFRESH_SECONDS)
def _writing(duel: Duel) -> None:
    if not any(reply.writing for reply in duel.replies):
        st.rerun()
    _replies(duel)
    if button("Stop both", "stop_circle", "stop-both"):
        for reply in duel.replies:
            reply.stop()
        st.rerun()


def _replies(duel: Duel) -> None:
    for column, side, model, reply in zip(st.columns(2, border=True), SIDES, duel.models, duel.replies, strict=True):
        with column:
            # Neither speed nor name: both would reveal the model.
            st.markdown(f"**{side if duel.vote is None else plain(model.label)}**")
            show_text(reply.text + (" ▌" if reply.writing else ""))
            if reply.error:
                st.error(plain(reply.error))


def _judge(here: App, duel: Duel) -> None:
    if duel.problem:
        st.error(plain(duel.problem))
    if duel.vote is not None:
        st.caption(f"Your vote: {_vote_label(duel)}. It is in the log as a preference where it decides.")
        return
    if any(reply.state != "complete" or not reply.text.strip() for reply in duel.replies):
        st.caption("Only whole replies are voted on: ask both again.")
        return
    st.markdown("Which is better?")
    with st.container(horizontal=True):
        for label, vote in (("Left", "first"), ("Right", "second"), ("As good", "tie"), ("Both bad", "both bad")):
            st.button(label, key=f"vote-{vote}", on_click=_vote, args=(here, duel, vote))


def _vote_label(duel: Duel) -> str:
    if duel.vote in ("first", "second"):
        return plain(duel.models[0 if duel.vote == "first" else 1].label)
    return str(duel.vote)


def _vote(here: App, duel: Duel, vote: votes.Vote) -> None:
    replies = (duel.replies[0].text, duel.replies[1].text)
    try:
        votes.record(here.checkout, here.logger, duel.prompt, replies, duel.models, vote, duel.sampling, here.person)
        duel.vote, duel.problem = vote, None
    except UserError as error:
        duel.problem = str(error)


def _standings(here: App) -> None:
    found = votes.standings(votes.read(here.checkout))
    if not found:
        return
    st.subheader("Votes so far")
    for one, other, rate in found:
        st.markdown(f"**{plain(one)}** against **{plain(other)}**: {plain(str(rate))}")
