"""Chat: talk to a model, judge what it says. Every exchange is in the log before the page shows it as done."""

import os
from dataclasses import dataclass
from functools import partial

import streamlit as st

from fine_tuning.common.errors import UserError
from fine_tuning.integration import chat_history, chat_models, chat_session, chat_settings
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_jobs import busy, show_job
from fine_tuning.integration.app_parts import button, plain, read_conversations, show_text
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.chat_models import ChatModel, Sampling, default_sampling, stream_reply, warm_up
from fine_tuning.integration.chat_session import Question, new_conversation_id, pending_replies
from fine_tuning.integration.conversation_index import conversation_index
from fine_tuning.integration.jobs import jobs, own_command
from fine_tuning.integration.reply_markdown import printable
from fine_tuning.integration.served_examples import after_examples, kind_served, sources
from fine_tuning.schema.conversation import alternatives_of, edits

REFRESH_SECONDS = 0.15  # how often the page shows a reply that is being written
LISTED = 60  # conversations in the side bar; the search finds the others
MODEL_VARIABLE = "WHETSTONE_MODEL"  # set by `make chat MODEL=…`: who answers new chats
THUMBS = {1: 1, -1: 0}  # a rating as st.feedback counts
INCOMPLETE = {"stopped": "stopped, not trained on", "failed": "broke off, not trained on"}

# Label, field, bounds, step and help of the settings of a reply.
SAMPLING = (
    ("Temperature", "temperature", 0.0, 2.0, 0.05, None),
    ("Top p", "top_p", 0.05, 1.0, 0.05, None),
    ("Top k", "top_k", 0, None, 1, "0: all tokens"),
    ("Repeat penalty", "repeat_penalty", 0.5, 2.0, 0.05, "Above 1 keeps a small model from repeating itself."),
    ("Longest reply, tokens", "max_tokens", 1, None, 1, None),
    ("Seed", "seed", 0, 2**31 - 1, 1, "The same one, with the same settings and conversation, gives the same reply."),
)


@dataclass(frozen=True)
class Asking:
    """Whom the page would ask now, and how."""

    here: App
    model: ChatModel
    sampling: Sampling
    system_prompt: str | None


def page() -> None:
    here = app()
    read_conversations(here.checkout)
    identity = _current_id()
    question, waiting, conversation = _pending_and_logged(here, identity)
    _sidebar(here, conversation, identity)
    models = here.models()
    if question is None and models and (asked := chat_session.unanswered(here.checkout).get(identity)):
        lost = "the app ended before a reply was logged: try again"
        known = {name: asked[name] for name in chat_session.ASKED if asked.get(name)}
        question = Question(identity, asked["text"], models[0], problem=lost, **known)
    if not models:
        st.info(chat_models.NO_MODEL, icon=":material/construction:")
    asking = _choose_model(here, models, identity, conversation) if models else None
    _show_conversation(here, conversation, question, asking)
    if asking is None:
        return
    if not conversation and not question:
        st.caption("What is said here stays on this machine. After `seal`, the next `dvc repro` trains on it.")
    if question is not None:
        _show_question(question, waiting, conversation, asking)
    if unsent := st.session_state.get("unsent"):
        st.warning("Not sent, for another reply of this chat was on its way:")
        show_text(unsent, typed=True)
    disabled = waiting and not st.session_state.get("message")  # what is sent already is not dropped
    text = st.chat_input("Your message", key="message", disabled=disabled)
    if text and text.strip():
        sent = _send(asking, Question(identity, text, asking.model), conversation)
        st.session_state["unsent"] = None if sent else text
        st.rerun()


def _pending_and_logged(here: App, identity: str) -> tuple[Question | None, bool, dict | None]:
    """The question on its way, whether its reply may still come, and the conversation, as they were at one time. A
    reply that ends between the two reads would be in neither: then both are read again."""
    while True:
        question = pending_replies.get(identity)
        waiting = question is not None and question.waiting
        conversation = conversation_index(here.checkout).conversation(identity, chat_history.CHAT)
        if question is None or question.waiting == waiting:
            return question, waiting, conversation


# ------------------------------------------------------------------------------------------------- conversations


def _current_id() -> str:
    """The conversation that the address names, so that a reload or a bookmark finds it; otherwise a new one."""
    if "chat" not in st.query_params:
        st.query_params["chat"] = st.session_state.setdefault("new_chat", new_conversation_id())
    return st.query_params["chat"]


def _open(identity: str) -> None:
    st.query_params["chat"] = identity


def _open_new() -> None:
    st.session_state["new_chat"] = new_conversation_id()
    _open(st.session_state["new_chat"])


