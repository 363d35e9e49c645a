"""Commands for whoever ships or checks a model: sbom (what it is made of), audit (known holes in what is pinned)."""

import argparse
import importlib.util
import json
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import ADAPTER, BASE_CARD, MANIFEST, PACKAGE, PREPARED, sha256_file
from fine_tuning.common.records import read_json, read_object
from fine_tuning.common.settings import read_params
from fine_tuning.model_management.model_deployer import DeploySettings

PINS = (Path("requirements.txt"), Path("requirements-base.txt"))
SHORT = 60  # characters of a licence field that is a name; longer ones are the licence's whole text


def sbom(args: argparse.Namespace) -> None:
    if args.licences:
        for name, version in pins():
            print(f"{name:32} {version:16} {licence_of(name) or 'not stated'}")
        return
    text = bill_of_materials()
    args.output.write_text(text + "\n", encoding="utf-8")
    print(f"{args.output}: {len(json.loads(text)['components'])} components")


def audit(args: argparse.Namespace) -> int:
    """Print known vulnerabilities of the pins. Exit status 1 if there are any, 2 if no database was reached."""
    if importlib.util.find_spec("pip_audit") is None:
        raise UserError("pip-audit is not installed here: run `make audit`, which installs what the tests need")
    words = [word for path in PINS for word in ("--requirement", str(path))]
    command = [sys.executable, "-m", "pip_audit", *words, "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    return judge(done.stdout, len(pins()))


def judge(report: str, pinned: int) -> int:
    """Say what pip-audit's JSON report amounts to; the exit status of `audit`."""
    try:
        entries = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        entries = []
    audited = [entry for entry in entries if "skip_reason" not in entry]
    if not audited:
        print(f"no advisory database can be reached from here: none of the {pinned} pinned packages was looked up")
        return 2
    found = [(entry, hole) for entry in audited for hole in entry["vulns"]]
    for entry, hole in found:
        fixed = ", ".join(hole.get("fix_versions") or []) or "no version yet"
        print(f"{entry['name']} {entry['version']}: {hole['id']}, fixed in {fixed}")
    print(f"{len(audited)} of {pinned} pinned packages looked up, {len(found)} known vulnerabilities")
    return int(bool(found))


# -----------------------------------------------------------------------------
# bill of materials


def bill_of_materials() -> str:
    """CycloneDX 1.6 JSON (https://cyclonedx.org/docs/1.6/json/) of the bundle: its files, the base, the data it learned
    from (hashes only), dependencies."""
    gguf = PACKAGE / "model.gguf"
    if not gguf.is_file() or not BASE_CARD.is_file():
        raise UserError(f"{PACKAGE} is not here: run `dvc pull` or `dvc repro`")
    base, digest = read_json(BASE_CARD), sha256_file(gguf)
    name = read_params("deploy", DeploySettings).name
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, digest))
    model = ComponentType.MACHINE_LEARNING_MODEL
    root = _component(model, name, digest[:12], digest, base.get("license"))
    bom.metadata.component = root
    revision = str(base.get("revision") or "")
    parts = [_component(model, str(base["model"]), revision, base["sha256"], base.get("license"))]
    files = filter(Path.is_file, [*sorted(PACKAGE.iterdir()), ADAPTER / "adapter_model.safetensors"])
    parts += [_component(ComponentType.FILE, path.name, "", sha256_file(path)) for path in files]
    shards = [(shard["name"], shard["sha256"]) for shard in read_object(MANIFEST).get("shards", [])]
    prepared = sorted(PREPARED.rglob("*.parquet"))
    data = [*((str(path.relative_to(PREPARED)), sha256_file(path)) for path in prepared), *shards]
    parts += [_component(ComponentType.DATA, name, "", sha256) for name, sha256 in data]
    parts += [_library(*pin) for pin in pins()]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(root, parts)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)


def _component(kind: ComponentType, name: str, version: str, sha256: str, licence: str | None = None) -> Component:
    return Component(
        type=kind, name=name, version=version or None, bom_ref=f"{kind.value}:{name}:{sha256[:12]}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)], licenses=_licences(licence),
    )  # fmt: skip


def _library(name: str, version: str) -> Component:
    return Component(
        type=ComponentType.LIBRARY, name=name, version=version, bom_ref=f"pypi:{name}@{version}",
        purl=PackageURL("pypi", None, name, version), licenses=_licences(licence_of(name)),
    )  # fmt: skip


def _licences(stated: str | None) -> list[License]:
    return [LicenseFactory().make_from_string(stated)] if stated else []


def pins() -> list[tuple[str, str]]:
    """(name, version) of every pinned package."""
    lines = [line.strip() for path in PINS if path.is_file() for line in path.read_text().splitlines()]
    return [(name, version) for name, _, version in (line.partition("==") for line in lines) if version]


def licence_of(name: str) -> str | None:
    """The licence that an installed package states: its SPDX expression, else its classifiers, else a short field."""
    try:
        stated = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    if expression := stated.get("License-Expression"):
        return expression
    classifiers = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier") or [] if c.startswith("License ::")]
    names = [c for c in classifiers if c != "OSI Approved"]
    if names:
        return ", ".join(names)
    field = (stated.get("License") or "").strip()
    return field if field and len(field) <= SHORT and "\n" not in field else None
