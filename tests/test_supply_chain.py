"""What a bundle is made of is written down in a form that tools read; an audit that could not look says so."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from fine_tuning.commands import supply_chain
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import write_json

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A checkout with a bundle; the current folder."""
    for folder in ("models/package", "models/base", "data/prepared/train"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("params.yaml", "requirements.txt", "requirements-base.txt", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "models/package/model.gguf").write_bytes(b"GGUF" + bytes(64))
    (tmp_path / "models/package/Modelfile").write_text("FROM ./model.gguf\n")
    (tmp_path / "data/prepared/train/one.parquet").write_bytes(b"PAR1")
    card = {"model": "tiny", "revision": "r1", "sha256": "a" * 64, "license": "Apache-2.0"}
    write_json(tmp_path / "models/base/base.json", card)
    write_json(tmp_path / "data/manifest.json", {"shards": [{"name": "one.jsonl", "sha256": "b" * 64}]})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_bill_of_materials_names_base_licence_data_and_dependencies(bundle, capsys):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    supply_chain.sbom(argparse.Namespace(licences=False, output=bundle / "sbom.json"))
    text = (bundle / "sbom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    assert found["metadata"]["component"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    parts = {part["name"]: part for part in found["components"]}
    hashes = {name: part["hashes"][0]["content"] for name, part in parts.items() if part.get("hashes")}
    assert hashes["tiny"] == "a" * 64 and parts["tiny"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert hashes["model.gguf"] == sha256_file(bundle / "models/package/model.gguf")
    assert hashes["train/one.parquet"] == sha256_file(bundle / "data/prepared/train/one.parquet")
    assert hashes["one.jsonl"] == "b" * 64 and parts["one.jsonl"]["type"] == "data"
    torch = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    assert parts["torch"]["version"] == torch.partition("==")[2] and parts["torch"]["licenses"]
    assert {version for _, version in supply_chain.pins()} <= {p.get("version") for p in parts.values()}


def test_the_licences_of_all_dependencies_are_listed(bundle, capsys):
    supply_chain.sbom(argparse.Namespace(licences=True, output=None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(supply_chain.pins())
    assert sum("not stated" in line for line in lines) < len(lines) / 20


def test_without_a_bundle_the_command_that_makes_one_is_named(bundle):
    (bundle / "models/package/model.gguf").unlink()
    with pytest.raises(UserError, match="dvc repro"):
        supply_chain.bill_of_materials()


def test_an_audit_that_reached_nobody_is_not_called_clean(capsys):
    skipped = {"dependencies": [{"name": "torch", "skip_reason": "not found"}]}
    for report in ("", json.dumps(skipped), json.dumps({"dependencies": []})):
        assert supply_chain.judge(report, 1) == 2
        assert "no advisory database can be reached" in capsys.readouterr().out
    looked_up = {"name": "old", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
    assert supply_chain.judge(json.dumps({"dependencies": [looked_up]}), 1) == 1
    assert "old 1.0: CVE-1, fixed in 1.1" in capsys.readouterr().out
    assert supply_chain.judge(json.dumps({"dependencies": [looked_up | {"vulns": []}]}), 1) == 0


def test_no_requirement_brings_cuda_to_a_machine_without_a_gpu():
    pinned = "\n".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    assert "torch==" in pinned
    assert [line for line in pinned.splitlines() if line.startswith(("nvidia-", "cuda-", "triton"))] == []
