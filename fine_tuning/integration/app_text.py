"""Text on the pages: what people and models wrote, and labels made of it."""

import streamlit as st

from fine_tuning.integration.reply_markdown import pieces, printable

MARKUP = set("\\`*_{}[]()<>#+-.!|$:~")


def show_text(text: str, typed: bool = False) -> None:
    """Show what a person or a model wrote: Markdown and code, nothing that loads from elsewhere.

    `typed` keeps the line breaks that Markdown would join.
    """
    for piece in pieces(text):
        if piece.kind == "code":
            st.code(piece.text, language=piece.language or None, wrap_lines=True)
        else:
            st.markdown(piece.text.replace("\n", "  \n") if typed else piece.text)


def plain(text: str) -> str:
    """`text` for labels and captions, where Streamlit reads Markdown: nothing in it is markup."""
    return "".join(f"\\{character}" if character in MARKUP else character for character in printable(text))
