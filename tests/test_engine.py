"""Clean, export and prepare on a Dask cluster of two workers, or in processes: the same bytes as in one process."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.load import add_shard, conversations, write_checkout
from fine_tuning.common import shared_folder
from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import cores, open_engine
from fine_tuning.common.project import MadeBy
from fine_tuning.common.settings import read_params
from fine_tuning.data_preparation import dataset_builder, encoded_memo
from fine_tuning.runtime.hardware import detect_hardware
from stages import clean, export, intake, prepare
from tests import servers

ROOT = Path(__file__).parents[1]
STAGES = (intake, clean, export, prepare)


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder in an S3, and what whoever uses it has in the environment."""
    with servers.s3(tmp_path_factory.mktemp("s3")) as remote:
        yield remote.url, remote.environment


def _forbid(folder: str) -> None:
    """From now on this process cannot open a file in a folder, as if it were on another machine."""

    def refuse(event, arguments):
        if event == "open" and str(arguments[0]).startswith(folder):
            raise FileNotFoundError(2, "not on this machine", arguments[0])

    sys.addaudithook(refuse)


@contextmanager
def two_workers(client, folder: Path):
    """Started as the documentation says."""
    command = [sys.executable, "-m", "dask", "worker", client.scheduler.address, "--nworkers=2", "--nthreads=1"]
    process = subprocess.Popen([*command, "--no-dashboard"], cwd=folder)
    try:
        client.wait_for_workers(len(client.scheduler_info(n_workers=-1)["workers"]) + 2, timeout=60)
        yield
    finally:
        process.terminate()
        process.wait()


def _left(dask_worker) -> list[Path]:
    return [path for path in Path(dask_worker.local_directory).rglob("*") if path.is_file()]


@pytest.fixture
def engine_apart(bucket, tmp_path, monkeypatch):
    """An engine of two workers who see the bucket, and nothing of tmp_path."""
    from distributed import Client, LocalCluster

    address, environment = bucket
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster, Client(cluster, set_as_default=False) as client:
        with two_workers(client, ROOT):
            client.run(_forbid, str(tmp_path))
            yield f"{cluster.scheduler_address}?folder={address}"
            left = client.run(_left)
        assert not any(left.values()), "the workers' files of conversations are gone"
    from fsspec.core import url_to_fs

    files, folder = url_to_fs(address)
    files.invalidate_cache()
    assert files.find(folder) in ([], [folder]), "and those in the bucket"


