"""The index of shards is a cache: whatever is in its folder, it says what the shards say."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.data_collection.storage import shard_index
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import (
    describe_shard,
    located_versions,
    shard_paths,
    versions,
    write_lines,
    write_shard,
)
from fine_tuning.data_collection.storage.tombstones import Tombstones

IDS = ("a", "b", "é", 'quo"te', "\ud800", "x" * 600)
ODD = (
    b"no JSON\n",
    b"[]\n",
    b'{"id":"a","messages":1}\n',
    b'\xef\xbb\xbf{"id":"a","messages":[]}\n',
    b'{"id":"\xff"}\n',
    b'{"id":"a","messages":[],"id":"b"}\n',
    b'{"id":"a","messages":[], "id":"b"}\n',
    b'{"id":"a","messages":[{"id":"m","content":"\\"id"}],"\\u0069d":"b"}\n',
)


def version(identity, number):
    message = {"id": f"m{number}", "role": "user", "content": str(number)}
    return {"id": identity, "messages": [message], "feedback": [], "metadata": {}, "started_at": None}


def newest_versions(paths, ids):
    return {version["id"]: version for version in versions(paths) if version["id"] in ids}


shard_of = st.lists(st.one_of(st.sampled_from(IDS), st.sampled_from(ODD)), min_size=1, max_size=6)
damage = st.sampled_from(("none", "lost", "torn", "flipped", "empty", "folder", "file"))


def do(damage, file, place):
    data = bytearray(file.read_bytes())
    if damage == "lost":
        file.unlink()
    elif damage == "folder":
        file.unlink()
        (file / "in it").mkdir(parents=True)
    elif damage == "file":
        shutil.rmtree(file.parent)
        file.parent.write_bytes(data)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "torn":
        file.write_bytes(data[: place % len(data)])
    elif damage == "flipped":
        data[place % len(data)] ^= 1
        file.write_bytes(data)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(shard_of, damage, st.integers(0, 10_000)), min_size=1, max_size=5))
def test_with_any_damage_it_says_what_the_shards_say(arrivals):
    with tempfile.TemporaryDirectory() as name:
        folder, memo = Path(name) / "conversations", Path(name) / "memo"
        for number, (lines, what, place) in enumerate(arrivals):
            texts = [version(line, f"{number} {n}") if isinstance(line, str) else line for n, line in enumerate(lines)]
            plain = [line for line in texts if isinstance(line, bytes)]
            write_shard(folder, f"20260101T{number:09d}-chat", [line for line in texts if isinstance(line, dict)])
            write_lines(folder, f"20260101T{number:09d}-import", plain)
            paths = shard_paths(folder)
            index = ShardIndex.read(paths, memo)
            assert [shard.entry for shard in index.shards.values()] == list(map(describe_shard, paths))
            assert index.newest(set(IDS)) == newest_versions(paths, set(IDS))
            assert list(index.located(map(shard_index.key_of, IDS))) == list(located_versions(paths))
            do(what, memo / f"{paths[place % len(paths)].name}.index", place)
        assert index.newest({"b"}) == newest_versions(paths, {"b"}) and index.newest({"unknown"}) == {}
        known = {version["id"]: version for version in ShardIndex.read(paths, memo).all_newest()}
        assert known.keys() <= newest_versions(paths, set(IDS)).keys()


def test_two_ids_of_one_number_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "_number", lambda name: 7)
    write_shard(tmp_path / "shards", "20260101T000000000-chat", [version("a", 1), version("b", 2)])
    index = ShardIndex.read(shard_paths(tmp_path / "shards"))
    assert index.newest({"a"})["a"]["messages"][0]["content"] == "1" and index.newest({"c"}) == {}


def test_of_a_shard_that_is_gone_nothing_is_kept(tmp_path):
    first, _ = write_shard(tmp_path / "shards", "20260101T000000000-chat", [version("a", 1)])
    second, _ = write_shard(tmp_path / "shards", "20260101T000000001-chat", [version("b", 2)])
    ShardIndex.read([first, second], tmp_path / "memo")
    first.unlink()
    ShardIndex.read([second], tmp_path / "memo")
    assert [file.name for file in (tmp_path / "memo").iterdir()] == [f"{second.name}.index"]


def test_a_shard_is_read_again_when_another_is_in_its_place_or_tombstones_came(tmp_path, monkeypatch):
    read = []
    scan = shard_index.scan_shard
    monkeypatch.setattr(shard_index, "scan_shard", lambda path, *others: read.append(path) or scan(path, *others))
    path, _ = write_shard(tmp_path / "conversations", "20260101T000000000-chat", [version("a", 1)])
    for expected in (1, 1):
        ShardIndex.read([path], tmp_path / "memo")
        assert len(read) == expected
    tombstones = Tombstones(tmp_path / "forgotten.jsonl")
    tombstones.add([version("a", 1)])
    assert ShardIndex.read([path], tmp_path / "memo", tombstones).shards[path].forgotten and len(read) == 2
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    other.replace(path)
    ShardIndex.read([path], tmp_path / "memo", tombstones)
    assert len(read) == 3
