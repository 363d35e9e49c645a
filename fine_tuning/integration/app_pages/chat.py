"""Chat: talk to a model, judge what it says. Every exchange is in the log before the page shows it as done."""

from collections.abc import Iterator

import streamlit as st

from fine_tuning.integration import chat_history
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.chat_models import NO_MODEL, ChatModel, Sampling, stream_reply
from fine_tuning.integration.chat_session import Question, ask, desk, new_conversation_id
from fine_tuning.integration.reply_markdown import pieces

LOOK_SECONDS = 0.15  # how often the page looks at a reply that is being written
THUMBS = {1: 1, -1: 0}  # a rating as st.feedback counts
INCOMPLETE = {"stopped": "stopped by you, left out of training", "failed": "broke off, left out of training"}


def page() -> None:
    """The whole page."""
    here = app()
    found = chat_history.conversations(here.checkout, here.logger)
    identity = _current_id()
    _sidebar(here, found, identity)
    conversation = next((c for c in found if c["id"] == identity), None)
    models = here.models()
    if not models:
        st.info(NO_MODEL, icon=":material/construction:")
        _show_messages(here, conversation, None)
        return
    model, sampling, system_prompt = _top(here, models)
    question = desk.of(identity)
    _show_messages(here, conversation, question)
    if not conversation and not question:
        st.caption(f"Ask {model.label} something. What you say stays on this machine and can train the next version.")
    if question is not None:
        _show_question(here, question, conversation, sampling, system_prompt)
    text = st.chat_input(
        "Your message", key="message", disabled=question is not None and question.waiting, max_chars=20_000
    )
    if text and text.strip():
        _send(here, Question(identity, text, model), conversation, sampling, system_prompt)
        st.rerun()


# ---------------------------------------------------------------------------------------------------- what is on top


def _current_id() -> str:
    """The conversation that the address names, so that a reload or a bookmark finds it; otherwise a new one."""
    if "chat" not in st.query_params:
        st.query_params["chat"] = st.session_state.setdefault("new_chat", new_conversation_id())
    return st.query_params["chat"]


def _open(identity: str) -> None:
    st.query_params["chat"] = identity


def _sidebar(here: App, found: list[dict], current: str) -> None:
    with st.sidebar:
        if st.button("New chat", icon=":material/edit_square:", width="stretch", key="new"):
            st.session_state["new_chat"] = new_conversation_id()
            _open(st.session_state["new_chat"])
            st.rerun()
        titles = chat_history.read_titles(here.checkout)
        words = st.text_input("Search", placeholder="Search", label_visibility="collapsed", key="search")
        for conversation in chat_history.matching(found, words or "", titles)[:50]:
            st.button(
                _plain(chat_history.title(conversation, titles)),
                key=f"open-{conversation['id']}",
                type="primary" if conversation["id"] == current else "tertiary",
                on_click=_open,
                args=(conversation["id"],),
                width="stretch",
            )


def _top(here: App, models: list[ChatModel]) -> tuple[ChatModel, Sampling, str | None]:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        model = st.selectbox(
            "Model that answers", models, format_func=lambda model: model.label, key="model", width="stretch"
        )
        with st.popover("Settings", icon=":material/tune:"):
            defaults = here.settings
            temperature = st.slider("Temperature", 0.0, 2.0, defaults.temperature, 0.05, key="temperature")
            top_p = st.slider("Top p", 0.05, 1.0, defaults.top_p, 0.05, key="top_p")
            longest = st.number_input("Longest reply, tokens", 1, 8192, defaults.max_tokens, key="max_tokens")
            given = st.text_area(
                "System prompt", here.chat.system_prompt or "", key="system_prompt",
                placeholder="the model's own, as in training",
                help="Another one than in training (chat.system_prompt in params.yaml) makes the model answer worse.",
            )  # fmt: skip
    sampling = Sampling(temperature=float(temperature), top_p=float(top_p), max_tokens=int(longest))
    return model, sampling, given.strip() or here.chat.system_prompt


# ------------------------------------------------------------------------------------------------- what was said


