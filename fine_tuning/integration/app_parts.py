"""What pages are made of: text that people and models wrote, labels made of it, and buttons."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from fine_tuning.common.errors import count_of
from fine_tuning.common.project import MANIFEST
from fine_tuning.common.records import read_object
from fine_tuning.integration.conversation_index import conversation_index
from fine_tuning.integration.reply_markdown import pieces, printable

MARKUP = set("\\`*_{}[]()<>#+-.!|$:~")


def show_text(text: str, typed: bool = False) -> None:
    """Show what a person or a model wrote: Markdown and code, nothing that loads from elsewhere. `typed` keeps the line
    breaks that Markdown would join."""
    for piece in pieces(text):
        if piece.kind == "code":
            st.code(piece.text, language=piece.language or None, wrap_lines=True)
        else:
            st.markdown(piece.text.replace("\n", "  \n") if typed else piece.text)


def plain(text: str) -> str:
    """`text` for labels and captions, where Streamlit reads Markdown: nothing in it is markup."""
    return "".join(f"\\{character}" if character in MARKUP else character for character in printable(text))


def read_conversations(checkout: Path) -> None:
    """Say what is read where that takes long: at the first visit, every conversation."""
    total = int(read_object(checkout / MANIFEST).get("total_conversations") or 0)
    if total and not (index := conversation_index(checkout)).was_read():
        with st.spinner(f"Reading {count_of(total, 'conversation')}…", show_time=True):
            index.state()


def button(
    label: str, icon: str, key: str, act: Callable[..., Any] | None = None, *args: Any,
    off: str | None = None, help: str | None = None, **options: Any,
) -> bool:  # fmt: skip
    """A button, with an icon or "", which calls `act(*args)`; `off` says why it cannot be pressed now."""
    shown = f":material/{icon}:" if icon else None
    return st.button(label, key, off or help, act, args, icon=shown, disabled=off is not None, **options)