@pytest.fixture(scope="module")
def single(tiny_base, tmp_path_factory):
    """A checkout with 600 conversations in three shards that one process cleaned and prepared."""
    folder = tmp_path_factory.mktemp("single") / "checkout"
    write_checkout(folder, ROOT, tiny_base, 200, None)
    for start in (200, 400):
        add_shard(folder, start, conversations(start, start + 200))
    change(folder, {"processes": 1}, {"max_train_tokens": None, "max_held_out_tokens": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in STAGES:
            stage.main()
    return folder


def change(folder, clean: dict, prepare: dict, export: dict | None = None) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["clean"] |= clean
    params["prepare"] |= prepare
    params["export"] |= export or {}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def made(folder) -> dict[str, bytes]:
    names = ("data/clean", "data/exports", "data/prepared", "metrics")
    files = [folder / "data/splits.txt", *(p for n in names for p in (folder / n).rglob("*") if p.is_file())]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.end_to_end
@pytest.mark.parametrize("where", ["two workers", "two workers without a shared disk", "three processes"])
def test_the_bytes_are_those_of_one_process(single, request, tmp_path, monkeypatch, where):
    folder = tmp_path / "checkout"
    shutil.copytree(
        single,
        folder,
        ignore=shutil.ignore_patterns("clean", "exports", "prepared", "splits.txt", "metrics", ".whetstone"),
    )
    if where == "three processes":
        change(folder, {"processes": 3}, {})
    else:
        engine = {"engine": request.getfixturevalue("cluster" if where == "two workers" else "engine_apart")}
        change(folder, engine, engine, engine)
    # Pieces so small that there are many, and files so small that whoever encodes a piece writes it.
    monkeypatch.setattr(dataset_builder, "PIECE_CHARACTERS", 20_000)
    monkeypatch.setattr(encoded_memo, "SEGMENT_BYTES", 1 << 16)
    monkeypatch.chdir(folder)
    for stage in STAGES:
        stage.main()
    assert made(folder) == made(single)


def _double(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize(
    ("where", "processes"), [(None, 1), (None, 2), pytest.param("cluster", 1, marks=pytest.mark.end_to_end)]
)
def test_results_come_in_order(request, where, processes):
    address = where and request.getfixturevalue(where)
    with open_engine(address, "clean", processes) as run:
        assert list(run(_double, range(50))) == list(range(0, 100, 2))


@pytest.mark.end_to_end
def test_the_files_of_pieces_that_are_handed_out_together_are_sent_at_once(tmp_path, monkeypatch):
    sent, put = [], MemoryFileSystem.put
    count = lambda store, files, *to: sent.append(len(files)) or put(store, files, *to)  # noqa: E731
    monkeypatch.setattr(MemoryFileSystem, "put", count)
    monkeypatch.setitem(shared_folder._BASES, "memory://run", Path("/"))
    files = [tmp_path / f"{number}" for number in range(3)]
    for file in files:
        file.write_text(file.name)
    made_by = MadeBy.here("export", ())
    for pieces in ([files[0]], [files[0], files[1], files[1], files[2]], files):
        assert len(shared_folder.tasks("memory://run", str, pieces, made_by)) == len(pieces)
    assert sent == [1, 2]


def test_a_worker_without_a_shared_disk_is_one_line(cluster, tmp_path):
    from distributed import Client

    (tmp_path / "file").write_text("text")
    with Client(cluster, set_as_default=False) as client:
        client.run(_forbid, str(tmp_path))
    with (
        pytest.raises(UserError, match=r"a Dask worker has no .*\?folder=") as told,
        open_engine(cluster, "clean") as run,
    ):
        list(run(_text, [tmp_path / "file"]))
    assert "\n" not in str(told.value)


@pytest.fixture
def scheduler(monkeypatch):
    """A client of one without workers; those that a test starts find the code in the folder that they start in only."""
    from distributed import Client, LocalCluster

    monkeypatch.delenv("PYTHONPATH", raising=False)
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def second_checkout(tmp_path_factory):
    """Of the same code, but for a comment in a file that clean and no other stage of a cluster depends on."""
    folder = tmp_path_factory.mktemp("second") / "checkout"
    for name in ("fine_tuning", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    with open(folder / "fine_tuning/data_collection/data_cleaner.py", "a") as file:
        file.write("# A comment.\n")
    return folder


@pytest.mark.end_to_end
def test_a_worker_without_the_code_is_one_line(scheduler, tmp_path):
    with (
        two_workers(scheduler, tmp_path),
        pytest.raises(UserError, match=r"worker tcp://[\d.:]+ does not say .*No module named 'fine_tuning'.*") as told,
        open_engine(scheduler.scheduler.address, "clean"),
    ):
        pass
    assert "\n" not in str(told.value)


OTHER_CODE = r"worker tcp://[\d.:]+ has other code of the stage clean: start it"


@pytest.mark.end_to_end
def test_a_worker_with_other_code_of_the_stage_is_refused(scheduler, second_checkout):
    address = scheduler.scheduler.address
    with two_workers(scheduler, second_checkout):
        with pytest.raises(UserError, match=OTHER_CODE) as told, open_engine(address, "clean"):
            pass
        assert "\n" not in str(told.value)
        with open_engine(address, "export") as run:
            assert list(run(abs, range(-9, 0))) == list(range(9, 0, -1)), "export does not depend on that file"


@pytest.mark.end_to_end
def test_a_worker_with_other_code_that_comes_later_is_refused(scheduler, second_checkout):
    with two_workers(scheduler, ROOT), open_engine(scheduler.scheduler.address, "clean") as run:
        results = run(time.sleep, [0.1] * 200)
        next(results)
        with two_workers(scheduler, second_checkout), pytest.raises(UserError, match=OTHER_CODE):
            list(results)


@pytest.mark.end_to_end
def test_a_worker_with_another_version_of_a_package_is_refused(scheduler, second_checkout, tmp_path):
    folder = tmp_path / "checkout"
    shutil.copytree(second_checkout, folder)
    for name in ("numpy", "orjson"):
        (folder / f"{name}-0.1.dist-info").mkdir()
        (folder / f"{name}-0.1.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    numpy, orjson = (rf"{name} 0\.1 instead of {re.escape(version(name))}" for name in ("numpy", "orjson"))
    with (
        two_workers(scheduler, folder),
        pytest.raises(UserError, match=f" has {numpy}, {orjson}: start it"),
        open_engine(scheduler.scheduler.address, "export", packages=("orjson",)),
    ):
        pass


@pytest.mark.end_to_end
def test_a_worker_without_access_to_the_bucket_is_one_line(cluster, bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    address, environment = bucket
    for name, value in environment.items():  # of this process, not of the workers
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=f"has no access to {address}.*credentials") as told,
        open_engine(f"{cluster}?folder={address}", "clean") as run,
    ):
        list(run(_text, [tmp_path / "file"]))
    assert "\n" not in str(told.value)


def _text(path: Path) -> str:
    return path.read_text()


def _die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _slowly(path: Path) -> Path:
    """Copy what a file says into one beside it, whose folder is made."""
    text, made = path.read_bytes(), path.with_suffix(".made")
    time.sleep(0.5)
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(text)
    return made


@pytest.mark.end_to_end
@pytest.mark.parametrize("lost", ["the scheduler", "the stage's patience"])
def test_a_run_that_ends_early_leaves_no_conversation_in_the_shared_folder_or_with_the_workers(tmp_path, lost):
    """As a real scheduler and real workers that are started by hand."""
    from distributed import Client

    shared, scratch, said = tmp_path / "shared", tmp_path / "scratch", tmp_path / "said.jsonl"
    said.write_text("something private")
    address, dask = f"tcp://127.0.0.1:{servers.free_ports(1)[0]}", [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen([*dask, "scheduler", "--port", address.rpartition(":")[2], "--no-dashboard"], cwd=ROOT)
    options = ["--nworkers=2", "--nthreads=1", "--no-dashboard", "--local-directory", str(scratch)]
    workers = subprocess.Popen([*dask, "worker", address, *options], cwd=ROOT)
    try:
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        ended = pytest.raises(UserError, match="went away") if lost == "the scheduler" else pytest.raises(Interrupted)
        with ended, open_engine(f"{address}?folder={shared}", "clean") as run:
            for number, _ in enumerate(run(_slowly, [said] * 40)):
                if number == 3 and lost == "the scheduler":
                    scheduler.kill()
                elif number == 3:
                    raise Interrupted
        time.sleep(2)  # what was worked on ends
        assert [path for path in shared.rglob("*") if path.is_file()] == []
        assert [path for path in scratch.rglob("said.*")] == []
    finally:
        for process in (workers, scheduler):
            process.terminate()
            process.wait()


class Interrupted(Exception):
    pass


def test_a_process_that_was_killed_is_one_line():
    with pytest.raises(UserError, match="one of the processes was killed"), open_engine(None, "clean", 2) as run:
        list(run(_die, range(9)))


def test_an_address_where_nobody_schedules_is_one_line(monkeypatch):
    monkeypatch.setattr("fine_tuning.common.parallel.TIMEOUT", 1)
    with pytest.raises(UserError, match="no Dask scheduler answers") as told, open_engine("tcp://127.0.0.1:9", "clean"):
        pass
    assert "\n" not in str(told.value)


def test_a_cluster_without_workers_is_one_line(monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr("fine_tuning.common.parallel.TIMEOUT", 1)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as empty,
        pytest.raises(UserError, match="has no worker"),
        open_engine(empty.scheduler_address, "clean"),
    ):
        pass


@pytest.mark.parametrize("section", ["clean", "export", "prepare"])
def test_the_parameter_is_read(single, section):
    from fine_tuning.data_collection.data_cleaner import CleanSettings
    from fine_tuning.data_collection.data_export import ExportSettings
    from fine_tuning.data_preparation.dataset_builder import PrepareSettings

    model = {"clean": CleanSettings, "export": ExportSettings, "prepare": PrepareSettings}[section]
    assert read_params(section, model, single / "params.yaml").engine is None


def test_threads_are_counted_on_a_system_that_cannot_bind_a_process_to_processors(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert cores() == os.cpu_count()
    assert detect_hardware("float32", None).threads == os.cpu_count()


@pytest.mark.parametrize(
    ("system", "answers", "expected"),
    [
        ("xpu", {"is_bf16_supported": lambda **_: True, "get_device_name": lambda: "Arc"}, ("bfloat16", "Arc")),
        ("xpu", {"is_bf16_supported": lambda **_: False, "get_device_name": lambda: "Iris"}, ("float32", "Iris")),
        ("mps", {}, ("float32", "Apple GPU")),
    ],
)
def test_gpus_of_intel_and_apple_are_found_with_their_precision(monkeypatch, system, answers, expected):
    place = torch.xpu if system == "xpu" else torch.backends.mps
    for name, answer in ({"is_available": lambda: True} | answers).items():
        monkeypatch.setattr(place, name, answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = detect_hardware("auto", 1)
    assert (found.device, found.precision, found.name) == (system, *expected)
