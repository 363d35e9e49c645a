"""What arrives is worked into what is there: the result is byte for byte that of a full run with the same ledger."""

import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fine_tuning.common.results import Memo
from fine_tuning.data_collection.cleaning import shard_cleaner, shard_merger
from fine_tuning.data_collection.cleaning.near_duplicates import BANDS
from fine_tuning.data_collection.cleaning.shard_merger import ROW
from fine_tuning.data_collection.storage.shards import shard_paths, write_shard
from fine_tuning.data_preparation import encoded_memo, split_writer
from fine_tuning.data_preparation.catalogue import FACT, REASONS
from fine_tuning.data_preparation.encoded_memo import EncodedMemo
from fine_tuning.data_preparation.encodings import Ordered
from fine_tuning.data_preparation.splits import Ledger, salted_hashes
from fine_tuning.erasure import steps
from fine_tuning.erasure.records import Selection, clear_shards, collect
from fine_tuning.schema.prepared import PreparedRow, as_json, read_rows
from stages import clean, export, intake, prepare
from tests.project import ROOT

STAGES = (intake, clean, export, prepare)
OUTS = ("clean", "exports", "prepared", "preferences", "thumbs")
KINDS = ("new", "new", "new", "longer", "duplicate", "near", "delete", "restore", "liked", "edited")


