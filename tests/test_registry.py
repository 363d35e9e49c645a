"""The registry on a real SQLite store: one version for one content, aliases that always name something whole."""

import contextlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import httpx
import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.model_management import sqlite_registry
from fine_tuning.model_management.model_registry import CANDIDATE, CHAMPION, CLAIM, PREVIOUS, ModelRegistry
from tests.fake_ollama import silent_host
from tests.registered import environment
from tests.strike import in_child

FIRST, SECOND, THIRD = ("1" * 64, "2" * 64, "3" * 64)
NUMBERS = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def registry(store):
    return open_registry(store, f"model{next(NUMBERS)}")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"weights")
    return folder


def open_registry(store: Path, name: str, **options) -> ModelRegistry:
    return ModelRegistry(name, f"sqlite:///{store / 'mlflow.db'}", store / "artifacts", store / "locks", **options)


def register(registry, files, content):
    return registry.register(content, files, {"adapter_sha256": content, "base_model": "tiny"}, {"perplexity": 9.2})


def test_a_version_carries_its_files_tags_and_metrics(registry, files, tmp_path):
    version, new = register(registry, files, FIRST)
    assert new and version.number == 1 and version.tag == f"{registry.name}:1"
    assert version.tags["base_model"] == "tiny"
    assert registry.download(version, "adapter/weights", tmp_path).read_bytes() == b"weights"
    run = registry._client.get_run(version.run_id)
    assert run.data.metrics == {"perplexity": 9.2} and run.info.status == "FINISHED"


def test_the_same_content_is_the_same_version(registry, files):
    first, _ = register(registry, files, FIRST)
    again, new = register(registry, files, FIRST)
    assert not new and again == first
    assert register(registry, files, SECOND)[0].number == 2


def test_a_version_belongs_to_the_run_that_trained_its_adapter(registry, files):
    runs = [
        registry._client.create_run(registry.store[1], start_time=start, tags={"adapter_sha256": THIRD})
        for start in (2000, 3000, 1000)
    ]
    version, _ = register(registry, files, THIRD)
    assert version.run_id == runs[1].info.run_id, "the newest of those that trained it"