def _sidebar(here: App, conversation: dict | None, current: str) -> None:
    titles = chat_history.read_titles(here.checkout)
    with st.sidebar:
        show_job(chat_history.ERASE)
        button("New chat", "edit_square", "new", _open_new, width="stretch")
        if conversation is not None:
            with st.popover("This chat", icon=":material/more_horiz:", width="stretch"):
                _manage(here, conversation, titles)
        words = st.text_input("Search", placeholder="Search chats", label_visibility="collapsed", key="search")
        for identity, asked in chat_session.unanswered(here.checkout).items():
            if identity != current and pending_replies.get(identity) is None:
                label = f"No reply yet: {plain(chat_history.shortened(asked['text']))}"
                button(label, "error", f"unanswered-{identity}", _open, identity, type="tertiary")
        listed, count = conversation_index(here.checkout).listed(chat_history.CHAT, words or "", titles, LISTED)
        shown = ""
        for entry in listed:
            if (day := chat_history.day_in_words(entry.last_spoken)) != shown:
                st.caption(shown := day)
            label = plain(titles.get(entry.id) or chat_history.shortened(entry.begins))
            shape = "secondary" if entry.id == current else "tertiary"
            button(label, "", f"open-{entry.id}", _open, entry.id, type=shape)
        if count > LISTED:
            st.caption(f"and {count - LISTED} older ones: search for them")
        _deleted(here, titles)


def _manage(here: App, conversation: dict, titles: dict[str, str]) -> None:
    identity, key = conversation["id"], f"name-{printable(conversation['id'])}"

    def rename() -> None:
        chat_history.rename(here.checkout, identity, st.session_state[key])

    st.text_input("Name", chat_history.title(conversation, titles), key=key, on_change=rename, max_chars=80)
    name = chat_history.file_name(conversation, titles)
    for form, ending, mime, text in (
        ("Markdown", "md", "text/markdown", chat_history.as_markdown(conversation, titles)),
        ("JSON", "json", "application/json", chat_history.as_json(conversation)),
    ):
        st.download_button(
            f"Export as {form}", text.encode("utf-8", "backslashreplace"), f"{name}.{ending}", mime,
            key=f"export-{form.lower()}", icon=":material/download:", width="stretch", on_click="ignore",
        )  # fmt: skip
    if here.owner:
        note = "It is hidden everywhere at once and not trained on. It can be undone until the next seal."
        button("Delete", "delete", "delete", _delete, here, identity, help=note, width="stretch")


def _delete(here: App, identity: str) -> None:
    chat_session.discard(here.checkout, identity)
    here.logger.log_delete(conversation_id=identity)
    _open_new()
    st.toast("Deleted. It can be undone under Deleted.", icon=":material/delete:")


def _undo_delete(here: App, identity: str) -> None:
    if here.logger.undo_delete(identity):
        _open(identity)
    else:
        st.toast("It was sealed meanwhile, and is deleted for good.", icon=":material/error:")


def _deleted(here: App, titles: dict[str, str]) -> None:
    """What was deleted and is still here: hidden, to be taken back, or to be erased from every place."""
    gone, count, sealed = conversation_index(here.checkout).deleted(LISTED)
    if not here.owner or not (count or chat_history.interrupted(here.checkout)):
        return
    with st.expander(f"Deleted ({count:,})", icon=":material/delete:"):
        for entry in gone:
            name = plain(titles.get(entry.id) or chat_history.shortened(entry.begins))
            button(f"Undo: {name}", "undo", f"undo-{entry.id}", _undo_delete, here, entry.id, type="tertiary")
        if sealed:
            st.caption(f"{sealed:,} more: sealed as deleted.")
        st.caption("Hidden everywhere, not trained on. Older shards and DVC's cache may hold it until it is erased.")
        if st.button("Erase for good…", key="erase", width="stretch"):
            st.session_state.pop("places", None)
            _erase(here)


@st.dialog("Erase what was deleted from every place?", width="large")
def _erase(here: App) -> None:
    try:
        if chat_history.interrupted(here.checkout):
            st.markdown("An earlier erasure was interrupted. It has to be finished first.")
            if st.button("Finish it", key="erase-further", type="primary"):
                jobs.start(chat_history.ERASE, own_command("forget", "--resume"), here.checkout)
                st.rerun()
            return
        if "places" not in st.session_state:
            with st.spinner("Looking in the log, the data, DVC's cache and remotes, git, and the registry…"):
                st.session_state["places"] = chat_history.locations(here.checkout)
        head, *places = st.session_state["places"]
        st.markdown("\n".join([plain(head), "", *(f"- {plain(place)}" for place in places)]))
        learned = any(place.startswith("model ") for place in places)
        withdraw = learned and st.checkbox("Take the models that learned from it out of use", key="withdraw")
        if button("Erase it", "delete_forever", "erase-now", off=busy(), type="primary"):
            words = ("forget", "--deleted", "--yes", *(["--withdraw"] if withdraw else []))
            jobs.start(chat_history.ERASE, own_command(*words), here.checkout)
            st.rerun()
    except UserError as error:
        st.error(plain(str(error)), icon=":material/error:")


