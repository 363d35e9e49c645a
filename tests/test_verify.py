"""Whatever rots is found, named and mended by the command that is shown."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from fine_tuning.common.dvc_files import cached, md5_file
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import write_json
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import describe_shard, write_shard
from fine_tuning.integration.ollama_client import OllamaClient
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.schema.chat_format import load_tokenizer
from tests.fake_ollama import FakeOllama
from tests.registered import environment, here, sh

pytestmark = pytest.mark.end_to_end

GGUF = Path("models/package/model.gguf")


@pytest.fixture
def project(promoted):
    """Two versions; a remote that holds everything."""
    sh(promoted, f"dvc remote add -q -d store {promoted.parent / 'remote'}")
    sh(promoted, "dvc push -q")
    return promoted


def verify(capsys, *words: str) -> tuple[int, list[dict]]:
    """Exit status and all findings."""
    capsys.readouterr()
    status = here("verify", "--json", *words)
    parts = json.loads(capsys.readouterr().out)
    return status, [{**finding, "place": part["place"]} for part in parts for finding in part["findings"]]


def flip(path: Path) -> None:
    """Change one bit, as a disk does: neither size nor time tells."""
    known = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    os.chmod(path, 0o644)
    path.write_bytes(bytes(data))
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    os.chmod(path, known.st_mode)


def test_a_sound_project_is_said_to_be_sound(project, capsys):
    with FakeOllama() as server:
        assert here("verify", "--host", server.host) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok  ") == 7 and "DAMAGED" not in shown


def test_a_flipped_bit_in_the_cache_is_named_and_mended_by_the_remedy(project, capsys):
    flip(cached(project, md5 := md5_file(GGUF)))
    assert sh(project, "dvc status -q models/champion.dvc") == ""  # DVC does not notice
    status, findings = verify(capsys, "--local")
    assert status == 1
    (damage,) = (finding for finding in findings if "cache" in finding["place"])
    assert "models/champion/package/model.gguf, models/package/model.gguf" in damage["what"]
    sh(project, damage["remedy"].partition(" (")[0])
    assert verify(capsys, "--local") == (0, []) and md5_file(GGUF) == md5


def test_what_a_stage_made_of_a_damaged_output_is_made_again_too(project, capsys):
    stages, weights = yaml.safe_load(Path("dvc.yaml").read_text()), Path("models/adapter/adapter_model.safetensors")
    stages["stages"]["copy"] = {"cmd": f"cp {weights} copied", "deps": [str(weights.parent)], "outs": ["copied"]}
    Path("dvc.yaml").write_text(yaml.safe_dump(stages))
    sound, kept = weights.read_bytes(), cached(project, md5_file(weights))
    weights.unlink()
    os.link(kept, weights)
    flip(weights)
    sh(project, "dvc repro -q -s copy")
    (damage,) = (finding for finding in verify(capsys, "--local")[1] if "cache" in finding["place"])
    mend, _, others = damage["remedy"].partition(" (")
    sh(project, f"{mend} && {others.split('`')[3]} -q -s copy")
    assert Path("copied").read_bytes() == weights.read_bytes() == sound


def test_the_remedy_keeps_what_is_left_of_conversations(project, capsys):
    shard = next(Path("data/conversations").glob("*.jsonl"))
    sh(project, "dvc remote remove store")
    kept = cached(project, md5_file(shard))
    shard.unlink()
    os.link(kept, shard)  # as `dvc checkout` does, until intake runs
    flip(shard)
    data = shard.read_bytes()
    (damage,) = (finding for finding in verify(capsys, "--local")[1] if "cache" in finding["place"])
    subprocess.run(damage["remedy"].partition(" (")[0], shell=True, env=environment())
    assert not shard.exists() and data in [path.read_bytes() for path in Path(".whetstone").glob("damaged-*")]


def test_a_flipped_bit_in_a_shard_that_intake_knows_is_found(project, capsys):
    shard, _ = write_shard("data/conversations", "29990101T000000000-chat", [{"id": "a", "messages": []}])
    write_json("data/manifest.json", {"shards": [describe_shard(shard)]})
    assert verify(capsys, "--local") == (0, [])
    index = Path(".whetstone/memo/intake")
    before = ShardIndex.read([shard], index).shards
    flip(shard)
    assert ShardIndex.read([shard], index).shards == before  # its size, time and inode are as they were
    status, (damage,) = verify(capsys, "--local")
    assert status == 1 and damage["what"] == str(shard) and "dvc get" in damage["remedy"]


def test_without_a_remote_the_remedy_makes_what_was_damaged_again(project, capsys):
    sh(project, "dvc remote remove store && dvc repro -q")  # make has run for the candidate only
    adapter = cached(project, md5_file(Path("models/adapter/adapter_config.json")))
    flip(adapter)
    (damage,) = (finding for finding in verify(capsys, "--local")[1] if "cache" in finding["place"])
    remove, _, instead = damage["remedy"].partition(" && dvc fetch")
    sh(project, f"{remove} && {instead.split('`')[1]} -q")
    assert adapter.is_file() and verify(capsys, "--local") == (0, [])


def test_a_flipped_bit_in_the_remote_is_found(project, capsys):
    md5 = md5_file(GGUF)
    flip(project.parent / "remote" / "files" / "md5" / md5[:2] / md5[2:])
    with FakeOllama() as server:
        status, findings = verify(capsys, "--host", server.host)
    assert status == 1 and "in the remote" in findings[0]["what"] and "dvc push" in findings[0]["remedy"]


def test_what_was_not_pushed_is_noted_and_no_damage(project, capsys):
    md5 = md5_file(GGUF)
    (project.parent / "remote" / "files" / "md5" / md5[:2] / md5[2:]).unlink()
    with FakeOllama() as server:
        status, findings = verify(capsys, "--host", server.host)
    assert status == 0 and findings[0]["remedy"] == "dvc push"


def test_without_a_remote_that_is_noted(promoted, capsys):
    with FakeOllama() as server:
        status, findings = verify(capsys, "--host", server.host)
    assert status == 0 and findings[0]["what"] == "no remote is set"
    sh(promoted, "dvc remote add -q one /tmp/one && dvc remote add -q two /tmp/two")
    with FakeOllama() as server:
        findings = verify(capsys, "--host", server.host)[1]
    assert findings[0]["what"] == "no remote is the default of one, two"
    with pytest.raises(UserError, match="there is no remote elsewhere"):
        verify(capsys, "--remote", "elsewhere")


@pytest.mark.parametrize("path", ["adapter/adapter_model.safetensors", "package/create.json", "provenance/dvc.lock"])
def test_a_damaged_or_lost_artifact_is_named(project, capsys, path):
    file = Path(open_registry("trial").version(1).artifacts.removeprefix("file://")) / path
    kept = file.read_bytes()
    try:
        flip(file)
        status, findings = verify(capsys, "--local")
        assert status == 1 and findings[0]["what"] == f"{path} of version 1"
        file.unlink()
        assert verify(capsys, "--local")[1][0]["what"] == f"{path} of version 1 is gone"
    finally:
        file.write_bytes(kept)


def test_an_artifact_that_was_changed_together_with_its_hash_is_found(project, capsys):
    folder = Path(open_registry("trial").version(1).artifacts.removeprefix("file://"))
    create, files = folder / "package/create.json", folder / "files.json"
    kept = create.read_bytes(), files.read_bytes()
    try:
        create.write_bytes(kept[0].replace(b"im_end", b"im_END"))
        described = json.loads(kept[1]) | {"package/create.json": {"sha256": sha256_file(create)}}
        files.write_text(json.dumps(described))
        status, findings = verify(capsys, "--local")
        assert status == 1 and findings[0]["what"] == "files.json of version 1 does not fit its tags"
    finally:
        create.write_bytes(kept[0])
        files.write_bytes(kept[1])


def test_a_damaged_gguf_of_an_older_version_is_named_and_mended(project, capsys):
    """It comes back from the remote, where `dvc push` brought it when the version was champion."""
    sh(project, "git checkout -q HEAD~2 -- models/champion.dvc")
    sh(project, "dvc push -q models/champion.dvc")
    sh(project, "git checkout -q HEAD -- models/champion.dvc")
    kept = cached(project, open_registry("trial").version(1).tags["gguf_md5"])
    flip(kept)
    status, findings = verify(capsys, "--local")
    damage = next(finding for finding in findings if finding["what"].startswith("the GGUF of version 1"))
    assert status == 1 and damage["remedy"] == f"rm -f {kept} && python -m fine_tuning deploy 1 (fetches it)"
    kept.unlink()
    assert verify(capsys, "--local")[1][0]["remedy"] == "python -m fine_tuning deploy 1 (fetches it)"
    with FakeOllama(count_tokens=lambda _: 0) as server:
        here("deploy", "1", "--host", server.host)
    assert verify(capsys, "--local") == (0, [])


def test_a_champion_that_git_and_registry_disagree_on_is_named(project, capsys):
    sh(project, "git checkout -q HEAD~2 -- models/champion.json models/champion.dvc")
    sh(project, "dvc checkout -q --force models/champion.dvc")
    status, findings = verify(capsys, "--local")
    assert status == 1
    assert findings[0]["what"] == "the registry's champion is version 2, models/champion.json names another"


def test_what_another_registry_made_live_is_no_damage(project, capsys):
    gguf_sha256 = open_registry("trial").version(2).tags["gguf_sha256"]
    with FakeOllama() as server, OllamaClient(server.host) as client:
        client.upload_blob(GGUF, gguf_sha256)
        client.create("trial:live", {"files": {"model.gguf": f"sha256:{gguf_sha256}"}})
        status, findings = verify(capsys, "--host", server.host)
    assert status == 0 and "none of the versions that were deployed from here" in findings[0]["what"]


def test_a_changed_champion_is_restored_by_the_remedy(project, capsys):
    flip(Path("models/champion/package/model.gguf"))
    status, findings = verify(capsys, "--local")
    assert status == 1 and findings[0]["what"] == "models/champion/package/model.gguf"
    remove, restore = findings[0]["remedy"].split(" && ")
    sh(project, remove)
    sh(project, restore)
    assert verify(capsys, "--local") == (0, [])


def test_an_edited_evaluation_of_the_champion_is_restored_by_the_remedy(project, capsys):
    sh(project, "sed -i s/60.0/1.0/ models/champion/evaluation/data/evaluation/items.jsonl")
    sh(project, "dvc add -q models/champion")
    status, findings = verify(capsys, "--local")
    assert status == 1 and findings[0]["what"] == "models/champion/evaluation"
    for command in findings[0]["remedy"].split(" && "):
        sh(project, command)
    assert verify(capsys, "--local") == (0, [])


def test_a_registry_without_its_champion_is_damage(project, capsys):
    registry = open_registry("trial")
    registry._client.delete_registered_model_alias("trial", "champion")
    status, findings = verify(capsys, "--local")
    assert status == 1 and findings[0]["what"] == "the registry has no champion"


def test_a_manifest_that_changed_on_the_server_is_named(project, capsys):
    with FakeOllama() as server:
        registry = open_registry("trial")
        from fine_tuning.model_management.model_switcher import ModelSwitcher

        switcher = ModelSwitcher(OllamaClient(server.host), registry)
        switcher.record(1, "d" * 64)
        assert verify(capsys, "--host", server.host)[1][0]["what"] == "trial:1 was deployed and is gone"
        switcher.server.upload_blob(GGUF, open_registry("trial").version(2).tags["gguf_sha256"])
        request = {"files": {"model.gguf": f"sha256:{registry.version(2).tags['gguf_sha256']}"}}
        switcher.server.create("trial:1", request)
        switcher.server.create("trial:live", request)
        status, findings = verify(capsys, "--host", server.host)
    assert status == 1
    assert [finding["what"] for finding in findings] == [
        "trial:1 is not what was deployed",
        "trial:live is none of the versions that were deployed from here",
    ]


def test_a_live_name_that_is_gone_is_named(project, capsys):
    with FakeOllama() as server:
        from fine_tuning.model_management.model_switcher import ModelSwitcher

        switcher = ModelSwitcher(OllamaClient(server.host), open_registry("trial"))
        assert verify(capsys, "--host", server.host)[0] == 0, "nothing was live here"
        switcher.record_live(2)
        status, findings = verify(capsys, "--host", server.host)
    assert status == 1 and findings[0]["what"] == "trial:live is gone"


def test_a_flipped_byte_in_ollama_s_store_is_named_and_mended_by_the_remedy(project, tmp_path, capsys, monkeypatch):
    store, tokenizer = tmp_path / "models", load_tokenizer(project / "models/base")

    def count_tokens(prompt: str) -> int:
        return len(tokenizer(prompt, add_special_tokens=False).input_ids)

    with FakeOllama(count_tokens=count_tokens, store=store) as server:
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
        assert here("deploy", "2", "--host", server.host) == 0
        capsys.readouterr()
        _, findings = verify(capsys, "--host", server.host)
        (note,) = [finding for finding in findings if "Ollama's files cannot be read" in finding["what"]]
        assert note["kind"] == "note"

        monkeypatch.setenv("OLLAMA_MODELS", str(store))
        assert verify(capsys, "--host", server.host)[0] == 0
        weights = store / "blobs" / f"sha256-{open_registry('trial').version(2).tags['gguf_sha256']}"
        flip(weights)
        status, (damage,) = verify(capsys, "--host", server.host)
        assert status == 1 and damage["what"] == f"trial:2: Ollama's {weights}"

        erase, remove, deploy = re.fullmatch(
            r"rm -f (\S+); ollama rm (\S+); .* (deploy \d+)", damage["remedy"]
        ).groups()
        OllamaClient(server.host).delete(remove)
        Path(erase).unlink()
        assert here(*deploy.split(), "--host", server.host) == 0
        capsys.readouterr()
        assert verify(capsys, "--host", server.host)[0] == 0


def test_answers_are_compared_where_ollama_s_files_cannot_be_read(project, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    tokenizer = load_tokenizer(project / "models/base")
    with FakeOllama(count_tokens=lambda prompt: len(tokenizer(prompt, add_special_tokens=False).input_ids)) as server:
        assert here("deploy", "2", "--host", server.host) == 0
        capsys.readouterr()
        status, (note,) = verify(capsys, "--host", server.host)
        assert status == 0 and re.search(r"\d+ tokens of its answers are those of the GGUF", note["what"])

        server.reply = "Something else."
        status, (damage,) = verify(capsys, "--host", server.host)
        assert status == 1 and "answers probe 1 otherwise than its GGUF" in damage["what"]
        assert damage["remedy"].startswith("rm -f $(ollama show --modelfile trial:2")

        cached(project, open_registry("trial").version(2).tags["gguf_md5"]).unlink()
        findings = verify(capsys, "--host", server.host)[1]
    assert any("only its manifest was compared" in finding["what"] for finding in findings)


def test_a_server_that_is_down_is_noted(project, capsys):
    status, findings = verify(capsys, "--host", "127.0.0.1:9")
    assert status == 0 and "no Ollama answers" in findings[0]["what"]