@pytest.mark.end_to_end
def test_three_processes_that_register_at_once_make_one_version(store, files):
    program = (
        "import sys; from pathlib import Path; from tests.test_registry import open_registry, register;"
        "registry = open_registry(Path(sys.argv[1]), 'racing'); print(registry.name, flush=True); sys.stdin.readline();"
        f"print(register(registry, Path(sys.argv[2]), '{FIRST}')[0].number)"
    )
    racers = [
        subprocess.Popen(
            ["python", "-c", program, str(store), str(files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "racing\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.communicate(timeout=120)[0] for racer in racers] == ["1\n"] * 3
    assert len(open_registry(store, "racing").versions()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_registers_nothing(registry, files, value):
    with pytest.raises(UserError, match="perplexity is not a finite number"):
        registry.register(FIRST, files, {}, {"perplexity": value})
    assert registry.versions() == []


def test_promotion_moves_champion_and_previous(registry, files):
    for content in (FIRST, SECOND):
        register(registry, files, content)
    registry.nominate(1)
    assert registry.by_alias(CANDIDATE).number == 1
    assert registry.promote(1, None) is None
    assert registry.by_alias(CANDIDATE) is None
    assert registry.promote(2, 1).number == 1
    assert (registry.by_alias(CHAMPION).number, registry.by_alias(PREVIOUS).number) == (2, 1)
    assert [version.aliases for version in registry.versions()] == [("previous",), ("champion",)]
    assert registry.promote(2, 1).number == 1
    assert registry.by_alias(PREVIOUS).number == 1
    registry.nominate(2)
    assert registry.by_alias(CANDIDATE) is None, "the champion is no candidate"


def test_a_champion_that_changed_in_the_meantime_is_not_replaced(registry, files):
    for content in (FIRST, SECOND, THIRD):
        register(registry, files, content)
    registry.promote(1, None)
    registry.promote(2, 1)
    with pytest.raises(UserError, match="version 2 became champion in the meantime"):
        registry.promote(3, 1)
    assert registry.by_alias(CHAMPION).number == 2


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(registry, store, files):
    for content in (FIRST, SECOND, THIRD):
        register(registry, files, content)
    registry.promote(1, None)
    start, told = threading.Barrier(2), []

    def promote(number: int) -> None:
        rival = open_registry(store, registry.name)
        start.wait()
        try:
            rival.promote(number, 1)
        except UserError as error:
            told.append(str(error))

    racers = [threading.Thread(target=promote, args=(number,)) for number in (2, 3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    champion = registry.by_alias(CHAMPION).number
    assert champion in (2, 3) and registry.by_alias(PREVIOUS).number == 1
    assert len(told) == 1 and f"version {champion} became champion in the meantime" in told[0]


def questions(store: Path, name: str) -> list[str]:
    """What `list` asks, as a process that must not import MLflow."""
    program = (
        "import sys; from pathlib import Path; from tests.test_registry import open_registry;"
        "registry = open_registry(Path(sys.argv[1]), sys.argv[2]); version = registry.version(2);"
        "print(registry.versions() and registry.by_alias('champion').number, version.tags['base_model'],"
        "registry.download(version, 'adapter/weights', Path(sys.argv[1], 'out')).read_text(), 'mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(store), name], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_versions_are_read_without_mlflow_and_as_it_reads_them(registry, store, files):
    for content in (FIRST, SECOND, "4" * 64):
        register(registry, files, content)
    registry.promote(2, None)
    registry.remove(3)
    assert questions(store, registry.name) == ["2", "tiny", "weights", "False"]
    assert registry.versions() == registry._ask_mlflow() and len(registry.versions()) == 2


def test_a_store_with_other_tables_is_left_to_mlflow(registry, store, files, monkeypatch):
    for content in (FIRST, SECOND):
        register(registry, files, content)
    registry.promote(2, None)
    monkeypatch.setattr(sqlite_registry, "SCHEMAS", {"another"})
    assert sqlite_registry.read_versions(registry.uri, registry.name, store / "artifacts") is None
    assert [version.aliases for version in open_registry(store, registry.name).versions()] == [(), ("champion",)]


def test_reading_a_checkout_without_a_store_makes_none(tmp_path):
    assert open_registry(tmp_path, "name").versions() == [] and not list(tmp_path.iterdir())


def test_a_copied_store_names_its_own_folder_and_a_moved_one_too(registry, store, files, tmp_path):
    register(registry, files, FIRST)
    registry.promote(1, None)
    copy = Path(shutil.copytree(store, tmp_path / "a copy"))
    before = sorted(store.rglob("*"))
    own = open_registry(copy, registry.name)
    assert own.version(1).artifacts.startswith((copy / "artifacts").as_uri())
    register(own, files, SECOND)
    assert sorted(path for path in store.rglob("*") if path.name != "mlflow.db-journal") == before
    moved = copy.rename(tmp_path / "moved")
    again = open_registry(moved, registry.name)
    for number in (1, 2):
        assert (
            again.download(again.version(number), "adapter/weights", tmp_path / f"{number}").read_bytes() == b"weights"
        )
    assert registry.version(1).artifacts.startswith((store / "artifacts").as_uri())


def test_a_store_that_two_checkouts_share_keeps_its_addresses(registry, store, files, tmp_path):
    version, _ = register(registry, files, FIRST)
    shared = ModelRegistry(registry.name, registry.uri, tmp_path / "mlartifacts", tmp_path / "locks")
    assert shared.version(1).artifacts == version.artifacts


def on_another_machine(store: Path, name: str, **options) -> ModelRegistry:
    """The same registry, with lock files of its own."""
    return ModelRegistry(
        name, f"sqlite:///{store / 'mlflow.db'}", store / "artifacts", store / f"locks{next(NUMBERS)}", **options
    )


def test_another_machine_that_promotes_in_between_is_kept_out(registry, store, files, monkeypatch):
    for content in (FIRST, SECOND, THIRD):
        register(registry, files, content)
    registry.promote(1, None)
    rival, told, move = on_another_machine(store, registry.name, patience=0.2), [], registry._move

    def in_between(alias: str, number: int) -> None:
        if not told:  # after the check of what the champion is, before it moves
            with pytest.raises(UserError, match="another machine promotes") as refusal:
                rival.promote(3, 1)
            told.append(str(refusal.value))
        move(alias, number)

    monkeypatch.setattr(registry, "_move", in_between)
    registry.promote(2, 1)
    assert told and registry.by_alias(CHAMPION).number == 2 and registry.by_alias(PREVIOUS).number == 1
    with pytest.raises(UserError, match="version 2 became champion in the meantime"):
        rival.promote(3, 1)


def test_of_promotions_on_several_machines_one_succeeds(registry, store, files):
    for content in (FIRST, SECOND, THIRD):
        register(registry, files, content)
    machines = [(on_another_machine(store, registry.name), number) for number in (2, 3)]
    registry.promote(1, None)
    for _ in range(5):
        start, done = threading.Barrier(2), []

        def promote(machine: ModelRegistry, number: int, start=start, done=done) -> None:
            start.wait()
            with contextlib.suppress(UserError):
                machine.promote(number, 1)
                done.append(number)

        racers = [threading.Thread(target=promote, args=machine) for machine in machines]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert done == [registry.by_alias(CHAMPION).number], "each verdict compared with version 1"
        assert registry.by_alias(PREVIOUS).number == 1
        registry.promote(1, done[0])


def test_a_promotion_that_was_killed_stands_in_the_way_for_a_while(registry, store, files, monkeypatch):
    register(registry, files, FIRST)
    registry._client.set_registered_model_tag(registry.name, f"{CLAIM}0", str(time.time()))
    hurried = open_registry(store, registry.name, patience=0.1)
    with pytest.raises(UserError, match="for 5 minutes"):
        hurried.promote(1, None)
    registry._client.set_registered_model_tag(registry.name, f"{CLAIM}0", str(time.time() - 301))
    hurried.promote(1, None)
    assert registry.by_alias(CHAMPION).number == 1


def test_what_a_killed_promotion_of_this_checkout_left_is_no_hindrance(registry, store, files, monkeypatch):
    register(registry, files, FIRST)
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(registry._client, "delete_registered_model_tag", lambda *_: None)
        patch.setattr(registry, "_move", lambda *_: sys.exit())
        registry.promote(1, None)
    assert any(tag.startswith(CLAIM) for tag in registry._client.get_registered_model(registry.name).tags)
    open_registry(store, registry.name, patience=0.1).promote(1, None)
    assert registry.by_alias(CHAMPION).number == 1


def test_a_champion_and_the_way_back_cannot_be_deleted(registry, files):
    for content in (FIRST, SECOND, THIRD):
        register(registry, files, content)
    registry.promote(1, None)
    registry.promote(2, 1)
    for number, alias in ((2, "champion"), (1, "previous")):
        with pytest.raises(UserError, match=f"version {number} is the {alias} and stays"):
            registry.remove(number)
    registry.remove(3)
    assert [version.number for version in registry.versions()] == [1, 2]


def test_a_number_that_is_not_there_is_one_clear_line(registry):
    with pytest.raises(UserError, match="has no version 7"):
        registry.version(7)
    assert registry.by_alias(CHAMPION) is None and registry.versions() == []


def test_a_file_that_is_gone_is_named(registry, files, tmp_path):
    version, _ = register(registry, files, FIRST)
    with pytest.raises(UserError, match=r"probes\.json of version 1 is gone"):
        registry.download(version, "probes.json", tmp_path)


def test_a_locked_database_is_waited_for(registry, store, files):
    holder = sqlite3.connect(store / "mlflow.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.5, lambda: holder.execute("ROLLBACK"))
    release.start()
    assert register(registry, files, FIRST)[1]
    release.join()
    holder.close()


def test_a_database_that_stays_locked_is_one_clear_line(store, files, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    registry = open_registry(store, "waiting", patience=0.3)
    tries = []

    def locked(*_: object) -> None:
        """What MLflow raises after the 20 seconds that it lets SQLite wait."""
        tries.append(1)
        raise MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(registry.store[0], "create_registered_model", locked)
    with pytest.raises(UserError, match="database stayed locked"):
        register(registry, files, FIRST)
    assert len(tries) > 1


@contextlib.contextmanager
def mlflow_server(tmp_path):
    with silent_host() as address:
        port = address.rpartition(":")[2]
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    server = subprocess.Popen(
        [sys.executable, *command, *stores], **quiet, env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    )
    try:
        wait_for(address)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.end_to_end
def test_an_mlflow_server_serves_as_well(tmp_path, files):
    with mlflow_server(tmp_path) as address:
        registry = ModelRegistry("served", address, tmp_path / "unused", tmp_path / "locks")
        version, new = register(registry, files, FIRST)
        assert new and version.artifacts.startswith("mlflow-artifacts:/")
        assert not register(registry, files, FIRST)[1]
        registry.promote(1, None)
        assert [found.aliases for found in registry.versions()] == [("champion",)]
        assert registry.download(version, "adapter/weights", tmp_path / "out").read_bytes() == b"weights"
        assert not (tmp_path / "unused").exists()
        of_two_machines_that_promote_at_once_one_succeeds(registry, address, tmp_path, files)


def of_two_machines_that_promote_at_once_one_succeeds(registry, address, tmp_path, files):
    for content in (SECOND, THIRD):
        register(registry, files, content)
    other = ModelRegistry("served", address, tmp_path / "unused", tmp_path / "locks of another machine")
    start, done = threading.Barrier(2), []

    def promote(machine: ModelRegistry, number: int) -> None:
        start.wait()
        with contextlib.suppress(UserError):
            machine.promote(number, 1)
            done.append(number)

    racers = [threading.Thread(target=promote, args=machine) for machine in ((registry, 2), (other, 3))]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert done == [registry.by_alias(CHAMPION).number]


def wait_for(address: str) -> None:
    for _ in range(720):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=1).status_code == 200:
                return
        time.sleep(0.25)
    raise AssertionError("the MLflow server did not start in three minutes")


@pytest.mark.parametrize("what", ["a text", "a folder", "another program's database", "not SQLite's", "no driver"])
def test_an_address_of_something_else_is_one_clear_line_and_leaves_it_as_it_was(tmp_path, what):
    other = tmp_path / "other"
    if what == "a folder":
        other.mkdir()
    elif what == "another program's database":
        with contextlib.closing(sqlite3.connect(other)) as database:
            database.execute("CREATE TABLE bookmarks (address TEXT)")
    else:
        other.write_text("root:x:0:0\n" * 500)
    before = other.read_bytes() if other.is_file() else None
    address = {"not SQLite's": "file:///etc", "no driver": "mysql://host/name"}.get(what, f"sqlite:///{other}")
    start = time.monotonic()
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as told:
        ModelRegistry("name", address, tmp_path / "artifacts", tmp_path / "locks").versions()
    assert "\n" not in str(told.value) and time.monotonic() - start < 60
    assert before is None or other.read_bytes() == before


@pytest.mark.end_to_end
def test_a_store_that_was_killed_while_it_was_made_is_made_by_the_next(tmp_path):
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (a forked child need not import it)

    killed = 0
    for tenths in range(3, 13):
        folder = tmp_path / str(tenths)
        folder.mkdir()

        def opened(folder=folder):
            assert open_registry(folder, "name")._client

        killed += os.WIFSIGNALED(in_child(lambda: None, opened, tenths / 10))
        assert in_child(lambda: None, opened) == 0
        assert {path.name for path in folder.iterdir()} <= {"mlflow.db", "artifacts", "locks"}
    assert killed > 3


def test_a_store_whose_last_writer_was_killed_is_rolled_back_and_used(tmp_path, files):
    first, _ = register(open_registry(tmp_path, "name"), files, FIRST)

    def killed():
        store = sqlite3.connect(tmp_path / "mlflow.db")
        store.execute("PRAGMA cache_size = 1")  # what does not fit is written before it is committed
        store.execute("BEGIN")
        store.execute("UPDATE model_version_tags SET value = 'half'")
        store.execute(
            "CREATE TABLE filler AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9999) "
            "SELECT i, hex(randomblob(50)) FROM n"
        )
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(in_child(lambda: None, killed))
    assert (tmp_path / "mlflow.db-journal").stat().st_size
    second, _ = register(open_registry(tmp_path, "name"), files, SECOND)
    assert [v.tags["adapter_sha256"] for v in open_registry(tmp_path, "name").versions()] == [FIRST, SECOND]
    assert (first.number, second.number) == (1, 2)


def test_a_store_address_that_is_none_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="MLflow store"):
        ModelRegistry("trial", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["", "../models", "Trial", "a b", "a:b", "-x", "x" * 65])
def test_a_name_outside_the_allow_list_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="not a model name"):
        open_registry(tmp_path, name)