def _choose_model(here: App, models: list[ChatModel], identity: str, conversation: dict | None) -> Asking:
    """Model and settings of this conversation. What the widgets show is what is kept on disk, with every run."""
    usual = chat_settings.Choice(**default_sampling(here.settings).model_dump())
    choice = chat_settings.read_choice(
        here.checkout, identity, conversation, here.person, usual, os.environ.get(MODEL_VARIABLE) or None
    )
    model = chat_settings.find_model(models, choice.model) or models[0]
    labels = {model.label: model for model in models}
    prompt = choice.system_prompt or here.chat.system_prompt or ""
    shown = choice.model_dump() | {"model": model.label, "system_prompt": prompt}
    st.session_state.update(shown)

    def keep(default: bool = False) -> None:
        values = {name: st.session_state[name] for name in shown}
        given = values["system_prompt"].strip()
        values["system_prompt"] = given if given != (here.chat.system_prompt or "") else None
        # A model that nobody chose stays that: another one may be first tomorrow.
        chosen = labels[values["model"]]
        values["model"] = chosen.key if chosen is not model or choice.model else None
        whose = {"person": here.person} if default else {"identity": identity}
        chat_settings.keep_choice(here.checkout, chat_settings.Choice(**values), **whose)

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("Model that answers", list(labels), key="model", width="stretch", format_func=str, on_change=keep)
        with st.popover("Settings", icon=":material/tune:"):
            for label, name, lowest, highest, step, note in SAMPLING:
                number = partial(st.number_input, value=None if name == "seed" else "min", placeholder="any")
                box = st.slider if isinstance(lowest, float) else number
                box(label, lowest, highest, step=step, key=name, help=note, on_change=keep)
            st.text_area(
                "System prompt", key="system_prompt", placeholder="the model's own, as in training", on_change=keep,
                help="The model was trained with chat.system_prompt of params.yaml: with another one it answers worse.",
            )  # fmt: skip
            st.button("Use for new chats", key="keep-default", on_click=keep, args=(True,), width="stretch")
    if choice.model and chat_settings.find_model(models, choice.model) is None:
        st.warning(
            f"{plain(choice.model)} is not here: {plain(chat_models.WHY_FIRST.get(model.name, model.label))} answers."
        )
    elif not choice.model and not conversation:
        st.caption(f"Answers: {chat_models.WHY_FIRST.get(model.name, plain(model.label))}.")
    warm_up(model, here.checkout, here.settings)
    return Asking(here, model, choice.sampling, choice.system_prompt or here.chat.system_prompt)


# ------------------------------------------------------------------------------------------------- what was said


def _show_conversation(here: App, conversation: dict | None, question: Question | None, asking: Asking | None) -> None:
    """All messages; the reply that is being asked for once more is left out until the new one is there."""
    if conversation is None:
        return
    edited = edits(conversation)
    pending = question.replaces if question is not None and question.exchange_id is None else None
    shown = [message for message in conversation["messages"] if message["role"] in ("user", "assistant")]
    for index, message in enumerate(shown):
        if pending is not None and message["id"] == pending:
            continue
        with st.chat_message(message["role"]):
            text = edited.get(message["id"]) or message["content"]
            show_text(text, typed=message["role"] == "user")
            if message["role"] == "user" and asking is not None:
                _offer_branch(asking, conversation, message)
            if message["role"] == "assistant":
                last = index == len(shown) - 1 and question is None
                _below_reply(here, conversation, message, text, shown[index - 1] if index else None,
                             asking if last else None)  # fmt: skip