def _show_messages(here: App, conversation: dict | None, question: Question | None) -> None:
    for message in conversation["messages"] if conversation else []:
        if message["role"] not in ("user", "assistant"):
            continue
        with st.chat_message(message["role"]):
            show_text(message["content"], typed=message["role"] == "user")
            if message["role"] == "assistant":
                _below_reply(here, conversation, message)


def _below_reply(here: App, conversation: dict, message: dict) -> None:
    entry = next((e for e in conversation["feedback"] if e.get("message_id") == message["id"]), {})
    with st.container(horizontal=True, vertical_alignment="center"):
        st.feedback(
            "thumbs",
            key=f"thumbs-{message['id']}",
            default=THUMBS.get(entry.get("rating")),
            on_change=_judge,
            args=(here, conversation["id"], message["id"]),
        )
        st.caption(_plain(_origin(message)))


def _origin(message: dict) -> str:
    """Who wrote a reply."""
    parts = [message.get("model") or "unknown model"]
    if message.get("version") is not None:
        parts.append(f"version {message['version']}")
    if message.get("incomplete"):
        parts.append(INCOMPLETE.get(message["incomplete"], "incomplete, left out of training"))
    return " · ".join(parts)


def _judge(here: App, conversation_id: str, message_id: str) -> None:
    thumb = st.session_state[f"thumbs-{message_id}"]
    rating = None if thumb is None else (1 if thumb == 1 else -1)
    here.logger.log_feedback(message_id, rating, conversation_id=conversation_id)


# ------------------------------------------------------------------------------------------------ what is on its way


def _send(
    here: App, question: Question, conversation: dict | None, sampling: Sampling, system_prompt: str | None
) -> None:
    said = [
        {"role": message["role"], "content": message["content"]}
        for message in (conversation["messages"] if conversation else [])
    ]
    messages = [*said, {"role": "user", "content": question.text}]

    def stream() -> Iterator[str]:
        return stream_reply(
            question.model,
            messages,
            sampling,
            checkout=here.checkout,
            system_prompt=system_prompt,
            settings=here.settings,
            client=client,
        )

    client = here.client()
    ask(question, stream, here.logger, sampling, system_prompt)


def _show_question(
    here: App, question: Question, conversation: dict | None, sampling: Sampling, system_prompt: str | None
) -> None:
    if question.exchange_id is None:
        with st.chat_message("user"):
            show_text(question.text, typed=True)
    if question.waiting:
        with st.chat_message("assistant"):
            _writing(question)
        return
    st.error(question.problem or "no reply came", icon=":material/error:")
    if st.button("Try again", icon=":material/refresh:", key="again"):
        desk.drop(question.conversation_id)
        _send(here, Question(question.conversation_id, question.text, question.model), conversation, sampling,
              system_prompt)  # fmt: skip
        st.rerun()


@st.fragment(run_every=LOOK_SECONDS)
def _writing(question: Question) -> None:
    reply = question.reply
    assert reply is not None
    if not reply.writing:
        st.rerun()
    if reply.text:
        show_text(reply.text + " ▌")
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Stop", icon=":material/stop_circle:", key="stop"):
            reply.stop()
            st.rerun()
        rate = reply.tokens_per_second
        st.caption(f"{rate:.0f} tokens/s" if rate else f"thinking, {reply.seconds:.0f} s")


# ------------------------------------------------------------------------------------------------------------ text


def show_text(text: str, typed: bool = False) -> None:
    """Show what a person or a model wrote: Markdown and code, nothing that loads from elsewhere.

    `typed` keeps the line breaks that Markdown would join.
    """
    for piece in pieces(text):
        if piece.kind == "code":
            st.code(piece.text, language=piece.language or None, wrap_lines=True)
        else:
            st.markdown(piece.text.replace("\n", "  \n") if typed else piece.text)


def _plain(text: str) -> str:
    """`text` for labels and captions, where Streamlit reads Markdown: nothing in it is markup."""
    return "".join(f"\\{character}" if character in r"\`*_{}[]()<>#+-.!|$:~" else character for character in text)
