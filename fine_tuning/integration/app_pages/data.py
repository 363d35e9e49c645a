"""Data: what was collected and what became of it, one conversation from the log to its tokens, and the seal."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from jinja2 import Template

from fine_tuning.common.errors import count_of
from fine_tuning.common.records import read_object
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.data_cleaner import Cleaned, CleanSettings, DataCleaner
from fine_tuning.integration import data_view
from fine_tuning.integration.app_context import App, app
from fine_tuning.integration.app_jobs import busy, show_job, start
from fine_tuning.integration.app_pages.chat import edit_reply
from fine_tuning.integration.app_parts import button, plain, read_conversations
from fine_tuning.integration.conversation_index import ConversationIndex, Summary, conversation_index
from fine_tuning.integration.data_view import Span
from fine_tuning.integration.gateway.health import gateways
from fine_tuning.integration.gateway.recorder import GatewaySettings
from fine_tuning.integration.jobs import own_command
from fine_tuning.schema.conversation import edits
from fine_tuning.schema.reasons import in_words, reason_in_words

IMPORT = "Import"
UPLOADS = Path(".whetstone/app/uploads")
FILTERS = {"State": "fate", "Source": "source", "Split": "split", "Rating": "rating", "Masked": "masked", "Tag": "tags"}
VIEWS = ("Before cleaning", "After cleaning", "Tokens")
SHOWN = 1000  # rows that are sent to the browser
COLOURS = {"mask": "#ffd9a8", "trained": "#b9e3c6"}
SPANS = Template(Path(__file__).with_name("spans.html.jinja").read_text(encoding="utf-8"), autoescape=True)


def page() -> None:
    here = app()
    st.title("Data")
    read_conversations(here.checkout)
    with st.spinner("Reading what became of them…", show_time=True):
        found = data_view.entries(here.checkout)
    _upload(here)
    _gateways(here)
    if found.empty:
        st.info("Nothing was collected yet: chat, or `python -m fine_tuning import FILE`.", icon=":material/inbox:")
        return
    _counts(here, found)
    _charts(found)
    _one(here, found)


def _upload(here: App) -> None:
    """Conversations of another tool, through `import`."""
    with st.expander("Import a file", icon=":material/upload_file:"):
        given = st.file_uploader("An export of another tool", key="upload", help="docs/data.md lists the formats")
        model = st.text_input("Model that wrote its replies, where it names none", key="upload-model", max_chars=200)
        if busy() is None:
            shutil.rmtree(here.checkout / UPLOADS, ignore_errors=True)  # what is imported is in the data
        if st.button("Import", key="import", disabled=given is None or busy() is not None, help=busy()):
            path = here.checkout / UPLOADS / Path(given.name).name
            path.parent.mkdir(parents=True, mode=0o700)
            path.write_bytes(given.getbuffer())
            words = ("--model", model.strip()) if model.strip() else ()
            start(IMPORT, own_command("import", *words, "--", str(path)), here.checkout)
            st.rerun()
        show_job(IMPORT)


def _gateways(here: App) -> None:
    """What the gateways of this checkout counted since they started."""
    found = gateways(here.checkout, read_params("gateway", GatewaySettings).token)
    if not found:
        st.caption("No gateway runs: `python -m fine_tuning gateway` records what other chat clients say.")
    for address, health in found.items():
        if isinstance(health, str):
            st.warning(f"The gateway at {address}: {health}", icon=":material/lan:")
            continue
        counts = health["recording"]
        numbers = {name: number for name, number in counts.items() if isinstance(number, int)}
        numbers |= {f"left out ({reason})": number for reason, number in counts["left_out"].items()}
        said = ", ".join(f"{name} {number:,}" for name, number in numbers.items())
        st.caption(f"Gateway {address} to {health['upstream']}, exchanges since it started: {plain(said)}")
        if counts["problem"]:
            st.warning(f"The gateway at {address}: {plain(counts['problem'])}", icon=":material/lan:")


# ----------------------------------------------------------------------------------------------------------- numbers


def _counts(here: App, found: pd.DataFrame) -> None:
    clean, prepare = (read_object(here.checkout / f"metrics/{stage}.json") for stage in ("clean", "prepare"))
    train = prepare.get("splits", {}).get("train", {})
    numbers = {"Collected": len(found)}
    if clean:
        numbers |= {"Kept": clean["kept"], "Dropped": clean["dropped"], "Masked": sum(clean["masked"].values())}
    if train:
        numbers["Trained on"] = train["conversations"]
    with st.container(horizontal=True):
        for name, number in numbers.items():
            st.metric(name, f"{number:,}", width="content")
    logged, sealed = (int((found["fate"] == fate).sum()) for fate in ("new", "not cleaned yet"))
    st.caption(f"New or changed since the last training: {logged:,} to seal, {sealed:,} sealed.")
    if (people := read_params("clean", CleanSettings).people) != "mask":
        st.caption(f"Names, addresses and dates of birth are not masked: clean.people in params.yaml is {people}.")
    if not clean:
        st.caption("The pipeline has not cleaned anything yet: train on the page Home.")
        return
    rows = [{"what": "dropped", "why": _words(k), "number": v} for k, v in clean["reasons"].items()]
    rows += [{"what": "masked", "why": k, "number": v} for k, v in clean["masked"].items()]
    rows += [{"what": "found, not masked", "why": k, "number": v} for k, v in clean.get("flagged", {}).items()]
    rows += [
        {"what": "not trained on", "why": reason_in_words(k), "number": v}
        for k, v in prepare.get("left_out", {}).items()
    ]
    if gone := clean.get("exchanges_dropped"):
        rows.append({"what": "dropped", "why": "exchanges of conversations that stay", "number": gone})
    if rows:
        table = pd.DataFrame(rows).sort_values("number", ascending=False)
        for line in in_words(prepare):
            st.caption(line)
        if largest := clean.get("largest_clusters"):
            sizes = ", ".join(map(str, largest))
            st.caption(f"Alike or with the same beginning, so always in one split; the largest groups: {sizes}")
        st.dataframe(table, hide_index=True, width="stretch", column_config={"number": st.column_config.NumberColumn()})


def _charts(found: pd.DataFrame) -> None:
    for tab, name in zip(st.tabs(["Over time", "Length in characters"]), ("day", "length"), strict=True):
        table = data_view.counted(found[name], found["source"])
        if len(table := table[table.index != ""]):
            tab.bar_chart(table, height=220, y_label="conversations")


# ------------------------------------------------------------------------------------------------- one conversation


def _one(here: App, found: pd.DataFrame) -> None:
    st.header("Conversations")
    words = st.text_input("Search", key="find", placeholder="words of any message, or an id")
    index = conversation_index(here.checkout)
    matches = found[found.index.isin(index.with_words(words))] if words.strip() else found
    with st.container(horizontal=True):
        for label, name in FILTERS.items():
            names = found[name].cat.categories
            choices = ["all", *sorted({value for key in names for value in key.splitlines()})]
            chosen = st.selectbox(label, choices, format_func=_words, key=name)
            if chosen != "all":
                matches = matches[matches[name].isin([key for key in names if chosen in key.splitlines()])]
        if len(days := st.date_input("Days", (), key="days")) == 2:
            first, last = map(str, days)
            matches = matches[matches["day"].isin([d for d in found["day"].cat.categories if first <= d <= last])]
    if matches.empty:
        st.caption("None.")
        return
    entry = _chosen(index, matches)
    conversation = entry and index.conversation(entry.id)
    if conversation is None:
        return
    _tags(here, entry, conversation["id"], found)
    cleaner = data_view.cleaner(here.checkout, read_params("clean", CleanSettings))
    cleaned = cleaner.clean_conversation(conversation)
    _fate(here, entry, conversation, cleaner, cleaned)
    view = st.segmented_control(
        "View", VIEWS, default=VIEWS[0], required=True, key="view", label_visibility="collapsed"
    )
    if view == "Tokens":
        _tokens(here, entry)
    elif view == "Before cleaning":
        edited = edits(conversation)
        for message in conversation["messages"]:
            text = edited.get(message["id"]) or message["content"] or ""
            _show_spans(message["role"], data_view.before(cleaner, text), "mask")
            key = f"correct-{message['id']}"
            if message["role"] == "assistant" and button("Correct", "edit", key, type="tertiary"):
                edit_reply(here, conversation["id"], message["id"], text)
    elif cleaned.conversation is None:
        st.caption("Nothing is left of it.")
    else:
        masked = sum(cleaned.masked.values())
        st.caption(f"{masked} value{'s' * (masked != 1)} masked, with the parameters of params.yaml as they are now.")
        for message in cleaned.conversation["messages"]:
            _show_spans(message["role"], data_view.after(message["content"]), "mask")


def _chosen(index: ConversationIndex, matches: pd.DataFrame) -> Any:
    """List conversations; the one that somebody clicked, else the first; None where all went meanwhile."""
    more = f"; the first {SHOWN:,} are listed" if len(matches) > SHOWN else ""
    st.caption(f"{count_of(len(matches), 'conversation')}{more}; click the left edge of a row to look at it.")
    found = pd.DataFrame(index.summaries(matches.index[:SHOWN]), columns=Summary._fields).set_index("number")
    found = found.join(matches[:SHOWN][["day", "fate", "split", "masked", "tags"]]).reset_index(drop=True)
    if found.empty:
        return None
    table = found[["begins", "fate", "split", "source", "day", "rating", "masked", "tags"]]
    table = table.assign(**{name: table[name].str.replace("\n", ", ") for name in ("masked", "tags")})
    table[["messages", "characters", "id"]] = found[["messages", "characters", "id"]]
    event = st.dataframe(
        table, hide_index=True, height=280, on_select="rerun", selection_mode="single-row", alt="Conversations",
        key=f"table-{hash(tuple(table['id']))}", column_config={"fate": "state"},
    )  # fmt: skip
    row = next(iter(event["selection"]["rows"]), 0)
    return next(found.iloc[[row]].itertuples())


def _fate(here: App, entry: Any, conversation: dict, cleaner: DataCleaner, cleaned: Cleaned) -> None:
    """Why it was dropped, and the button that keeps it."""
    if reason := data_view.why_dropped(cleaned, entry.fate):
        st.warning(f"Dropped: {plain(reason)}", icon=":material/filter_alt:")
        other = data_view.twin(here.checkout, conversation["id"]) if entry.fate == "duplicate" else None
        twin = conversation_index(here.checkout).conversation(other) if other else None
        if twin is not None:
            with st.expander("The one that is kept instead"):
                for message in twin["messages"]:
                    _show_spans(message["role"], [(message["content"], None)], "mask")
        off = None if data_view.can_be_restored(cleaner, conversation, entry.fate) else _never(entry.fate)
        note, icon = "It is masked as ever, and no filter drops it again.", "settings_backup_restore"
        button("Keep it all the same", icon, "restore", _restore, here, conversation["id"], off=off, help=note)
        if off:
            st.caption(off)
    elif conversation.get("restored"):
        st.caption("Restored: masked as ever, and no filter drops it.")


def _tags(here: App, entry: Any, identity: str, found: pd.DataFrame) -> None:
    key, known = f"tags-{entry.id}", sorted({tag for tags in found["tags"].cat.categories for tag in tags.splitlines()})
    st.multiselect(
        "Tags", known, entry.tags.splitlines(), key=key, accept_new_options=True, placeholder="add a tag",
        on_change=lambda: data_view.write_tags(here.checkout, identity, st.session_state[key]),
    )  # fmt: skip


def _never(fate: str) -> str:
    if fate == "duplicate":
        return "The same conversation is kept under another id."
    return "No filter dropped it: its form cannot be trained on."


def _restore(here: App, identity: str) -> None:
    here.logger.log_restore(identity)
    st.toast("Kept from the next seal and `dvc repro` on", icon=":material/check:")


def _tokens(here: App, entry: Any) -> None:
    prepared = data_view.tokens(here.checkout, entry.id)
    if prepared is None:
        st.caption("Not in the prepared data: dropped, left out of the sample, or newer than the last `dvc repro`.")
        return
    split, pieces = prepared
    trained = sum(kind is not None for _, kind in pieces)
    does = "is trained" if split == "train" else "counts"
    st.caption(f"In the split {split}: {trained} of {len(pieces)} tokens; what {does} is coloured.")
    _show_spans("", pieces, "trained", marked_apart=True)


def _show_spans(role: str, spans: list[Span], kind: str, marked_apart: bool = False) -> None:
    """Text with the special spans coloured. Everything in it is escaped: it is text, whatever it says."""
    st.html(SPANS.render(role=role, spans=spans, colour=COLOURS[kind], apart=marked_apart))


def _words(name: str) -> str:
    return name.replace("_", " ")
