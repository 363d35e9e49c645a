"""Ollama's files, where they can be read: it serves its blobs without hashing them, so a flipped byte goes unnoticed.

A store is a folder of `manifests/<registry>/<namespace>/<model>/<tag>`, JSON files that name blobs by digest, and of
`blobs/sha256-<digest>`. The digest that the server tells of a model is the SHA-256 of its manifest's bytes.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from fine_tuning.project import sha256_file

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Where Ollama's documentation says that models are: of a user's own server, of the Linux service.
STORES = (Path("~/.ollama/models"), Path("/usr/share/ollama/.ollama/models"))


def blobs_of(host: str, digest: str) -> list[Path] | None:
    """The blobs of a model on this machine, by the digest that the server at `host` tells; None if they are not here
    or cannot be read."""
    if urlsplit(host).hostname not in LOOPBACK:
        return None
    try:
        for store in _stores():
            for manifest in (store / "manifests").rglob("*"):
                if manifest.is_file() and sha256_file(manifest) == digest.removeprefix("sha256:"):
                    named = json.loads(manifest.read_bytes())
                    parts = [*named["layers"], *([named["config"]] if named.get("config") else [])]
                    return [store / "blobs" / part["digest"].replace(":", "-") for part in parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def is_damaged(blob: Path) -> bool:
    """Whether a blob's bytes are not those that its name says.

    Raises:
        OSError: it cannot be read.
    """
    return sha256_file(blob) != blob.name.removeprefix("sha256-")


def _stores() -> Iterator[Path]:
    given = os.environ.get("OLLAMA_MODELS")
    yield from (folder.expanduser() for folder in ([Path(given)] if given else STORES) if folder.expanduser().is_dir())
