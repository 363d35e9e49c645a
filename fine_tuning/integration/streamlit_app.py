"""The chat app: `make chat`, or `streamlit run fine_tuning/integration/streamlit_app.py` from the project's top folder.

Settings of the server are in .streamlit/config.toml: this machine only, no telemetry. `streamlit run` finds `app`
here, imports it for its server, and runs this file as the script for every visit.
"""

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

# Streamlit puts this file's own folder on the path, not the project's.
PROJECT = str(Path(__file__).resolve().parents[2])
if PROJECT not in sys.path:
    sys.path.insert(0, PROJECT)


# As dir="auto": each paragraph runs as its own script does. Captions, and buttons pointed at or open, lack contrast.
STYLE = """<style>[data-testid=stMarkdownContainer] :is(p, li), textarea { unicode-bidi: plaintext; }
div[data-testid=stCaptionContainer] { color: inherit; opacity: 0.8; } h2 { font-size: 1.5rem !important; }
:is(button[kind=tertiary], [data-testid=stPopoverButton]):is(:hover, :focus, :active,
[aria-expanded=true]) { color: inherit !important; }
</style>"""
PAGES = {
    "home": "home",
    "chat": "forum",
    "compare": "balance",
    "review": "how_to_vote",
    "data": "dataset",
    "runs": "monitoring",
    "models": "workspace_premium",
}
OPEN_PAGES = ("home", "chat", "compare", "review")  # to whoever is signed in; the others are the owners'


def load(name: str) -> Callable[[], None]:
    """A page that is imported when it is opened: the chat need not wait for what the others import."""

    def page() -> None:
        import_module(f"fine_tuning.integration.app_pages.{name}").page()

    page.__name__ = name
    return page


def main() -> None:
    from fine_tuning.common.errors import UserError
    from fine_tuning.integration.app_context import is_allowed, is_owner, signed_in
    from fine_tuning.integration.app_jobs import announce
    from fine_tuning.integration.app_parts import plain

    st.set_page_config(page_title="Whetstone", page_icon=str(Path(__file__).with_name("icon.svg")), layout="centered")
    pages = {
        name: st.Page(load(name), title=name.capitalize(), icon=f":material/{icon}:", url_path=name,
                      default=name == "home")
        for name, icon in PAGES.items()
        if name in OPEN_PAGES or is_owner()
    }  # fmt: skip
    if not is_allowed():
        st.navigation([st.Page(_sign_in, title="Whetstone", default=True)], position="hidden").run()
        return
    st.html(STYLE)
    chosen = st.navigation(list(pages.values()))
    st.session_state["pages"] = pages
    if is_owner():
        announce()
    try:
        chosen.run()
    except UserError as error:
        st.error(str(error), icon=":material/error:")
    if (person := signed_in()) is not None:
        st.sidebar.button(f"Sign out {plain(person)}", icon=":material/logout:", type="tertiary", on_click=st.logout)


def _sign_in() -> None:
    """What a stranger sees where .streamlit/secrets.toml asks for sign-in: no conversation, no model, no number."""
    from fine_tuning.integration.app_context import sign_in_providers, signed_in
    from fine_tuning.integration.app_parts import plain

    st.title("Whetstone")
    if (person := signed_in()) is not None:
        st.error(f"{plain(person)} is not on the list of those who may come in.", icon=":material/block:")
        st.button("Sign out", icon=":material/logout:", on_click=st.logout)
        return
    for provider in sign_in_providers():
        arguments = () if provider is None else (provider,)
        label = "Sign in" if provider is None else f"Sign in with {provider}"
        st.button(label, icon=":material/login:", key=f"sign-in-{provider}", on_click=st.login, args=arguments)


@asynccontextmanager
async def _until_the_end(_: object) -> AsyncGenerator[dict, None]:
    """Closes what pages opened. After SIGTERM the server ends by that signal, and functions of `atexit` do not run."""
    yield {}
    from fine_tuning.integration.chat_session import pending_replies
    from fine_tuning.integration.embedded_engine import shared_engines
    from fine_tuning.integration.jobs import jobs

    pending_replies.close()
    jobs.stop()
    shared_engines.close()


if __name__ == "__main__":
    main()
else:
    from fine_tuning.integration.app_guard import AppGuard

    app = st.App(Path(__file__), middleware=[Middleware(AppGuard)], lifespan=_until_the_end)
