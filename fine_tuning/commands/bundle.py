"""What deploying a version needs: from the registry and DVC, or from models/champion where no registry knows it."""

import tempfile
from pathlib import Path

from fine_tuning.common.dvc_files import cached, fetch, md5_path, read_dvc
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json
from fine_tuning.model_management import champion
from fine_tuning.model_management.model_deployer import Bundle, Probe
from fine_tuning.model_management.model_registry import CONTENT_TAG, ModelRegistry, ModelVersion


def registered_bundle(registry: ModelRegistry, version: ModelVersion, recorded_digest: str | None) -> Bundle:
    """A version's request and probes out of the registry, its GGUF from where DVC keeps it; each part is
    compared with what was registered."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = read_json(registry.download(version, "files.json", folder))
        create = registry.download(version, champion.CREATE, folder)
        probes = read_json(registry.download(version, champion.PROBES, folder))
        hashes = {path: entry["sha256"] for path, entry in files.items()}
        known = champion.content_of(hashes) == version.tags.get(CONTENT_TAG)
        if not known or sha256_file(create) != hashes[champion.CREATE]:
            raise UserError(
                f"what the registry keeps of version {version.number} is damaged: `python -m fine_tuning verify` "
                "says where"
            )
        request = read_json(create)
    probes = [Probe(**probe) for probe in probes]
    return Bundle(version.number, find_gguf(version), version.tags["gguf_sha256"], request, probes, recorded_digest)


def find_gguf(version: ModelVersion) -> Path:
    """The version's GGUF: the champion's, candidate's, base's, or the object in DVC's cache; its SHA-256 is checked."""
    wanted = version.tags["gguf_sha256"]
    for path in map(Path, (champion.FOLDER / champion.GGUF, "models/package/model.gguf", "models/base/base-Q8_0.gguf")):
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
    """The champion that git and DVC brought here, for a registry that does not know it."""
    named, folder, tracked = champion.read_champion(), champion.FOLDER, champion.TRACKED
    if not (folder / champion.GGUF).is_file():
        raise UserError(f"the champion's files are not here: `dvc pull {tracked}`, then deploy again")
    if md5_path(folder) != read_dvc(tracked):
        raise UserError(f"{folder} is not what {tracked} says: `dvc checkout --force {tracked}`, then deploy again")
    probes = [Probe(**probe) for probe in read_json(folder / champion.PROBES)]
    request = read_json(folder / champion.CREATE)
    return Bundle(named["version"], folder / champion.GGUF, named["gguf_sha256"], request, probes)
