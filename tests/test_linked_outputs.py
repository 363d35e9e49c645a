"""Outputs may be hard links to DVC's cache (`cache.type`): whoever opened one for writing would change the cache."""

import hashlib
import os

import pytest

from fine_tuning.common.records import unlinked
from tests.project import Project, conversations

pytestmark = pytest.mark.end_to_end

STAGES = ("base", "intake", "clean", "export", "prepare", "train", "package", "evaluate", "compare")


@pytest.fixture
def project(trained_project, tmp_path) -> Project:
    """A project whose outputs are hard links to its cache."""
    project = trained_project.copy(tmp_path / "project")
    project.run("dvc", "config", "cache.type", "hardlink,copy")
    project.run("dvc", "checkout", "-q", "--relink")
    assert (project.folder / "models/package/model.gguf").stat().st_nlink == 2
    return project


def objects(project: Project) -> dict[str, int]:
    """The objects of the cache by their MD5, with the time at which somebody last wrote into them."""
    found = {}
    for path in (project.folder / ".dvc/cache/files/md5").glob("??/*"):
        md5 = path.parent.name + path.name
        assert md5.removesuffix(".dir") == hashlib.md5(path.read_bytes()).hexdigest()
        found[md5] = path.stat().st_mtime_ns
    return found


def assert_kept(before: dict[str, int], project: Project) -> None:
    after = objects(project)
    assert {md5: after.get(md5) for md5 in before} == before


def test_a_stage_that_runs_without_dvc_writes_no_output_in_place(project):
    before = objects(project)
    project.set_params(train={"seed": 5})
    for stage in STAGES:
        project.run("python", "-m", f"stages.{stage}")
    assert_kept(before, project)


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_a_folder_that_is_written_into_keeps_its_files_and_writes_through_no_link(tmp_path, link):
    cached, folder = tmp_path / "cached", tmp_path / "models"
    cached.write_text("kept")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    getattr(folder / "weights", link)(cached)
    (unlinked(folder) / "weights").write_text("new")
    assert cached.read_text() == "kept"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"notes.txt": "mine", "weights": "new"}


def test_the_records_of_the_champion_are_restored_beside_those_that_dvc_keeps(project):
    project.run("python", "-m", "fine_tuning", "promote", "--force", "trial")
    project.run("dvc", "repro", "-q")
    before = objects(project)
    assert "restored" in project.run("python", "-m", "stages.evaluate")
    assert_kept(before, project)


def test_a_verdict_on_records_that_were_edited_in_place_is_refused(project):
    """The edit is in DVC's cache too, and DVC trusts size and time."""
    records = project.folder / "data/evaluation/items.jsonl"
    known, data = records.stat(), bytearray(records.read_bytes())
    digit = data.index(b'"nll":') + len(b'"nll":')
    data[digit] = ord("2" if data[digit] == ord("1") else "1")
    records.chmod(0o644)
    records.write_bytes(data)
    os.utime(records, ns=(known.st_atime_ns, known.st_mtime_ns))
    records.chmod(known.st_mode)
    project.run("dvc", "repro", "-q", "-f", "-s", "compare")
    assert "up to date" in project.run("dvc", "status")
    said = project.run("python", "-m", "fine_tuning", "promote", "--force", "trial", check=False)
    assert "data/evaluation is not what dvc.lock describes" in said


def test_conversations_are_kept_twice(project):
    """A shard that is damaged in place comes back from the cache."""
    assert {path.stat().st_nlink for path in (project.folder / "data/conversations").iterdir()} == {2}
    project.import_conversations(conversations(("tent",)), "more")
    assert {path.stat().st_nlink for path in (project.folder / "data/conversations").iterdir()} == {1}