def _below_reply(
    here: App, conversation: dict, message: dict, text: str, asked: dict | None, asking: Asking | None
) -> None:
    identity = message["id"]
    judged = [e for e in conversation["feedback"] if e.get("message_id") == identity]
    entry = next((e for e in judged if e.get("by") == here.person), {})
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        judge = {"on_change": _judge, "args": (here, conversation["id"], identity)}
        rating = st.feedback("thumbs", key=f"thumbs-{identity}", default=THUMBS.get(entry.get("rating")), **judge)
        if asking is not None and asked is not None and asked["role"] == "user":
            again = _regenerate, asking, conversation, message, asked["content"]
            button("Regenerate", "refresh", f"again-{identity}", *again, type="tertiary")
        if button("Edit", "edit", f"edit-{identity}", type="tertiary"):
            edit_reply(here, conversation["id"], identity, text)
        with st.popover("Copy", icon=":material/content_copy:", type="tertiary"):
            st.code(text, language=None, wrap_lines=True)
        if asked is not None and (count := (message.get("settings") or {}).get("examples")):
            with st.popover(f"answered with {count} of your conversations", type="tertiary"):
                kind = kind_served(here.checkout, str(message.get("model")))
                _examples(here, asked["content"], kind.get("examples", here.serve.examples))
        st.caption(plain(_origin(here, message, any(e.get("edited") for e in judged))))
    if rating is not None:
        st.text_input(
            "Why?", entry.get("comment") or "", key=f"why-{identity}", placeholder="Why? (optional)",
            label_visibility="collapsed", on_change=_comment,
            args=(here, conversation["id"], identity, entry.get("comment") or ""), max_chars=500,
        )  # fmt: skip
    if others := alternatives_of(message):
        _alternatives(here, conversation, message, others)


def _examples(here: App, question: str, count: int) -> None:
    """What would stand before a question now: what was forgotten or disliked meanwhile is not shown."""
    for exchange in reversed(here.examples(count).before([{"role": "user", "content": question}], 0)):
        show_text(exchange.question, typed=True)
        show_text(exchange.answer)
        st.divider()


def _origin(here: App, message: dict, edited: bool) -> str:
    """Who wrote a reply, at which temperature, and what else was not as in params.yaml."""
    parts = [message.get("model") or "unknown model"]
    if message.get("version") is not None:
        parts.append(f"version {message['version']}")
    usual = default_sampling(here.settings).model_dump() | {"system_prompt": here.chat.system_prompt}
    for name, value in (message.get("settings") or {}).items():
        if name == "system_prompt" and value != usual[name]:
            parts.append("another system prompt")
        elif name not in ("examples", "canary") and (name == "temperature" or value != usual.get(name)):
            parts.append(f"{name.replace('_', ' ')} {value}")
    if edited:
        parts.append("edited, the edit is trained on")
    elif message.get("incomplete"):
        parts.append(INCOMPLETE.get(message["incomplete"], "incomplete, not trained on"))
    return " · ".join(parts)


def _alternatives(here: App, conversation: dict, message: dict, others: list[dict]) -> None:
    edited = edits(conversation)  # what is chosen is what is shown: the edit comes back with its reply
    with st.expander(f"{len(others)} other {'reply' if len(others) == 1 else 'replies'}: which is better?"):
        prefer = _prefer, here, conversation["id"], [reply["id"] for reply in (message, *others)]
        for other in others:
            show_text(edited.get(other["id"]) or other["content"])
            button("This one is better", "thumb_up", f"prefer-{other['id']}", *prefer, other["id"])
            st.divider()
        button("The one above is better", "arrow_upward", f"prefer-{message['id']}", *prefer, message["id"])


def _prefer(here: App, conversation_id: str, replies: list[str], chosen: str) -> None:
    over = [reply for reply in replies if reply != chosen]
    here.logger.log_preference(chosen, over, here.person, conversation_id=conversation_id)
    st.toast("Kept as a preference", icon=":material/check:")


def _judge(here: App, conversation_id: str, message_id: str) -> None:
    here.logger.log_feedback(message_id, _rating(message_id), by=here.person, conversation_id=conversation_id)


def _rating(message_id: str) -> int | None:
    """The inverse of THUMBS, of a widget's state."""
    return {1: 1, 0: -1, None: None}[st.session_state[f"thumbs-{message_id}"]]


def _comment(here: App, conversation_id: str, message_id: str, before: str) -> None:
    comment = st.session_state[f"why-{message_id}"].strip()
    if comment != before:
        here.logger.log_feedback(message_id, _rating(message_id), comment, here.person, conversation_id=conversation_id)


@st.dialog("What should the reply have been?", width="large")
def edit_reply(here: App, conversation_id: str, message_id: str, text: str) -> None:
    """Ask for the reply that is trained on instead, and log it."""
    key = f"edited-{message_id}"
    st.text_area("Reply", text, height=300, key=key, label_visibility="collapsed")
    if button("Save", "", "save-edit", _save_edit, here, conversation_id, message_id, type="primary"):
        st.rerun()


def _save_edit(here: App, conversation_id: str, message_id: str) -> None:
    content = st.session_state[f"edited-{message_id}"].strip()
    if content:
        here.logger.log_edit(message_id, content, here.person, conversation_id=conversation_id)


