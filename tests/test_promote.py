"""Promotion on a real git and DVC repository: what was compared is what is registered, or nothing is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fine_tuning.commands.promote import MADE_ON
from fine_tuning.common.dvc_files import cached, listing, md5_file, md5_path
from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_json, write_json
from fine_tuning.model_management import champion as module
from fine_tuning.model_management.champion import read_champion
from fine_tuning.model_management.model_registry import CHAMPION, PREVIOUS, open_registry
from tests.check_lock import check, this_machine
from tests.registered import environment, here, repro, set_params, sh, type_command

pytestmark = pytest.mark.end_to_end

WEIGHTS = Path("models/adapter/adapter_model.safetensors")
COMPARISON = Path("metrics/comparison.json")


def test_the_candidate_becomes_champion_in_registry_git_and_dvc(candidate, capsys):
    here("promote")
    champion = read_champion()
    assert champion["version"] == 1 and champion["name"] == "trial" and champion["verdict"] == "PROMOTE"
    assert champion["adapter_sha256"] == sha256_file(WEIGHTS)
    assert champion["gguf_sha256"] == sha256_file(Path("models/champion/package/model.gguf"))
    changed = sh(candidate, "git status --porcelain").split()[1::2]
    files = ["dvc.lock", "metrics/comparison.json", "models/champion.json", "data/looks.jsonl", "models/champion.dvc"]
    assert changed == files
    version = open_registry("trial").by_alias(CHAMPION)
    assert version.number == 1
    assert version.tags["adapter_commit"] == version.tags["git_commit"]
    wanted = {"adapter_sha256", "dvc_lock_sha256", "git_commit", "git_dirty", "data_md5", "eval_set_sha256"}
    assert wanted | {"base_model", "base_revision"} <= set(version.tags)
    assert version.tags["git_commit"] == sh(candidate, "git rev-parse HEAD").strip()
    assert version.tags["git_dirty"] == "false"
    assert version.tags["data_md5"] == md5_path(Path("data/conversations"))
    assert version.artifacts.startswith(f"file://{candidate}/mlartifacts/")
    said = capsys.readouterr().out
    assert "git add models/champion.json" in said and "deploy" in said


def test_the_registry_keeps_adapter_bundle_reports_and_origin(candidate, tmp_path):
    here("promote")
    registry = open_registry("trial")
    folder = registry.download(registry.version(1), "", tmp_path / "out")
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files >= {
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "package/create.json",
        "package/Modelfile",
        "reports/comparison.json",
        "provenance/dvc.lock",
        "provenance/params.yaml",
        "provenance/conversations.json",
        "probes.json",
        "files.json",
    }
    assert "package/model.gguf" not in files
    described = json.loads((folder / "files.json").read_text())
    assert described["package/model.gguf"]["sha256"] == sha256_file(Path("models/package/model.gguf"))
    assert json.loads((folder / "provenance/conversations.json").read_text())["train"] == ["c1", "c2"]
    assert len(json.loads((folder / "probes.json").read_text())) == 3


def test_promoting_again_changes_nothing(candidate):
    here("promote")
    sh(candidate, "git add -A && git commit -qm Promote")
    here("promote")
    assert sh(candidate, "git status --porcelain") == ""
    registry = open_registry("trial")
    assert len(registry.versions()) == 1 and registry.by_alias(PREVIOUS) is None


def test_the_next_champion_makes_the_old_one_previous(candidate):
    here("promote")
    repro(candidate, seed=2)
    here("promote")
    registry = open_registry("trial")
    assert (registry.by_alias(CHAMPION).number, registry.by_alias(PREVIOUS).number) == (2, 1)
    assert read_champion()["version"] == 2


def test_the_champion_is_said_to_be_it_by_the_verdict_that_made_it_one(candidate, tmp_path):
    kept = [*Path("data/evaluation").iterdir(), Path("metrics/evaluation.json"), Path("metrics/side_by_side.md")]
    before = {path: path.read_bytes() for path in kept}
    here("promote")
    found = read_json(COMPARISON)
    assert (found["verdict"], found["champion"]["version"]) == ("PROMOTE", 1)
    assert found["reasons"][0] == "the candidate is the champion, version 1, promoted by the verdict PROMOTE"
    assert sh(candidate, "dvc status -q") == ""
    sh(candidate, f"dvc remote add -q -d store {tmp_path / 'remote'}")
    sh(candidate, "git add -A && git commit -qm Promote && dvc push -q")
    assert "up to date" in sh(candidate, "dvc repro")
    sh(tmp_path, f"git clone -q {candidate} clone")
    sh(tmp_path / "clone", "dvc pull -q")
    assert "up to date" in sh(tmp_path / "clone", "dvc repro")
    sh(tmp_path / "clone", "dvc repro -q --force --single-item evaluate compare")
    assert sh(tmp_path / "clone", "git status --porcelain") == ""
    assert {path: (tmp_path / "clone" / path).read_bytes() for path in kept} == before


def test_a_candidate_that_comes_out_as_the_champion_again_is_not_compared_with_itself(candidate):
    here("promote")
    records = Path("data/evaluation/items.jsonl").read_bytes()
    repro(candidate, seed=2, verdict="INCONCLUSIVE")
    assert "champion" not in read_json(COMPARISON)
    repro(candidate, seed=1, verdict="HOLD")  # what scoring it once more would say
    assert read_json(COMPARISON)["champion"]["verdict"] == read_json(COMPARISON)["verdict"] == "PROMOTE"
    assert Path("data/evaluation/items.jsonl").read_bytes() == records


def test_an_edited_evaluation_does_not_come_back_as_the_champion_s(candidate):
    here("promote")
    sh(candidate, "git add -A && git commit -qm Promote")
    repro(candidate, seed=2)
    sh(candidate, "sed -i s/60.0/1.0/ models/champion/evaluation/data/evaluation/items.jsonl")
    sh(candidate, "dvc add -q models/champion")
    set_params(candidate, seed=1)
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode
    (refusal,) = re.findall("models/champion/evaluation is not what was kept at the promotion: .*", done.stderr)
    with pytest.raises(UserError, match="models/adapter is not the one that was compared"):
        here("promote")
    for command in re.findall("`(.*?)`", refusal):
        sh(candidate, command)
    assert read_json(COMPARISON)["champion"]["version"] == 1
    assert "1.0" not in Path("data/evaluation/items.jsonl").read_text()


def test_promoting_the_champion_again_keeps_no_edited_evaluation(candidate):
    here("promote")
    sh(candidate, "sed -i s/60.0/1.0/ models/champion/evaluation/data/evaluation/items.jsonl")
    with pytest.raises(UserError, match="is not what was kept at the promotion: run `git checkout"):
        here("promote")


def test_a_forced_champion_is_said_to_be_forced(candidate):
    repro(candidate, verdict="HOLD")
    here("promote", "--force", "the customer wants it")
    found = read_json(COMPARISON)
    assert found["verdict"] == "HOLD"
    assert found["reasons"][0].endswith("promoted over the verdict HOLD by force (the customer wants it)")


@pytest.mark.parametrize("verdict", ["HOLD", "INCONCLUSIVE"])
def test_without_the_verdict_promote_nothing_is_registered(candidate, verdict):
    repro(candidate, verdict=verdict)
    reason = re.escape(read_json(COMPARISON)["reasons"][0])
    with pytest.raises(UserError, match=rf"the verdict is {verdict} \({reason}.*--force"):
        here("promote")
    assert not Path("models/champion").exists() and open_registry("trial").versions() == []


def test_a_forced_promotion_keeps_its_reason(candidate):
    repro(candidate, verdict="HOLD")
    here("promote", "--force", "the customer wants it today")
    assert open_registry("trial").version(1).tags["forced_reason"] == "the customer wants it today"
    assert read_champion()["forced_reason"] == "the customer wants it today"
    assert read_champion()["verdict"] == "HOLD"


def test_a_version_that_is_promoted_once_more_has_the_verdict_of_that_promotion(candidate):
    def said() -> tuple[str | None, ...]:
        tags, champion = open_registry("trial").version(1).tags, read_champion()
        for key in ("verdict", "forced_reason"):
            assert tags.get(key) == champion.get(key)
        return tags["verdict"], tags.get("forced_reason")

    here("promote")
    assert said() == ("PROMOTE", None)
    here("promote", "--force", "once more")  # nothing is promoted here
    assert said() == ("PROMOTE", None)
    repro(candidate, seed=2)
    here("promote")
    repro(candidate, seed=1, verdict="HOLD")
    here("promote", "--force", "the customer wants it back")
    assert said() == ("HOLD", "the customer wants it back")
    here("promote", "2")
    repro(candidate, seed=1, verdict="PROMOTE")
    here("promote")
    assert said() == ("PROMOTE", None)


def test_the_note_of_where_the_lock_was_made_is_written_by_what_promote_says(candidate, capsys):
    write_json(MADE_ON, this_machine() | {"dvc_lock_md5": md5_file(Path("dvc.lock"))})
    sh(candidate, "git add -A && git commit -qm 'Where it was made'")
    assert check(candidate) == []
    here("promote")
    commands = [line.strip() for line in capsys.readouterr().out.partition("Next:\n")[2].splitlines()]
    assert commands[0].startswith("python -m tests.check_lock")
    for command in commands[:2]:
        sh(candidate, command.replace("python ", f"{sys.executable} "))
    sh(candidate, "git commit -qm Promote")
    assert check(candidate) == []


def test_who_promoted_is_kept_in_registry_and_git(candidate):
    here("promote", "--by", "Ada Lovelace")
    here("promote", "--by", "Somebody Else")  # nothing is promoted here, so nothing is said of who did it
    assert read_champion()["promoted_by"] == "Ada Lovelace"
    tags = open_registry("trial").version(1).tags
    assert (tags["promoted_by"], tags["promoted_at"]) == ("Ada Lovelace", read_champion()["promoted_at"])


def test_who_promotes_is_git_s_user_unless_said(candidate):
    here("promote")
    assert read_champion()["promoted_by"] == "Trial"


@pytest.mark.parametrize("name", ["", "  ", "a" * 101, "Ada\x1b[2J"])
def test_a_promoter_s_name_is_one_printable_line(candidate, name):
    with pytest.raises(UserError, match="--by takes the name"):
        here("promote", "--by", name)
    assert not Path("models/champion").exists()


def test_force_without_a_reason_is_no_force(candidate):
    repro(candidate, verdict="HOLD")
    with pytest.raises(UserError, match="the verdict is HOLD"):
        here("promote", "--force", "  ")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (WEIGHTS, "models/adapter is not the one that was compared"),
        (Path("models/package/model.gguf"), r"models/package is not what dvc\.lock describes"),
        (Path("models/merged/config.json"), r"models/merged is not what dvc\.lock describes"),
    ],
)
def test_files_that_were_not_compared_are_refused(candidate, path, reason):
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=reason):
        here("promote")
    assert open_registry("trial").versions() == []


@pytest.mark.parametrize(
    ("edit", "file"),
    [
        ("sed -i s/HOLD/PROMOTE/ metrics/comparison.json", "metrics/comparison.json"),
        ("sed -i 's/perplexity/complexity/' metrics/evaluation.json", "metrics/evaluation.json"),
        ("chmod u+w data/evaluation/* && sed -i s/60.0/1.0/ data/evaluation/items.jsonl", "data/evaluation"),
        ("sed -i 's/minimum_effect: 0.01/minimum_effect: 0.0/' params.yaml", "params.yaml"),
        ("echo '# better' >> judge.py", "judge.py"),
        ("sed -i '/cmd/s/judge.py$/judge.py --better/' dvc.yaml", "dvc.yaml"),
    ],
)
def test_a_verdict_is_taken_only_with_what_it_was_made_from(candidate, edit, file):
    repro(candidate, verdict="HOLD")
    sh(candidate, edit)
    for words in ((), ("--force", "I say so")):
        with pytest.raises(UserError, match=rf"{file} is not what dvc\.lock describes: run `dvc repro`"):
            here("promote", *words)
    assert open_registry("trial").versions() == []


@pytest.mark.parametrize(
    ("verdict", "edit", "named"),
    [
        ("HOLD", "s/HOLD/PROMOTE/", "verdict"),
        ("HOLD", "s/gain/victory/", "reasons"),
        ("PROMOTE", "s/against/and far below/", "reasons"),
        ("PROMOTE", 's/"difference": -/"difference": -1/', "differences, primary"),
        ("PROMOTE", "s/eeee/eeef/", "eval_set_sha256"),
        ("PROMOTE", """s/^{/{ "note": "checked by hand",/""", "note"),
    ],
)
def test_what_its_records_do_not_give_is_refused_even_with_its_lock(candidate, verdict, edit, named):
    repro(candidate, verdict=verdict)
    genuine = COMPARISON.read_bytes()
    sh(candidate, f"sed -i '{edit}' {COMPARISON}")
    assert COMPARISON.read_bytes() != genuine
    sh(candidate, "dvc commit -q --force compare")
    for words in ((), ("--force", "I say so")):
        with pytest.raises(UserError, match=rf"comparison\.json is not what its records give \({named}\)") as refusal:
            here("promote", *words)
    assert open_registry("trial").versions() == []
    sh(candidate, re.search("`(.*?)`", str(refusal.value))[1])
    assert COMPARISON.read_bytes() == genuine
    here("promote", "--force", "as it was")


def test_the_last_digits_of_another_machine_are_no_edit(candidate):
    found = read_json(COMPARISON)
    primary = found["primary"]["base"]
    primary["difference"] *= 1 + 1e-14
    write_json(COMPARISON, found)
    sh(candidate, "dvc commit -q --force compare")
    here("promote")
    assert read_champion()["version"] == 1


def test_a_version_names_the_commit_that_made_its_adapter(candidate):
    made = sh(candidate, "git rev-parse HEAD").strip()
    Path("notes.txt").write_text("later")
    sh(candidate, "git add -A && git commit -qm Notes")
    here("promote")
    repro(candidate, seed=2)
    here("promote")
    first, second = (open_registry("trial").version(number).tags for number in (1, 2))
    assert (first["adapter_commit"], first["git_dirty"]) == (made, "false")
    assert first["git_commit"] == sh(candidate, "git rev-parse HEAD").strip() != made
    assert (second["adapter_commit"], second["git_dirty"]) == ("uncommitted", "true")


def test_a_candidate_that_met_another_champion_is_refused(candidate):
    here("promote")
    repro(candidate, seed=2)
    Path("models/champion.json").write_text('{"version": 7, "adapter_sha256": "pulled from elsewhere"}')
    with pytest.raises(UserError, match="the champion has changed since the comparison: run `dvc repro`"):
        here("promote")


def test_a_registry_with_another_champion_is_refused_unless_forced(candidate):
    here("promote")
    sh(candidate, "git checkout -q models/champion.json")
    repro(candidate, seed=2)
    with pytest.raises(UserError, match="version 1 became champion in the meantime"):
        here("promote")
    here("promote", "--force", "the registry is right")
    assert read_champion()["version"] == 2


def test_a_nan_in_the_evaluation_is_refused(candidate):
    sh(candidate, "sed -i 's/9.2/NaN/' metrics/evaluation.json")
    sh(candidate, "dvc commit -q --force evaluate")
    with pytest.raises(UserError, match=r"evaluation\.candidate\.perplexity\.value is not a finite number"):
        here("promote")
    assert open_registry("trial").versions() == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("rm metrics/comparison.json", r"comparison\.json is missing: run `dvc repro`"),
        ("echo [] > metrics/comparison.json", r"comparison\.json is damaged"),
        ("rm -r models/adapter", r"adapter_model\.safetensors is missing"),
        ("rm dvc.lock", r"dvc\.lock is missing"),
        ("echo x > models/champion.json", r"champion\.json is missing or damaged"),
        ("rm dvc.yaml", "not the project's top folder"),
    ],
)
def test_what_is_missing_is_one_line_with_the_remedy(candidate, damage, reason):
    sh(candidate, damage)
    with pytest.raises(UserError, match=reason):
        here("promote")


def test_a_temporary_experiment_promotes_nothing(candidate, monkeypatch):
    temporary = candidate / ".dvc" / "tmp" / "exps" / "tmpabc"
    temporary.mkdir(parents=True)
    shutil.copyfile("dvc.yaml", temporary / "dvc.yaml")
    monkeypatch.chdir(temporary)
    with pytest.raises(UserError, match="promote in the main checkout"):
        here("promote")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


def killed_one_effect_later_each_time(monkeypatch, *words: str):
    """Runs of a command, each killed one effect later than the one before, until one ends by itself."""
    from mlflow import MlflowClient

    effects, limit = [], 0
    places = [
        *((MlflowClient, name) for name in ("log_artifacts", "log_batch", "create_model_version")),
        *((MlflowClient, name) for name in ("set_registered_model_alias", "delete_registered_model_alias")),
        (MlflowClient, "set_model_version_tag"),
        *((module, name) for name in ("dvc_add", "write_json", "copy_file")),
        (shutil, "rmtree"),
        (Path, "rename"),
    ]

    def deadly(name, original):
        def effect(*args, **kwargs):
            effects.append(name)
            if len(effects) > limit:
                raise Killed
            return original(*args, **kwargs)

        return effect

    while True:
        effects.clear()
        with monkeypatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, deadly(name, getattr(owner, name)))
            try:
                here(*words)
                return
            except Killed:
                limit += 4 if effects[-1] == "copy_file" else 1  # one copied file is like the next
        yield


def test_killed_at_any_point_there_is_one_champion_and_a_rerun_converges(candidate, monkeypatch):
    here("promote")
    repro(candidate, seed=2)
    kills, registry = 0, open_registry("trial")
    for _ in killed_one_effect_later_each_time(monkeypatch, "promote"):
        kills += 1
        champion = registry.by_alias(CHAMPION)
        assert champion.number in (1, 2) and "content_sha256" in champion.tags
        assert len(registry.versions()) <= 2
    assert kills > 8
    assert (registry.by_alias(CHAMPION).number, registry.by_alias(PREVIOUS).number) == (2, 1)
    assert read_champion()["version"] == 2
    assert sh(candidate, "dvc status -q models/champion.dvc") == ""
    assert not Path("models/.champion.new").exists()


# --------------------------------------------------------------------------------------------- an older version again


def test_an_older_version_is_champion_again_in_registry_git_and_dvc(promoted, capsys):
    here("promote", "trial:1", "--by", "Ada")
    registry = open_registry("trial")
    assert (registry.by_alias(CHAMPION).number, registry.by_alias(PREVIOUS).number) == (1, 2)
    champion = read_champion()
    assert (champion["version"], champion["promoted_by"], champion["verdict"]) == (1, "Ada", "PROMOTE")
    assert champion["adapter_sha256"] == registry.version(1).tags["adapter_sha256"]
    assert sha256_file(Path("models/champion/package/model.gguf")) == champion["gguf_sha256"]
    first = sh(promoted, "git log --format=%h --grep='Promote version 1'").strip()
    assert Path("models/champion.dvc").read_text() == sh(promoted, f"git show {first}:models/champion.dvc")
    assert sh(promoted, "dvc status -q models/champion.dvc") == ""
    assert "champion: version 1, before it version 2" in capsys.readouterr().out


def test_an_older_version_comes_from_the_remote_where_the_cache_has_lost_it(promoted, tmp_path):
    sh(promoted, f"dvc remote add -q -d store {tmp_path / 'remote'}")
    for command in ("git checkout -q HEAD~2 -- models/champion.dvc", "dvc push -q models/champion.dvc"):
        sh(promoted, command)
    sh(promoted, "git checkout -q HEAD -- models/champion.dvc")
    shutil.rmtree(".dvc/cache")
    here("promote", "1")
    assert read_champion()["version"] == 1 and Path("models/champion/package/model.gguf").is_file()


def test_an_older_version_whose_files_are_nowhere_changes_nothing(promoted):
    before = Path("models/champion.json").read_bytes(), Path("models/champion.dvc").read_bytes()
    shutil.rmtree(".dvc/cache")
    with pytest.raises(UserError, match="files of version 1 are neither in DVC's cache nor in its remote: `dvc push`"):
        here("promote", "1")
    assert (Path("models/champion.json").read_bytes(), Path("models/champion.dvc").read_bytes()) == before
    assert open_registry("trial").by_alias(CHAMPION).number == 2


def test_an_older_version_is_champion_again_without_the_records_that_were_forgotten(promoted):
    files = listing(promoted, open_registry("trial").version(1).tags["champion_md5"])
    for path in ("training.jsonl", "evaluation/data/evaluation/items.jsonl"):
        cached(promoted, files[path]).unlink()
    here("promote", "1")
    assert read_champion()["version"] == 1
    assert not Path("models/champion/evaluation").exists()  # what is left of it would be taken back as a whole
    assert sha256_file(Path("models/champion/package/model.gguf")) == read_champion()["gguf_sha256"]


def test_a_version_that_never_was_champion_does_not_become_it_by_its_number(promoted):
    registry = open_registry("trial")
    registry._client.delete_model_version_tag("trial", "1", "champion_md5")
    with pytest.raises(UserError, match="version 1 was never champion"):
        here("promote", "1")
    with pytest.raises(UserError, match="has no version 9"):
        here("promote", "9")


def test_killed_on_the_way_back_a_rerun_converges(promoted, monkeypatch):
    registry = open_registry("trial")
    for _ in killed_one_effect_later_each_time(monkeypatch, "promote", "1"):
        assert registry.by_alias(CHAMPION).number in (1, 2)
    assert (registry.by_alias(CHAMPION).number, registry.by_alias(PREVIOUS).number) == (1, 2)
    assert read_champion()["version"] == 1
    assert sh(promoted, "dvc status -q models/champion.dvc") == ""


def test_another_clone_pulls_the_champion(candidate, tmp_path):
    here("promote")
    sh(candidate, f"dvc remote add -q -d store {tmp_path / 'remote'}")
    sh(candidate, "git add -A && git commit -qm Promote")
    sh(candidate, "dvc push -q")
    sh(tmp_path, f"git clone -q {candidate} clone")
    sh(tmp_path / "clone", "dvc pull -q models/champion.dvc")
    assert md5_path(tmp_path / "clone/models/champion") == md5_path(Path("models/champion"))


def test_the_command_line_says_it_in_one_line(candidate):
    repro(candidate, verdict="HOLD")
    done = type_command(candidate, "promote")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the verdict is HOLD") and done.stderr.count("\n") == 1


def test_dvc_artifacts_get_brings_the_registered_version(candidate, tmp_path, capsys):
    here("promote")
    commands = re.findall(r"gto register .*?v0\.1\.0", capsys.readouterr().out)
    sh(candidate, "git add -A && git commit -qm 'Promote version 1'")
    sh(candidate, f"dvc remote add -q -d storage {tmp_path / 'storage'} && git commit -qam Remote && dvc push -q")
    for command in commands:
        sh(candidate, command)
    assert sh(candidate, "git tag").split() == ["adapter@v0.1.0", "package@v0.1.0"]
    for name, file in (("adapter", "adapter_model.safetensors"), ("package", "model.gguf")):
        sh(tmp_path, f"dvc artifacts get -q {candidate} {name} -o {name}")
        assert sha256_file(tmp_path / name / file) == sha256_file(Path("models/champion", name, file))
    here("promote")
    assert "gto register" not in capsys.readouterr().out
