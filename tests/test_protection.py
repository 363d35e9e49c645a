"""A checkout is closed to other users of the machine, and usable after a kill: as another uid tries it, where the suite
is root and can be one; by the modes elsewhere."""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from fine_tuning.common.protection import FOLDERS, RWLOCK, protect
from fine_tuning.common.records import read_jsonl
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shards import shard_paths
from tests.project import Project, conversations, new_project

pytestmark = pytest.mark.end_to_end

SECRET = "the kingfisher nests at the third bend"
ROOT_USER = os.geteuid() == 0
NOBODY = 65534


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_base):
    """A checkout of the stages of data that has run once, with a sealed chat; committed."""
    folder = tmp_path_factory.mktemp("template") / "checkout"
    folder.mkdir()
    project = new_project(folder, tiny_base)
    project.set_params(clean={"processes": 1})
    shutil.copytree(tiny_base, folder / "models/base", dirs_exist_ok=True)
    ConversationLogger(folder / "inbox/conversations.jsonl").log_conversation(f"Tell me: {SECRET}", SECRET)
    project.run("python", "-m", "fine_tuning", "seal")
    project.import_conversations(conversations(), "first")
    project.run("dvc", "repro", "-s", "intake", "clean", "export")
    project.commit("Run")
    return folder


@pytest.fixture
def project(template):
    """A copy where another user could reach it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        shutil.copytree(template, Path(name) / "checkout", symlinks=True)
        yield Project(Path(name) / "checkout")


def open_up(folder: Path) -> None:
    """The modes that git, DVC and SQLite leave under the usual umask."""
    (folder / "mlflow.db").touch()
    for path in [*(folder / name for name in FOLDERS), folder / "mlflow.db"]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def as_nobody(command: str) -> str:
    """What a shell command of another user prints."""
    options = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/", "capture_output": True}
    return subprocess.run(["sh", "-c", command], **options).stdout.decode("utf-8", "replace")


def modes(folder: Path) -> dict[str, int]:
    paths = [*(folder / name for name in FOLDERS), *folder.glob("mlflow.db*")]
    return {path.name: path.stat().st_mode & 0o777 for path in paths}


# -----------------------------------------------------------------------------
# other users


@pytest.mark.parametrize("command", ["make install", "python -m fine_tuning stats", "the app"])
def test_nobody_else_can_read_the_chats(project, command, monkeypatch):
    open_up(project.folder)
    read = f"cd {project.folder}; find data .dvc inbox -type f -exec cat {{}} +; cat mlflow.db && echo opened"
    if ROOT_USER:
        assert SECRET in as_nobody(read) and "opened" in as_nobody(read)
    if command == "the app":
        from fine_tuning.integration.app_context import app

        monkeypatch.chdir(project.folder)
        app()
    elif command == "make install":
        (project.folder / ".venv").symlink_to(Path(sys.prefix))
        project.run("make", "install", "-o", ".venv/installed")
    else:
        project.run(*command.split())
    if ROOT_USER:
        assert SECRET not in as_nobody(read) and "opened" not in as_nobody(read)
    assert modes(project.folder) == {**dict.fromkeys(FOLDERS, 0o700), "mlflow.db": 0o600}


def test_the_folders_stay_closed_through_the_pipeline_and_a_pull(project):
    protect(project.folder)
    project.run("dvc", "remote", "add", "-q", "-d", "store", str(project.folder.parent / "remote"))
    project.run("dvc", "push", "-q")
    shutil.rmtree(project.folder / "data/clean")
    shutil.rmtree(project.folder / "data/conversations")
    project.run("dvc", "pull", "-q", "data/conversations.dvc")
    project.run("dvc", "repro", "-s", "-f", "intake", "clean", "export")
    assert set(modes(project.folder).values()) == {0o700}


PLANT = """
import sys
from dvc_data.hashfile.cache import Cache
class Payload:
    def __reduce__(self):
        return exec, (f"open({sys.argv[2]!r}, 'w').close()",)
with Cache(sys.argv[1] + "/links") as cache:
    cache["params.yaml"] = Payload()
