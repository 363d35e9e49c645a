"""Ollama's files, where they can be read: it serves its blobs without hashing them, so a flipped byte goes unnoticed.

A store is a folder of `manifests/<registry>/<namespace>/<model>/<tag>`, JSON files that name blobs by digest, and of
`blobs/sha256-<digest>`. The digest that the server reports for a model is the SHA-256 of its manifest's bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAME = re.compile(
    r"(?:(?:(?P<host>[\w.-]+(?::\d+)?)/)?(?P<space>[\w-]+)/)?(?P<model>\w[\w.-]*)(?::(?P<tag>\w[\w.-]*))?"
)
# Where Ollama's documentation says that models are: of a user's own server, of the Linux service.
STORES = (Path("~/.ollama/models"), Path("/usr/share/ollama/.ollama/models"))


def model_gguf(name: str) -> tuple[Path, str]:
    """The weights of a model that Ollama has on this machine, such as `qwen3:4b` or `hf.co/owner/name:Q4_K_M`, and its
    id, as `ollama list` shows it. Raises UserError if it is not here, cannot be read, is no single GGUF, or is itself a
    base with an adapter."""
    if not (found := _NAME.fullmatch(name)):
        raise UserError(
            f"ollama:{name} is not the name of a model: give one that `ollama list` shows, such as qwen3:4b"
        )
    place = Path(found["host"] or "registry.ollama.ai", found["space"] or "library", found["model"])
    for store in stores("http://localhost"):
        manifest = store / "manifests" / place / (found["tag"] or "latest")
        try:
            content = manifest.read_bytes()
            parts = [(part["mediaType"].rpartition(".")[2], part["digest"]) for part in json.loads(content)["layers"]]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{manifest} cannot be read ({type(error).__name__}): `ollama pull {name}`") from None
        if "adapter" in dict(parts):
            raise UserError(f"ollama:{name} is a base with an adapter: give the base that its Modelfile names")
        models = [digest for kind, digest in parts if kind == "model"]
        if len(models) != 1:
            raise UserError(f"ollama:{name} is not kept as one GGUF file: give its Hugging Face id as base.model")
        blob = store / "blobs" / models[0].replace(":", "-")
        if not blob.is_file():
            raise UserError(f"ollama:{name}: {blob} is missing: `ollama pull {name}`")
        return blob, hashlib.sha256(content).hexdigest()[:12]
    raise UserError(
        f"ollama:{name} is not on this machine: `ollama pull {name}`, or set OLLAMA_MODELS to the folder of its models"
    )


def blobs_of(host: str, digest: str, uploaded: str) -> list[Path] | None:
    """The blobs of a model on this machine, by the digest that the server at `host` reports; None if they are not here
    or cannot be read. What was `uploaded` (SHA-256) is one of them while it is there: a server that rewrites models
    makes the next one from it."""
    try:
        for store in stores(host):
            for manifest in (store / "manifests").rglob("*"):
                if manifest.is_file() and sha256_file(manifest) == digest.removeprefix("sha256:"):
                    named = json.loads(manifest.read_bytes())
                    parts = [*named["layers"], *([named["config"]] if named.get("config") else [])]
                    blobs = [store / "blobs" / part["digest"].replace(":", "-") for part in parts]
                    source = store / "blobs" / f"sha256-{uploaded}"
                    return [*blobs, source] if source.is_file() and source not in blobs else blobs
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def damaged_blobs(host: str, digest: str, uploaded: str) -> tuple[list[Path], int] | None:
    """Blobs of a model whose bytes are not those that their names say, and how many bytes were read; None if
    `blobs_of` finds none or one cannot be read."""
    blobs = blobs_of(host, digest, uploaded)
    with suppress(OSError):
        if blobs is not None:
            damaged = [blob for blob in blobs if sha256_file(blob) != blob.name.removeprefix("sha256-")]
            return damaged, sum(blob.stat().st_size for blob in blobs)
    return None


def stores(host: str) -> Iterator[Path]:
    """Folders on this machine that may be the store of the server at `host`."""
    given = os.environ.get("OLLAMA_MODELS")
    if urlsplit(host).hostname in LOOPBACK:
        folders = (folder.expanduser() for folder in ([Path(given)] if given else STORES))
        yield from (folder for folder in folders if os.path.isdir(folder))
