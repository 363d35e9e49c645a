"""Data and adapters by real servers: pushed, pulled in another clone, taken from elsewhere, refused in one line."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.schema.chat_format import load_tokenizer
from tests import servers
from tests.fake_ollama import FakeOllama
from tests.registered import environment, repro, sh, type_command
from tests.remote_config import check, secrets
from tests.servers import SECRET, Remote

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parents[1]
WRITABLE = ("local", "s3", "webdav", "ssh")
SHARD = Path("data/conversations/first.jsonl")
ADAPTER = Path("models/adapter/adapter_model.safetensors")


def needs(kind: str) -> None:
    """Skip where the server's program is not installed."""
    if kind == "ssh" and not Path(servers.SSHD).exists():
        pytest.skip("no sshd here: apt-get install openssh-server")


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[dict[str, Remote]]:
    """Servers that tests have asked for, by kind; all end with the module."""
    folder = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:

        class Started(dict):
            def __missing__(self, kind: str) -> Remote:
                needs(kind)
                self[kind] = stack.enter_context(servers.REMOTES[kind](folder / kind))
                return self[kind]

        yield Started()


@pytest.fixture
def project(tmp_path) -> Path:
    """A repository with a dataset and an adapter."""
    folder = tmp_path / "project"
    for path, data in ((SHARD, b'{"id":"c1"}\n' * 1000), (ADAPTER, os.urandom(200_000))):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(data)
    shutil.copy(ROOT / ".gitignore", folder)
    for command in (
        "git init -q -b main",
        "git config user.email t@example.org",
        "git config user.name T",
    ):
        sh(folder, command)
    for words in ("init -q", "config core.analytics false", "add -q data/conversations models/adapter"):
        dvc(folder, words)
    return folder


def dvc(folder: Path, words: str) -> None:
    """A DVC command that has to succeed, in this process: starting Python anew takes a second."""
    from dvc.cli import main

    with contextlib.chdir(folder):
        assert main(words.split()) == 0, words


def commit(folder: Path) -> None:
    sh(folder, "git add -A && git commit -qm Commit")


def failing(folder: Path, *words: str, **more: str) -> str:
    """Run a DVC command that has to fail; what it says without the tips."""
    command = ["python", "-m", "dvc", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**more))
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_pushed_is_pulled_in_another_clone_and_no_secret_is_in_git(started, project, tmp_path, kind):
    remote = started[kind]
    remote.add_to(project, kind)
    commit(project)
    dvc(project, f"push -q -r {kind}")
    config = (project / ".dvc/config").read_text()
    assert "verify = true" in config and SECRET not in config and secrets(config) == []
    assert not any(SECRET in sh(project, f"git show HEAD:{name}") for name in (".dvc/config", ".dvc/.gitignore"))

    clone = tmp_path / "clone"
    sh(tmp_path, f"git clone -q {project} {clone}")
    remote.unlock(clone, kind)
    dvc(clone, f"pull -q -r {kind}")
    for path in (SHARD, ADAPTER):
        assert (clone / path).read_bytes() == (project / path).read_bytes()


def test_a_reader_over_http_pulls_and_cannot_push(started, project, tmp_path):
    started["local"].add_to(project, "local")
    started["http"].add_to(project, "web")
    commit(project)
    dvc(project, "push -q -r local")
    clone = tmp_path / "clone"
    sh(tmp_path, f"git clone -q {project} {clone}")
    dvc(clone, "pull -q -r web")
    assert (clone / ADAPTER).read_bytes() == (project / ADAPTER).read_bytes()
    (clone / ADAPTER).unlink()
    (clone / ADAPTER).write_bytes(b"another")
    dvc(clone, "add -q models/adapter")
    assert "ERROR: failed to push" in failing(clone, "push", "-r", "web")


def test_a_flipped_byte_on_the_server_is_not_pulled(started, project, tmp_path):
    remote = started["local"]
    remote.add_to(project, "local")
    commit(project)
    dvc(project, "push -q -r local")
    (stored,) = (
        p for p in Path(remote.url).rglob("*") if p.is_file() and p.read_bytes() == (project / ADAPTER).read_bytes()
    )
    data = bytearray(stored.read_bytes())
    data[100] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(bytes(data))
    clone = tmp_path / "clone"
    sh(tmp_path, f"git clone -q {project} {clone}")
    assert "ERROR" in failing(clone, "pull", "-r", "local")
    assert not (clone / ADAPTER).exists()


def test_an_adapter_is_taken_and_imported_elsewhere(started, project, tmp_path):
    remote = started["s3"]
    remote.add_to(project, "s3")
    dvc(project, "config core.remote s3")
    commit(project)
    dvc(project, "push -q")
    bare = tmp_path / "server.git"
    sh(tmp_path, f"git clone -q --bare {project} {bare}")  # as on a git server: without .dvc/config.local
    run_dvc(tmp_path, "get", str(bare), "models/adapter", "-o", "taken", **remote.environment)
    assert (tmp_path / "taken" / ADAPTER.name).read_bytes() == (project / ADAPTER).read_bytes()

    other = tmp_path / "other"
    other.mkdir()
    sh(other, "git init -q")
    dvc(other, "init -q")
    run_dvc(other, "import", str(bare), "models/adapter", **remote.environment)
    assert (other / "adapter" / ADAPTER.name).read_bytes() == (project / ADAPTER).read_bytes()
    (project / ADAPTER).unlink()
    (project / ADAPTER).write_bytes(b"retrained")
    dvc(project, "add -q models/adapter")
    commit(project)
    dvc(project, "push -q")
    sh(project, f"git push -q {bare} main")
    run_dvc(other, "update", "adapter.dvc", **remote.environment)
    assert (other / "adapter" / ADAPTER.name).read_bytes() == b"retrained"