"""


def site_cache(project: Project) -> Path:
    """Where DVC keeps its pickles of this checkout."""
    return Path(project.run("python", "-c", "from dvc.repo import Repo; print(Repo().site_cache_dir)").strip())


def test_nobody_else_can_plant_a_pickle_that_dvc_loads(project, tmp_path):
    planted, ran = project.folder.parent / "planted", project.folder.parent / "ran"
    project.run("python", "-c", PLANT, str(planted), str(ran))
    subprocess.run(["chmod", "-R", "a+rX", planted], check=True)

    def attack() -> bool:
        place = site_cache(project)
        plant = f"mkdir -p {place.parent}; mv {place} {place}.old; cp -r {planted} {place} && chmod -R a+rwX {place}"
        as_nobody(plant) if ROOT_USER else None
        project.run("dvc", "checkout", "-q", check=False)
        shutil.rmtree(f"{place}.old", ignore_errors=True)
        return ran.exists()

    local = project.folder / ".dvc/config.local"
    local.unlink()
    if ROOT_USER:
        assert attack(), "without a wall the attack works"
        shutil.rmtree(site_cache(project))
        ran.unlink()
    protect(project.folder)
    place = site_cache(project)
    assert place.is_relative_to(project.folder / ".dvc/tmp/site_cache")
    assert (project.folder / ".dvc/tmp/site_cache").stat().st_mode & 0o777 == 0o700
    assert not attack()


def test_a_copy_has_a_site_cache_of_its_own_and_what_the_user_has_set_stays(project, tmp_path):
    protect(project.folder)
    local = project.folder / ".dvc/config.local"
    project.run("dvc", "config", "--local", "cache.type", "copy")
    copy = project.copy(tmp_path / "copy")
    protect(copy.folder)
    assert site_cache(copy).is_relative_to(copy.folder) and site_cache(project).is_relative_to(project.folder)
    assert "type = copy" in (copy.folder / ".dvc/config.local").read_text()
    project.run("dvc", "config", "--local", "core.site_cache_dir", str(tmp_path / "mine"))
    protect(project.folder)
    assert str(tmp_path / "mine") in local.read_text()


def test_verify_reports_what_is_open(promoted, capsys):
    from fine_tuning.commands.verify import check_privacy

    protect(promoted)
    assert check_privacy(promoted).findings == []
    (promoted / "data").chmod(0o750)
    shared = promoted.parent / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    Project(promoted).run("dvc", "config", "--local", "core.site_cache_dir", str(shared))
    found = [(finding.kind, finding.what.split()[0]) for finding in check_privacy(promoted).findings]
    assert found == [("open", "data"), ("open", str(shared))]


# -----------------------------------------------------------------------------
# after a kill


def test_a_torn_file_is_known_as_dvc_knows_it(project):
    """Whatever beginning of dvc.lock DVC refuses is torn, and no whole stage at a line's end is."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from fine_tuning.common import protection

    lock = project.folder / "dvc.lock"
    whole = lock.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    value_ends = [end for end in ends if not whole[:end].endswith(b":\n")]
    draw, refused = random.Random(0), 0
    with Repo(str(project.folder)) as repo:
        for size in [0, *ends[:-1], *draw.sample(range(len(whole)), 100)]:
            lock.write_bytes(whole[:size])
            try:
                repo._reset()
                list(repo.index.stages)
                accepted = True
            except (DvcException, AttributeError):  # half a hash may be a number
                accepted, refused = False, refused + 1
            torn = protection._is_torn(lock)
            # DVC takes one without any stage, and half a word at the end, for whole.
            assert torn if not accepted or b"stages:" not in whole[:size] else torn <= (size not in value_ends), size
    assert refused > 20


def test_a_merge_that_is_to_be_finished_is_no_torn_file(project):
    lock = project.folder / "dvc.lock"
    lock.write_text(f"<<<<<<< HEAD\n{lock.read_text()}")
    text = lock.read_text()
    protect(project.folder)
    assert lock.read_text() == text


