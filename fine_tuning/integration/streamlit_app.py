"""The chat app: `make chat`, or `streamlit run fine_tuning/integration/streamlit_app.py` from the project's top folder.

Settings of the server are in .streamlit/config.toml: this machine only, no telemetry.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import streamlit as st

# Streamlit puts this file's own folder on the path, not the project's.
PROJECT = str(Path(__file__).resolve().parents[2])
if PROJECT not in sys.path:
    sys.path.insert(0, PROJECT)


PAGES = {"chat": "forum", "compare": "balance", "data": "dataset", "runs": "monitoring", "models": "workspace_premium"}


def load(name: str) -> Callable[[], None]:
    """A page that is imported when it is opened: the chat need not wait for what the others import."""

    def page() -> None:
        import_module(f"fine_tuning.integration.app_pages.{name}").page()

    page.__name__ = name
    return page


def main() -> None:
    from fine_tuning.errors import UserError

    st.set_page_config(page_title="Whetstone", page_icon=str(Path(__file__).with_name("icon.svg")), layout="centered")
    pages = [
        st.Page(load(name), title=name.capitalize(), icon=f":material/{icon}:", url_path=name, default=name == "chat")
        for name, icon in PAGES.items()
    ]
    chosen = st.navigation(pages)
    try:
        chosen.run()
    except UserError as error:
        st.error(str(error), icon=":material/error:")


main()