@pytest.fixture(scope="module")
def empty(tmp_path_factory, tiny_base):
    """What the stages read of a checkout, with the tokenizer of the tiny base and no conversations."""
    folder = tmp_path_factory.mktemp("empty") / "checkout"
    (folder / "models/base").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base / name, folder / "models/base")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["intake"]["sample"], params["clean"]["processes"] = False, 1
    params["prepare"]["decontamination_words"] = 4
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copy(ROOT / "dvc.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_writer, "FILE_ROWS", 8)
        patch.setattr(shard_merger, "FILE_ROWS", 3)
        yield folder


def talk(number):
    texts = (f"What is subject {number}, and why number {number * 7}?", f"Subject {number} has {number * 3} things.")
    messages = [
        {"id": f"t{number}-{n}", "role": ("user", "assistant")[n], "content": text} for n, text in enumerate(texts)
    ]
    return {
        "id": f"t{number}", "source": "test", "started_at": f"2026-01-{number % 28 + 1:02d}T00:00:00.000Z",
        "messages": messages, "feedback": [], "metadata": {},
    }  # fmt: skip


class Arrivals:
    """Shards of what arrives: new conversations, and what becomes of earlier ones."""

    def __init__(self):
        self.shards, self.talks = 0, []

    def shard(self, actions):
        """Write the next shard into the current folder."""
        records = [self._record(*action) for action in actions]
        write_shard("data/conversations", f"20260101T{self.shards:09d}-chat", records)
        self.shards += 1

    def _record(self, kind, place):
        fresh = talk(len(self.talks))
        if kind == "new" or not self.talks:
            self.talks.append(fresh)
            return fresh
        place %= len(self.talks)
        old = self.talks[place]
        if kind in ("duplicate", "near"):
            messages = [dict(message) for message in old["messages"]]
            messages[-1]["content"] += " Good luck!" * (kind == "near")
            self.talks.append(fresh | {"messages": messages})
            return self.talks[-1]
        reply = old["messages"][1]["id"]
        changes = {
            "longer": {"messages": [*old["messages"], *talk(place + 500)["messages"]]},
            "delete": {"messages": [], "deleted": True},
            "restore": {"restored": True},
            "liked": {"feedback": [{"message_id": reply, "rating": 1, "comment": f"Zoe likes {place}."}]},
            "edited": {"feedback": [{"message_id": reply, "edited": f"Subject {place} in better words."}]},
        }[kind]
        if kind != "delete":
            self.talks[place] = old | changes
        return old | changes


def run_all():
    for stage in STAGES:
        stage.main()


def written():
    files = [path for name in OUTS for path in Path("data", name).rglob("*")]
    files += [Path("data/splits.txt"), Path("data/manifest.json"), *Path("metrics").rglob("*")]
    # Git ignores the temporary file that a killed run leaves.
    return {str(path): path.read_bytes() for path in files if path.is_file() and path.suffix != ".tmp"}


def from_nothing(ledger):
    """What a full run gives with the ledger of before, None for none."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        made = shutil.ignore_patterns(*OUTS, ".whetstone", "metrics", "splits.txt")
        shutil.copytree(here, f"{folder}/full", ignore=made)
        os.chdir(f"{folder}/full")
        try:
            if ledger is not None:
                Path("data/splits.txt").write_bytes(ledger)
            run_all()
            return written()
        finally:
            os.chdir(here)


def ledger_now():
    return Path("data/splits.txt").read_bytes() if Path("data/splits.txt").exists() else None


action = st.tuples(st.sampled_from(KINDS), st.integers(0, 99))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(action, min_size=1, max_size=12), min_size=1, max_size=3))
def test_any_sequence_of_arrivals_gives_what_a_full_run_gives(empty, arrivals):
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(empty, f"{folder}/checkout", symlinks=True)
        os.chdir(f"{folder}/checkout")
        try:
            shards = Arrivals()
            shards.shard([("new", 0)] * 30)
            run_all()
            for actions in arrivals:
                shards.shard(actions)
                before = ledger_now()
                run_all()
                assert written() == from_nothing(before)
        finally:
            os.chdir(here)


@pytest.mark.parametrize(("stage", "stride"), [("clean", 4), ("export", 4), ("prepare", 25)])
def test_a_run_that_was_killed_at_any_write_gives_what_a_full_run_gives(empty, tmp_path, monkeypatch, stage, stride):
    shutil.copytree(empty, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    shards = Arrivals()
    shards.shard([("new", 0)] * 30)
    run_all()
    shards.shard([("new", 0), ("longer", 3), ("near", 4), ("delete", 5), ("edited", 6)])
    before = ledger_now()
    for earlier in STAGES[: [one.__name__ for one in STAGES].index(f"stages.{stage}")]:
        earlier.main()
    words = [sys.executable, "-m", "tests.strike", "kill", f"stages.{stage}:main", str(stride)]
    # On one core export is one process: it is the stage that dies.
    core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] > 1 and told["status"] == 0, done.stderr
    run_all()
    assert written() == from_nothing(before)


def test_what_arrives_leaves_the_prepared_files_of_others_as_they_are(empty, tmp_path, monkeypatch):
    shutil.copytree(empty, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["prepare"]["decontamination_words"] = 0  # otherwise newcomers in test take others out of train
    Path("params.yaml").write_text(yaml.safe_dump(params))
    shards, train = Arrivals(), Path("data/prepared/train")
    shards.shard([("new", 0)] * 60)
    run_all()
    first = {path: path.read_bytes() for path in train.iterdir()}
    order = [row.id for row in read_rows(train)]
    shards.shard([("new", 0)] * 20)
    run_all()
    second = {path: path.read_bytes() for path in train.iterdir()}
    assert len(first) > 2 and first.items() < second.items()
    assert [row.id for row in read_rows(train) if row.id in order] == order, "the order is that of one file"
    deleted = order[0]
    shards.shard([("delete", int(deleted[1:]))])
    run_all()
    (changed,) = (path for path in second if not path.exists() or path.read_bytes() != second[path])
    assert deleted.encode() in second[changed] and deleted not in {row.id for row in read_rows(train)}


# -----------------------------------------------------------------------------
# forgetting


def forget(identity):
    """The steps of `forget` that concern shards, ledger and memo, around those of the pipeline; the ledger between."""
    found = collect(Selection(conversation=identity), shard_paths("data/conversations", "data/manifest.json"), [])
    clear_shards(Path("data/conversations"), Path("data/manifest.json"), found)
    Ledger(Path("data/splits.txt"), "whetstone").forget(found.ids)
    Path(".dvc").mkdir()  # where it looks for the cache
    steps.clear_scratch(steps.Work(found, {}, {"pipeline": True}))
    before = ledger_now()
    run_all()
    steps.clear_encoded()
    return before


def numbers_of(identity):
    """The hashes that the memo holds of a conversation and of no other: of its id, contents, line, parts of it."""
    rows, own = [], []
    for entry in (index.parent for index in Path(".whetstone/memo/clean/pieces").glob("*/index")):
        table, bands = columns_of(entry / "index", ROW), np.fromfile(entry / "bands", np.uint64).reshape(BANDS, -1).T
        passed = np.cumsum(table["passed"]) - 1
        for line, (row, told) in enumerate(zip(table, (entry / "told.jsonl").read_bytes().splitlines(), strict=True)):
            held = [row[name] for name in ("id_key", "own", "shared", "question", "reply")]
            held += bands[passed[line]].tolist() if row["passed"] else []
            (own if json.loads(told)[0] == identity else rows).extend(map(int, held))
    keys = {salted_hashes(f"whetstone{part}")(identity) for part in ("/ledger", "/order", "")}
    for entry in Path(".whetstone/memo/prepare/facts").glob("*/facts"):
        for fact in columns_of(entry, FACT):
            held = [fact[name] for name in ("id", "turn", "draw")] + fact["line"].tolist()
            (own if int(fact["id"]) in keys else rows).extend(map(int, held))
    assert keys & set(own)
    return {number.to_bytes(8, "little") for number in set(own) - set(rows) - {0}}


def columns_of(path, kinds):
    count = path.stat().st_size // kinds.itemsize
    table = np.empty(count, kinds)
    for name, (kind, before, *_) in kinds.fields.items():
        table[name] = np.fromfile(path, kind, count, offset=count * before)
    return table


def held_in_memo(needles):
    """Files of the memo that hold one of some bytes, tables decoded."""
    return [
        str(path)
        for path in Path(".whetstone").rglob("*")
        if path.is_file()
        and any(needle in data for data in (path.read_bytes(), decoded_table(path)) for needle in needles)
    ]


def decoded_table(path):
    if path.suffix == ".parquet":
        table, lines = pyarrow.parquet.read_table(path), []
    elif path.suffix == ".arrow":
        table = pyarrow.ipc.open_file(path.read_bytes()).read_all()
        lines = [table[f"line{n}"].to_numpy() for n in range(4)]
    else:
        return b""
    rows = json.dumps(table.to_pylist(), default=str, ensure_ascii=False).encode()
    return rows + np.stack(lines, axis=1).tobytes() if lines else rows


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(action, min_size=1, max_size=8), min_size=1, max_size=3), st.integers(0, 29))
@example([[("liked", 3), ("duplicate", 3), ("near", 3)], [("longer", 3), ("duplicate", 3)]], 3)
@example([[("near", 29)]], 29)  # whose id is the name of the other's cluster
@example([[("liked", 3), ("edited", 4)], [("duplicate", 3)], [("liked", 30)]], 3)
def test_after_forgetting_the_memo_holds_nothing_of_it_and_the_result_is_that_of_a_full_run(empty, arrivals, place):
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded_memo, "SEGMENT_BYTES", 1)  # runs of prepare collect from small files only
        shutil.copytree(empty, f"{folder}/checkout", symlinks=True)
        os.chdir(f"{folder}/checkout")
        try:
            shards = Arrivals()
            for actions in ([("new", 0)] * 30, *arrivals):
                shards.shard(actions)
                run_all()
            ids = [f'"t{place}"'.encode(), *(f'"t{place}-{n}"'.encode() for n in range(2))]
            said, numbers = f'"Zoe likes {place}."'.encode(), numbers_of(f"t{place}")
            assert held_in_memo(ids) and all(held_in_memo([number]) for number in list(numbers)[:3])
            before = forget(f"t{place}")
            assert held_in_memo(numbers) == []
            copies = {
                message["id"] for talk in shards.talks for message in talk["messages"] if talk["id"] != f"t{place}"
            }
            assert held_in_memo([said, *(name for name in ids if json.loads(name) not in copies)]) == []
            assert written() == from_nothing(before)
        finally:
            os.chdir(here)


def test_after_forgetting_only_its_shard_is_worked_on_again(empty, tmp_path, monkeypatch):
    shutil.copytree(empty, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    shards = Arrivals()
    for _ in range(3):
        shards.shard([("new", 0)] * 20)
        run_all()
    cleaned, encoded = [], []
    clean_line, encode = shard_cleaner._clean_line, encoded_memo._encoded
    monkeypatch.setattr(
        shard_cleaner, "_clean_line", lambda line, *rest: cleaned.append(line) or clean_line(line, *rest)
    )
    monkeypatch.setattr(
        encoded_memo, "_encoded", lambda piece, **rest: encoded.extend(piece[1]) or encode(piece, **rest)
    )
    kept = set(Path(".whetstone/memo").rglob("entry.json"))
    forget("t25")
    assert len(cleaned) == 19 and encoded == []
    assert len(kept & set(Path(".whetstone/memo").rglob("entry.json"))) > len(kept) / 2
    assert not held_in_memo([b'"t25"'])


# -----------------------------------------------------------------------------
# what was encoded before


def add(memo, lines, encoded):
    (found,) = memo.encode(list, [(lines, encoded)], map)
    return found


def asked(folder, *keys, settings=()):
    """The keys that had to be computed."""
    lines = np.array([[key, 7 * key] for key in keys], np.uint64)
    rows = {
        key: PreparedRow(f"c{key}", [1, 2, key], [-100, 2, key], messages=[{"content": "ü \u2028"}]) for key in keys
    }
    with EncodedMemo(folder, settings) as memo:
        found = memo.find(lines)
        computed = [key for key, place in zip(keys, found["place"], strict=True) if place < 0]
        if computed:
            found[found["place"] < 0] = add(memo, lines[found["place"] < 0], [[rows[key]] for key in computed])
        none = np.zeros(len(keys), int)
        chosen = Ordered(found["place"], none, none, np.full(len(keys), None), {})
        taken = [row for batch in memo.take(chosen) for row in batch.to_pylist()]
        assert [row["id"] for row in taken] == [row["cluster"] for row in taken] == [f"c{key}" for key in keys]
        assert [row["input_ids"] for row in taken] == [[1, 2, key] for key in keys]
        assert {row["messages"] for row in taken} == {as_json([{"content": "ü \u2028"}])}
    return computed


def test_nothing_is_encoded_twice_and_what_nobody_asks_for_goes(tmp_path):
    folder = tmp_path / "memo"
    assert asked(folder, 1, 2, 3) == [1, 2, 3]
    assert asked(folder, 3, 1) == []
    assert asked(folder, 2) == [2], "the second run had no use for it"
    assert asked(folder, 2, settings=["another tokenizer"]) == [2]


def test_a_memo_in_use_or_damaged_costs_time_only(tmp_path):
    with EncodedMemo(tmp_path, ()) as memo:
        add(memo, np.array([[1, 7]], np.uint64), ["too_long"])
        assert asked(tmp_path, 2) == [2]
    assert asked(tmp_path, 2) == []
    for damage in (b"no Arrow", b"", None):
        (path,) = tmp_path.rglob("*.arrow")
        if damage is None:  # in place, of the same size
            damage = path.read_bytes().replace(b"c2", b"c3")
        path.write_bytes(damage)
        assert asked(tmp_path, 2) == [2]
        assert asked(tmp_path, 2) == []


def test_what_a_run_reads_stays_until_it_ends(tmp_path):
    assert asked(tmp_path, 1) == [1]
    with EncodedMemo(tmp_path, ()) as memo:
        found = memo.find(np.array([[1, 7]], np.uint64))
        for settings in ((), ["another tokenizer"], ["a third"]):  # each run has no use for the first's rows
            assert asked(tmp_path, 2, settings=settings) == [2]
        none = np.zeros(1, int)
        (batch,) = memo.take(Ordered(found["place"], none, none, np.full(1, None), {}))
        assert batch.column("id").to_pylist() == ["c1"]
    assert asked(tmp_path, 2) == [], "and nothing of the others is lost"
    assert asked(tmp_path, 1) == [1], "what nobody asked for goes with the next run"


def test_more_files_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_memo, "SEGMENT_BYTES", 200)
    keys = range(1, 80)
    rows = (PreparedRow(f"c{key}", [1, 2, key], [-100, 2, key], messages=[{"content": "ü \u2028"}]) for key in keys)
    pieces = ((np.array([[key, 7 * key]], np.uint64), [[row]]) for key, row in zip(keys, rows, strict=True))
    with EncodedMemo(tmp_path, ()) as memo:
        assert len(list(memo.encode(list, pieces, map))) == len(keys)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")}
    assert len(before) == len(keys)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(soft)) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[30], hard))
    try:
        assert asked(tmp_path, *keys) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")} == before


def test_a_failed_run_keeps_what_was_encoded(tmp_path):
    assert asked(tmp_path, 1, 2) == [1, 2]
    three = np.array([[3, 21]], np.uint64)
    with pytest.raises(ZeroDivisionError), EncodedMemo(tmp_path, ()) as memo:
        add(memo, three, ["too_long"])
        add(memo, three + np.uint64(1), [1 / 0])
    with EncodedMemo(tmp_path, ()) as memo:
        assert REASONS[memo.find(three)["reason"][0]] == "too_long"
    assert asked(tmp_path, 1) == [1], "that run asked for the third only"


def test_many_rows_in_many_files_come_out_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_memo, "SEGMENT_BYTES", 4000)
    monkeypatch.setattr(encoded_memo, "BLOCK_BYTES", 1500)
    assert asked(tmp_path, *range(1, 60)) == list(range(1, 60))
    shuffled = random.Random(0).sample(range(1, 90), 89)
    assert sorted(asked(tmp_path, *shuffled)) == list(range(60, 90))
    assert len(list(tmp_path.rglob("*.arrow"))) > 1
    assert asked(tmp_path, *range(20, 90)) == []


def into_folder(path):
    path.unlink()
    (path / "folder").mkdir(parents=True)


def into_file(path, content=b"{}"):
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


MEMO = Path(".whetstone/memo")
ODD = (
    b"[]",
    b"[" * 100_000,
    b'{"files": {}, "value": 3}',
    b'{"files": {"\\u0000": 1}}',
    b'{"folder": "../x"}',
    b"\xff",
)
DAMAGE = {
    "files are shorter": lambda paths: [into_file(path, path.read_bytes()[:-7]) for path in paths if path.is_file()],
    "files are folders": lambda paths: [into_folder(path) for path in paths if path.is_file()],
    "folders are files": lambda paths: [into_file(path) for path in paths if path.is_dir()],
    "folders of stages are files": lambda paths: [into_file(path) for path in paths if path.parent == MEMO],
    "all is a file": lambda _: into_file(MEMO),
    **{
        f"JSON files have {odd[:20]!r}": lambda paths, odd=odd: [
            into_file(p, odd) for p in paths if p.suffix == ".json"
        ]
        for odd in ODD
    },
}


EACH_STAGE = """
import sys
from fine_tuning.common.stage_times import run_stage
from fine_tuning.data_collection.cleaning import shard_merger
from fine_tuning.data_preparation import split_writer
from stages import clean, export, intake, prepare
from tests.strike import in_child, without_locks
shard_merger.FILE_ROWS, split_writer.FILE_ROWS = 3, 8
for stage in (intake, clean, export, prepare):
    sys.argv = [stage.__file__]
    print("ended", in_child(lambda: {before}, lambda: run_stage(stage.main)) >> 8, file=sys.stderr)
"""
DISKS = {  # where the memo lies, how the disk is made, what is said of it
    "gone": ("", "disk/memo, which is not there"),
    "gone with .whetstone": ("", "disk/memo, which is not there"),
    "read-only": ("mount --bind -o ro .whetstone/memo .whetstone/memo", "may not be read or written"),
    "full": ("mount -t tmpfs -o size=8k tmpfs .whetstone/memo", "the disk is full: free some space (`df -h "),
    "another file system": ("mount -t tmpfs tmpfs .whetstone/memo", ""),
    "without locks": ("", "cannot lock files"),
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("disk", DISKS)
def test_what_a_memo_lies_on_is_one_line_or_costs_time_only(empty, tmp_path, monkeypatch, disk):
    shutil.copytree(empty, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    shards = Arrivals()
    shards.shard([("new", 0)] * 30)
    run_all()
    shards.shard([("new", 0), ("longer", 3)])
    before = ledger_now()
    mount, words = DISKS[disk]
    if disk.startswith("gone"):
        place = MEMO.parent if "with" in disk else MEMO
        shutil.rmtree(place)
        place.symlink_to(tmp_path / "disk/memo")
    script = EACH_STAGE.format(before="without_locks(37)" if disk == "without locks" else "None")
    command = f"{mount or ':'} && cd $PWD && exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    alone = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*alone, "sh", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stderr.count("ended") == len(STAGES) and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == done.stderr.count("ended 1") == len(STAGES) - done.stderr.count("ended 0"), done.stderr
    assert not (tmp_path / "disk").exists()
    if words:
        assert errors and all(words in error for error in errors), done.stderr
    else:
        assert not errors and written() == from_nothing(before)


def test_what_another_run_removes_is_made_again(tmp_path):
    def make(folder, earlier):
        (folder / "made").write_text("again")
        return 1

    memo = Memo(tmp_path, "export")
    folder, _ = memo.files(["key"], make)
    assert ["key"] in memo
    shutil.rmtree(folder)
    assert memo.files(["key"], make) == (folder, 1) and (folder / "made").read_text() == "again"


def test_a_damaged_memo_costs_time_only(empty, tmp_path, monkeypatch):
    shutil.copytree(empty, tmp_path / "checkout", symlinks=True)
    monkeypatch.chdir(tmp_path / "checkout")
    Arrivals().shard([("new", 0)] * 30)
    run_all()
    before = written()
    assert {path.name for path in MEMO.iterdir()} == {"intake", "clean", "export", "prepare"}
    for damage, make in DAMAGE.items():
        make(sorted(MEMO.rglob("*"), reverse=True))  # what is in a folder before the folder
        run_all()
        assert written() == before, damage