def run_dvc(folder: Path, *words: str, **more: str) -> None:
    command = ["python", "-m", "dvc", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**more))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["s3", "webdav", "ssh"])
def test_who_has_no_right_reads_one_line(started, project, kind):
    started[kind].add_to(project, kind)
    wrong = {
        "s3": {"secret_access_key": "wrong"},
        "webdav": {"password": "wrong"},
        "ssh": {"keyfile": str(stranger(project))},
    }[kind]
    started[kind].unlock(project, kind, **wrong)
    said = failing(project, "push", "-r", kind)
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert errors and SECRET not in said, said


def stranger(folder: Path) -> Path:
    """A key that the server does not know."""
    key = folder.parent / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key


@pytest.mark.parametrize(
    "url",
    [
        "/nowhere/at/all",
        "s3://nobody/data",
        "ssh://127.0.0.1:9/data",
        "webdav://127.0.0.1:9/data",
        "http://127.0.0.1:9",
    ],
)
def test_a_remote_that_is_not_there_is_one_line(project, url):
    dvc(project, f"remote add -q -d gone {url}")
    if url.startswith("s3"):
        dvc(project, "remote modify -q gone endpointurl http://127.0.0.1:9")
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / "models/adapter")
    said = failing(project, "pull", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_MAX_ATTEMPTS="1")
    assert sum(line.startswith("ERROR") for line in said.splitlines()) >= 1


# -----------------------------------------------------------------------------
# secrets


def test_a_secret_in_the_configuration_that_git_keeps_fails_the_check(tmp_path):
    config = tmp_path / "config"
    for line in ("password = x1", "secret_access_key = x1", "sas_token = x1", "url = https://me:x1@host/data"):
        config.write_text(f"['remote \"storage\"']\n    {line}\n")
        with pytest.raises(UserError, match="dvc remote modify --local") as refused:
            check(config)
        assert "x1" not in str(refused.value)
    config.write_text("['remote \"s\"']\n    url = ssh://me@host/data\n    ask_password = true\n    verify = true\n")
    check(config)
    check(ROOT / ".dvc/config")


def test_the_check_is_part_of_make_lint():
    assert "tests.remote_config" in (ROOT / ".ci/targets.mk").read_text()


# -----------------------------------------------------------------------------
# a team


@pytest.mark.skipif(servers.postgres_folder() is None, reason="no PostgreSQL here: apt-get install postgresql")
def test_a_team_shares_one_registry_one_store_and_one_ollama(started, promotable, tmp_path):
    """MLflow on PostgreSQL with artifacts on S3, DVC on S3, two clones, one Ollama."""
    remote = started["s3"]
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(promotable, first, symlinks=True)
    remote.add_to(first, "storage")
    dvc(first, "config core.remote storage")
    sh(first, "git add -A && git commit -qm 'A remote'")
    tokenizer = load_tokenizer(first / "models/base")
    with (
        tempfile.TemporaryDirectory() as place,
        servers.postgres(Path(place)) as database,
        servers.mlflow_server(tmp_path / "mlflow", database, "s3://whetstone/mlflow", remote.environment) as registry,
        FakeOllama(count_tokens=lambda prompt: len(tokenizer(prompt, add_special_tokens=False).input_ids)) as ollama,
    ):
        shared = {"MLFLOW_TRACKING_URI": registry}
        ok(type_command(first, "promote", **shared))
        sh(first, "git add -A && git commit -qm 'Promote version 1'")
        dvc(first, "push -q")
        ok(type_command(first, "deploy", "--host", ollama.host, **shared))

        sh(tmp_path, f"git clone -q {first} {second}")
        sh(second, "git config user.email b@example.org && git config user.name B")
        remote.unlock(second, "storage")
        dvc(second, "pull -q")
        shutil.copytree(first / "models/base", second / "models/base", dirs_exist_ok=True)
        assert "champion" in ok(type_command(second, "list", "--host", ollama.host, **shared))
        repro(second, seed=2)
        sh(second, "git add -A && git commit -qm 'Train again'")
        assert "version 2 registered" in ok(type_command(second, "promote", **shared))
        sh(second, "git add -A && git commit -qm 'Promote version 2'")
        dvc(second, "push -q")
        sh(second, "git push -q origin HEAD:second")
        ok(type_command(second, "deploy", "--host", ollama.host, **shared))

        sh(first, "git merge -q --ff-only second")
        dvc(first, "pull -q")
        shown = json.loads(ok(type_command(first, "list", "--json", "--host", ollama.host, **shared)))
        assert [v["aliases"] for v in shown["versions"]] == [["previous"], ["champion"]]
        assert shown["hosts"][ollama.host]["version"] == 2
        assert (first / "models/champion.json").read_bytes() == (second / "models/champion.json").read_bytes()
        assert ok(type_command(first, "rollback", "--host", ollama.host, **shared))
        assert not (first / "mlartifacts").exists() or not any((first / "mlartifacts").rglob("*.safetensors"))
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=remote.settings["endpointurl"],
            region_name="us-east-1",
            aws_access_key_id=servers.USER,
            aws_secret_access_key=SECRET,
        )
        stored = [o["Key"] for o in client.list_objects_v2(Bucket="whetstone", Prefix="mlflow/")["Contents"]]
        assert any(key.endswith("adapter/adapter_model.safetensors") for key in stored)


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