def half(lock: Path) -> bytes:
    """What a kill in the middle of a word leaves."""
    data = lock.read_bytes()
    return data[: data.index(b"md5", len(data) // 2) + 2]


@pytest.mark.parametrize("name", [RWLOCK, "dvc.lock", "data/conversations.dvc"])
def test_what_a_kill_tore_is_put_back_by_the_next_command(project, name):
    path = project.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(half(path) if name == "dvc.lock" else b"")
    told = project.run("dvc", "status", "data/conversations.dvc" if path.suffix == ".dvc" else "clean", check=False)
    assert "ERROR" in told or path.suffix == ".dvc", told  # DVC takes an empty .dvc file for one of nothing
    ConversationLogger(project.folder / "inbox/conversations.jsonl").log_conversation("q", "a", id="late")
    told = project.run("python", "-m", "fine_tuning", "seal")
    assert f"note: {name} was " in told and "Traceback" not in told
    project.run("dvc", "repro", "-s", "intake", "clean", "export")
    shards = shard_paths(project.folder / "data/conversations")
    found = [record["id"] for shard in shards for record in read_jsonl(shard)]
    assert "late" in found and len(found) == 42


@pytest.mark.parametrize("content", ['{"write": 5}', '{"read": {"a": {}}}', "[]", '{"write": {"a": {"pid": "1"}}}'])
def test_a_rwlock_that_dvc_refuses_is_removed(project, content):
    noted = project.folder / RWLOCK
    noted.write_text(content)
    assert "ERROR" in project.run("dvc", "repro", "-s", "clean", check=False)
    protect(project.folder)
    assert not noted.exists()
    noted.write_text('{"write": {"data/clean": {"pid": 1, "cmd": "dvc repro"}}, "read": {}}')
    protect(project.folder)
    assert noted.exists()


def test_a_file_that_is_just_being_written_is_left_alone(project):
    """DVC holds its lock while it writes."""
    from dvc.repo import Repo

    lock = project.folder / "dvc.lock"
    lock.write_bytes(half(lock))
    size = lock.stat().st_size
    with Repo(str(project.folder)) as repo, repo.lock:
        project.run("python", "-m", "fine_tuning", "stats")
    assert lock.stat().st_size == size


KILL_THE_TREE = """
import os, signal, sys
name, share = sys.argv[1], float(sys.argv[2])
def hook(event, values):
    if event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.fsdecode(values[0]) if isinstance(values[0], (str, bytes)) else ""
        if path.endswith(name) and os.path.exists(path):
            os.truncate(path, int(os.path.getsize(path) * share))  # as far as DVC has come in writing it anew
            os.killpg(0, signal.SIGKILL)
sys.addaudithook(hook)
from dvc.cli import main
sys.exit(main(["repro", "-f", "-s", "intake", "clean", "export"]))
"""


def outputs(project: Project) -> dict[str, str]:
    stages = yaml.safe_load((project.folder / "dvc.lock").read_bytes())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def test_a_killed_pipeline_is_gone_on_with_wherever_its_whole_tree_was_killed(project):
    wanted = outputs(project)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    started = {"cwd": project.folder, "env": environment, "start_new_session": True, "stdout": subprocess.DEVNULL}
    draw, kills = random.Random(0), 0
    for name, share in (("dvc.lock", 0.0), ("dvc.lock", 0.4), ("dvc/tmp/rwlock", 0.0), ("", 0.0), ("", 0.0)):
        if name:
            run = subprocess.Popen([sys.executable, "-c", KILL_THE_TREE, name, str(share)], **started)
        else:
            run = subprocess.Popen(["dvc", "repro", "-f", "-s", "intake", "clean", "export"], **started)
            time.sleep(1 + 4 * draw.random())
            os.killpg(run.pid, signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
        project.run("python", "-m", "fine_tuning", "sample")  # what `make repro` does first
        project.run("dvc", "repro", "-s", "intake", "clean", "export")
        assert outputs(project) == wanted, name
    assert kills >= 3


# -----------------------------------------------------------------------------
# copies


def test_a_copy_a_moved_folder_and_a_second_clone_keep_to_their_own_registry(promoted, tmp_path, monkeypatch):
    from fine_tuning.model_management.model_registry import open_registry
    from tests.registered import here, repro

    def kept() -> dict[str, bytes]:
        files = [promoted / "mlflow.db", *(path for path in (promoted / "mlartifacts").rglob("*") if path.is_file())]
        return {str(path): path.read_bytes() for path in files}

    open_registry("trial")
    before = kept()
    copy = Project(promoted).copy(tmp_path / "copy")
    monkeypatch.chdir(copy.folder)
    protect()
    repro(copy.folder, seed=3)
    here("promote")
    assert open_registry("trial").version(3).artifacts.startswith((copy.folder / "mlartifacts").as_uri())
    with contextlib.closing(sqlite3.connect("mlflow.db")) as store:
        places = [place for (place,) in store.execute("SELECT artifact_location FROM experiments")]
    assert len(places) == 2 and all(str(copy.folder) in place for place in places)
    assert kept() == before
    moved = copy.folder.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    protect()
    assert here("verify", "--local") == 0
    Project(tmp_path).run("git", "clone", "-q", str(promoted), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    assert open_registry("trial").versions() == []
    assert kept() == before
