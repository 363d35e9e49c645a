"""The chat app: `make chat`, or `streamlit run fine_tuning/integration/streamlit_app.py` from the project's top folder.

Settings of the server are in .streamlit/config.toml: this machine only, no telemetry.
"""

import sys
from pathlib import Path

import streamlit as st

# Streamlit puts this file's own folder on the path, not the project's.
PROJECT = str(Path(__file__).resolve().parents[2])
if PROJECT not in sys.path:
    sys.path.insert(0, PROJECT)


def main() -> None:
    from fine_tuning.errors import UserError
    from fine_tuning.integration.app_pages import chat, compare, data, models, runs

    st.set_page_config(page_title="Whetstone", page_icon=str(Path(__file__).with_name("icon.svg")), layout="centered")
    pages = [
        st.Page(chat.page, title="Chat", icon=":material/forum:", url_path="chat", default=True),
        st.Page(compare.page, title="Compare", icon=":material/balance:", url_path="compare"),
        st.Page(data.page, title="Data", icon=":material/dataset:", url_path="data"),
        st.Page(runs.page, title="Runs", icon=":material/monitoring:", url_path="runs"),
        st.Page(models.page, title="Models", icon=":material/workspace_premium:", url_path="models"),
    ]
    chosen = st.navigation(pages)
    try:
        chosen.run()
    except UserError as error:
        st.error(str(error), icon=":material/error:")


main()