# ------------------------------------------------------------------------------------------------ what is on its way


def _regenerate(asking: Asking, conversation: dict, message: dict, text: str) -> None:
    _send(asking, Question(conversation["id"], text, asking.model, replaces=message["id"]), conversation)


def _offer_branch(asking: Asking, conversation: dict, message: dict) -> None:
    """Go on from a message with another text, in a chat of its own; this one stays."""
    key = f"otherwise-{message['id']}"
    with st.popover("Rewrite", icon=":material/alt_route:", type="tertiary"):
        st.text_area("Ask this instead, in a new chat", message["content"], key=key)
        button("Ask", "", f"ask-{key}", _branch, asking, conversation, message, key, type="primary")


def _branch(asking: Asking, conversation: dict, message: dict, key: str) -> None:
    ids = [other["id"] for other in conversation["messages"]]
    before = conversation | {"messages": conversation["messages"][: ids.index(message["id"])]}
    origin = (conversation.get("metadata") or {}).get("branch_of") or conversation["id"]
    text = st.session_state[key].strip()
    question = Question(new_conversation_id(), text, asking.model, history=_said(before, None), branch_of=origin)
    if text and _send(asking, question, None):
        _open(question.conversation_id)


def _said(conversation: dict | None, replaces: str | None) -> list[dict]:
    """What was said before the question, replies as edited."""
    if conversation is None:
        return []
    edited = edits(conversation)
    ids = [message["id"] for message in conversation["messages"]]
    before = conversation["messages"][: ids.index(replaces) - 1] if replaces in ids else conversation["messages"]
    return [{"role": m["role"], "content": edited.get(m["id"]) or m["content"]} for m in before]


def _send(asking: Asking, question: Question, conversation: dict | None) -> bool:
    """Ask; False, and nothing is asked, where another page of the conversation waits for a reply."""
    here = asking.here
    if question.model.name == "Live":
        new = conversation is None and not question.history
        identity = question.conversation_id
        if (canary := Canary(here.checkout).candidate_for(identity, identity, new)) is not None:
            question.model = ChatModel(chat_models.CANARY, "ollama", canary.tag, canary.candidate)
    said = question.history if conversation is None else _said(conversation, question.replaces)
    messages = [*said, {"role": "user", "content": question.text}]
    model = question.model
    examples, prompt = here.before(model, messages, asking.sampling.max_tokens, asking.system_prompt)
    stream = partial(
        stream_reply, model, after_examples(messages, examples), asking.sampling, checkout=here.checkout,
        system_prompt=prompt, settings=here.settings, client=here.client(),
    )  # fmt: skip
    return chat_session.ask(
        here.checkout, question, stream, here.logger, asking.sampling, prompt, here.person,
        examples=len(sources(examples)),
    )  # fmt: skip


def _show_question(question: Question, waiting: bool, conversation: dict | None, asking: Asking) -> None:
    if question.exchange_id is None and question.replaces is None:
        for message in question.history:
            with st.chat_message(message["role"]):
                show_text(message["content"], typed=message["role"] == "user")
        with st.chat_message("user"):
            show_text(question.text, typed=True)
    if waiting:
        with st.chat_message("assistant"):
            _writing(question)
        return
    st.error(plain(question.problem or "no reply came: send it again"), icon=":material/error:")
    with st.container(horizontal=True):
        button("Try again", "refresh", "again", _try_again, asking, question, conversation, type="primary")
        button("Change the text", "edit", "take-back", _take_back, asking.here, question)


def _try_again(asking: Asking, question: Question, conversation: dict | None) -> None:
    chat_session.discard(asking.here.checkout, question.conversation_id)
    replaces = question.exchange_id or question.replaces  # a reply that broke off gives way to the new one
    _send(asking, Question(question.conversation_id, question.text, asking.model, replaces), conversation)


def _take_back(here: App, question: Question) -> None:
    chat_session.discard(here.checkout, question.conversation_id)
    st.session_state["message"] = question.text


@st.fragment(run_every=REFRESH_SECONDS)
def _writing(question: Question) -> None:
    reply = question.reply
    assert reply is not None
    if not reply.writing:
        st.rerun()
    if reply.text:
        show_text(reply.text + " ▌")
    with st.container(horizontal=True, vertical_alignment="center"):
        if button("Stop", "stop_circle", "stop"):
            reply.stop()
            st.rerun()
        rate = reply.tokens_per_second
        st.caption(f"{rate:.0f} tokens/s" if rate else f"thinking, {reply.seconds:.0f} s")
