"""What deploying a version needs: from the registry and DVC, or from models/champion where no registry knows it."""

import tempfile
from pathlib import Path

from fine_tuning.commands.promote import content_of
from fine_tuning.common.dvc_files import cached, fetch, md5_path, read_dvc
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json
from fine_tuning.model_management.champion import CHAMPION_DVC, CHAMPION_FILES, CREATE, GGUF, PROBES, read_champion
from fine_tuning.model_management.model_deployer import Bundle, Probe
from fine_tuning.model_management.model_registry import CONTENT_TAG, ModelRegistry, ModelVersion


def registered_bundle(registry: ModelRegistry, version: ModelVersion, recorded_digest: str | None) -> Bundle:
    """A version's request and probes out of the registry, its GGUF from where DVC keeps it; nothing else passes.

    Raises:
        UserError: a part is gone, or is not what was registered.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = read_json(registry.download(version, "files.json", folder))
        create = registry.download(version, CREATE, folder)
        probes = read_json(registry.download(version, PROBES, folder))
        hashes = {path: entry["sha256"] for path, entry in files.items()}
        if content_of(hashes) != version.tags.get(CONTENT_TAG) or sha256_file(create) != hashes[CREATE]:
            raise UserError(
                f"what the registry keeps of version {version.number} is damaged: `python -m fine_tuning verify` "
                "says where"
            )
        request = read_json(create)
    return _bundle(version.number, find_gguf(version), version.tags["gguf_sha256"], request, probes, recorded_digest)


def find_gguf(version: ModelVersion) -> Path:
    """The version's GGUF: the champion's, the candidate's, or the object in DVC's cache; its SHA-256 is checked.

    Raises:
        UserError: it is neither here nor in the remote.
    """
    wanted = version.tags["gguf_sha256"]
    for path in (CHAMPION_FILES / GGUF, Path("models/package/model.gguf")):
        if path.is_file() and sha256_file(path) == wanted:
            return path
    fetch([version.tags["gguf_md5"]])
    kept = kept_gguf(version)
    if kept is not None and sha256_file(kept) == wanted:
        return kept
    raise UserError(
        f"the GGUF of version {version.number} is neither here nor in DVC's remote: `dvc push` at the commit that "
        "promoted it, in a checkout that has it, then deploy again"
    )


def kept_gguf(version: ModelVersion) -> Path | None:
    """The version's GGUF in DVC's cache, None if it is not there; its content is not checked."""
    md5 = version.tags.get("gguf_md5")
    return cached(Path.cwd(), md5) if md5 else None


def champion_bundle() -> Bundle:
    """The champion that git and DVC brought here, for a registry that does not know it.

    Raises:
        UserError: models/champion is not here, or is not what models/champion.dvc says.
    """
    champion = read_champion()
    if not (CHAMPION_FILES / GGUF).is_file():
        raise UserError(f"the champion's files are not here: `dvc pull {CHAMPION_DVC}`, then deploy again")
    if md5_path(CHAMPION_FILES) != read_dvc(CHAMPION_DVC):
        raise UserError(
            f"{CHAMPION_FILES} is not what {CHAMPION_DVC} says: `dvc checkout --force {CHAMPION_DVC}`, "
            "then deploy again"
        )
    request, probes = read_json(CHAMPION_FILES / CREATE), read_json(CHAMPION_FILES / PROBES)
    return _bundle(champion["version"], CHAMPION_FILES / GGUF, champion["gguf_sha256"], request, probes, None)


def _bundle(
    number: int, gguf: Path, sha256: str, request: dict, probes: list[dict], recorded_digest: str | None
) -> Bundle:
    return Bundle(number, gguf, sha256, request, [Probe(**probe) for probe in probes], recorded_digest)
