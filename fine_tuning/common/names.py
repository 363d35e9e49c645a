"""Names that come from outside: one allow-list for model names, tags, sessions and hosts' short names."""

import hashlib
import re

from fine_tuning.common.errors import UserError

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,127}")


def check_model_name(name: str) -> str:
    """Return `name` if it is a model name: small letters, digits, `-` and `_`. It becomes an Ollama name, a registry
    name and a part of paths, so it holds nothing that any of them reads. Raises UserError if it is not."""
    if not MODEL_NAME.fullmatch(name):
        raise UserError(f"{name[:80]!r} is not a model name: use small letters, digits, - and _ (deploy.name)")
    return name


def split_tag(text: str) -> tuple[str, str | None]:
    """Split `name:tag` or `name` into its parts, both checked. Raises UserError if one of them is not allowed."""
    name, colon, tag = text.partition(":")
    check_model_name(name)
    if colon and not TAG.fullmatch(tag):
        raise UserError(f"{tag[:80]!r} is not a tag: use letters, digits, -, _ and .")
    return name, tag if colon else None


def parse_version(text: str, name: str) -> int:
    """The version in `3`, `v3` or `name:3`. Raises UserError if there is none, or it is one of another model."""
    number = re.fullmatch(rf"(?:{re.escape(name)}:)?v?([1-9][0-9]{{0,8}})", text)
    if not number:
        raise UserError(f"{text[:80]!r} is not a version of {name}: `python -m fine_tuning list` shows them")
    return int(number[1])


def session_name(text: str) -> str:
    """`text` as the id of a conversation: letters, digits and `_.:@+-`, 128 at most. Another one becomes its hash,
    always the same: what was said in a session with an odd name is not lost."""
    if SESSION.fullmatch(text):
        return text
    return "session-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def host_key(host: str) -> str:
    """A host's address as a part of a registry tag: `http://127.0.0.1:11434` is `127.0.0.1_11434`, and so are
    `http://localhost:11434` and `http://[::1]:11434`, which are one server."""
    address = re.sub(r"^(localhost|\[::1\])(?=[:/]|$)", "127.0.0.1", host.partition("://")[2] or host)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", address).strip("_")
