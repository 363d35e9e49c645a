"""`promote`: the candidate of the last `dvc repro`, or an older version, becomes the champion.

Registry first, files second, and each step is harmless when repeated: a rerun after a kill ends at the same place.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fine_tuning.commands.summary import read_result
from fine_tuning.common import dvc_files, project
from fine_tuning.common.errors import UserError
from fine_tuning.common.names import parse_version
from fine_tuning.common.records import read_json, read_object, write_json
from fine_tuning.common.settings import read_params
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.evaluation.looks import LOOKS, looked_at
from fine_tuning.evaluation.records.champion_records import KEPT, called_champion, is_champion, kept_files
from fine_tuning.evaluation.records.settings import ADAPTER, PROMPT
from fine_tuning.model_management import champion
from fine_tuning.model_management.mlflow_model import write_model
from fine_tuning.model_management.model_deployer import DeploySettings, Probe
from fine_tuning.model_management.model_registry import CHAMPION, ModelRegistry, ModelVersion, open_registry
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.schema.prepared import split_sha256
from fine_tuning.training.adopted import ORIGIN
from fine_tuning.training.tracking import flatten

WEIGHTS = project.ADAPTER / "adapter_model.safetensors"
MERGED, BASE = Path("models/merged"), Path("models/base")
BASE_GGUF = BASE / "base-Q8_0.gguf"
TRAIN = project.PREPARED / "train"  # where examples come from
RECORDS = Path("data/evaluation")
DATA = {split: project.PREPARED / split for split in SPLITS} | {"preferences": Path("data/preferences")}
LEARNED = ("train", "preferences")  # of DATA, by an adapter that was trained here
MADE_ON = Path("metrics/made_on.json")  # the machine that made what dvc.lock names, see CONTRIBUTING.md
JUDGING = ("evaluate", "compare")  # stages that depend on models/champion.json
REPORTS = ("metrics/*.json", "metrics/*.html", "metrics/*.md", "metrics/plots/*")
PROVENANCE = ("dvc.lock", "dvc.yaml", "params.yaml", "data/manifest.json")

# Made-up conversations that a server must render as training did: with and without a system prompt, several turns.
PROBES = (
    [{"role": "user", "content": "How do I restart the router?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": 'What is\n\na "queue"?  {{ 1 }} 2024 … é 你好'},
    ],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Count: 1, 2,"},
    ],
)


def promote(arguments: argparse.Namespace) -> None:
    """Make the candidate, or a version that was champion before, the champion."""
    if project.root().resolve() != project.main_checkout():
        raise UserError("this is a temporary experiment's folder: promote in the main checkout after `dvc exp apply`")
    registry = open_registry(read_params("deploy", DeploySettings).name)
    who = project.person_name(arguments.by)
    if arguments.version is not None:
        promote_again(registry, parse_version(arguments.version, registry.name), who)
    else:
        promote_candidate(registry, (arguments.force or "").strip() or None, who)


def promote_candidate(registry: ModelRegistry, forced: str | None, who: str, *, register_only: bool = False) -> None:
    """Register the candidate, make it the champion, keep its files for the next comparison. A canary is registered
    only: it is the champion when it has done no harm."""
    compared = read_result(project.COMPARISON)
    check_unchanged(compared)
    check_verdict(compared)
    compared = looked_at(compared)
    verdict = compared["verdict"]
    if verdict != "PROMOTE" and not forced:
        reasons = "; ".join(compared["reasons"])
        raise UserError(
            f"the verdict is {verdict} ({reasons}): improve it, or `python -m fine_tuning promote --force WHY`"
        )
    replaces, kind = champion_compared_with(registry, bool(forced)), kind_of(compared)
    with packaged(kind) as package:
        files = stage_files(package)
        content, probes = content_hash(files), make_probes(kind)
        try:
            with staged_artifacts(registry.name, files, probes) as folder:
                tags = version_tags(compared, files, forced)
                shown = description(registry.name, compared, tags)
                data = {name: DATA[name] for name in DATA if not (name in LEARNED and "adopted_from" in tags)}
                version, new = registry.register(content, folder, tags, evaluation_metrics(), shown, data)
            registry.nominate(version.number)
            if register_only:
                print(f"{version.name} version {version.number} is the registry's candidate")
                return
            old = registry.promote(version.number, replaces)
            train = dvc_files.locate(Path.cwd(), dvc_files.read_lock(), TRAIN)
            made = (("adapter", project.ADAPTER), *model_files(kind), ("package", package))
            champion.keep_files((*made, *evaluation_files()), probes, train)
            champion.name_champion(registry, version, tags, who)
        finally:
            shutil.rmtree(champion.STAGED, ignore_errors=True)
    how = f"forced ({forced})" if forced else verdict
    print(f"{version.name} version {version.number} {'registered' if new else 'was registered already'}: {how}")
    compare_with_champion()
    report(version, old)


def promote_again(registry: ModelRegistry, number: int, who: str) -> None:
    """Make a version that was champion before the champion again, with the files that it was champion with."""
    version, current = registry.version(number), registry.by_alias(CHAMPION)
    champion.fetch_files(version)
    old = registry.promote(number, current.number if current else None)
    champion.restore_files(version)
    champion.name_champion(registry, version, version.tags, who)
    if candidate_is_champion():
        compare_with_champion()
    report(version, old)


# ------------------------------------------------------------------------------------------------------------- may it?


class Outdated(UserError):
    """The pipeline has to run again before the candidate can be promoted."""


def check_unchanged(compared: dict[str, Any]) -> None:
    """See that the files on disk are the candidate that was compared, made by the pipeline that dvc.lock describes."""
    if not WEIGHTS.is_file():
        raise UserError(f"{WEIGHTS} is missing: run `dvc pull` or `dvc repro`")
    adapter_sha256 = compared.get("adapter_sha256")
    if project.sha256_file(WEIGHTS) != adapter_sha256:
        raise Outdated("models/adapter is not the one that was compared: run `dvc repro`, then promote again")
    stages, named = dvc_files.read_lock(), str(champion.RECORD)
    made = (project.ADAPTER, MERGED, project.PACKAGE)
    changed = [str(path) for path in made if dvc_files.md5_path(path) != dvc_files.locked_md5(stages, path)]
    changed += dvc_files.changed_since_lock(*JUDGING)
    if champion.read_champion().get("adapter_sha256") == adapter_sha256:  # a promotion that was cut off
        changed = [path for path in changed if path != named]
    if named in changed:
        raise Outdated("the champion has changed since the comparison: run `dvc repro`, then promote again")
    if changed:
        raise Outdated(f"{changed[0]} is not what dvc.lock describes: run `dvc repro`, then promote again")


def check_verdict(compared: dict[str, Any]) -> None:
    """Compute the comparison once more from the records of the evaluation, with the parameters in force."""
    from fine_tuning.evaluation.records.settings import EvaluateSettings
    from fine_tuning.evaluation.verdict.comparison import CompareSettings, Evidence

    evidence = Evidence.read(RECORDS, read_params("evaluate", EvaluateSettings), project.VOTES)
    settings, suite = read_params("compare", CompareSettings), read_json(project.EVALUATION)["suite"]
    found = evidence.verdict(settings, compared["adapter_sha256"], suite)
    if candidate_is_champion() and "champion" in compared:  # a promotion that was cut off has not said it yet
        found = called_champion(found, champion.read_champion())
    found, said = rounded(found), rounded(compared)
    if other := [key for key in sorted(found.keys() | said.keys()) if found.get(key) != said.get(key)]:
        raise UserError(
            f"{project.COMPARISON} is not what its records give ({', '.join(other)}): run `dvc repro -f -s compare`"
        )


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """A record with numbers to nine digits: another machine adds them in another order."""
    return json.loads(json.dumps(record), parse_float=lambda digits: float(f"{round(float(digits), 9):.9g}"))


def champion_compared_with(registry: ModelRegistry, forced: bool) -> int | None:
    """Number of the registry's champion if it is the one in models/champion.json, which the candidate was compared
    with; 0, which no version has, if it is another one and --force was not given."""
    current = registry.by_alias(CHAMPION)
    if current is None:
        return None
    same = current.tags.get("adapter_sha256") == champion.read_champion().get("adapter_sha256")
    return current.number if same or forced else 0


def candidate_is_champion() -> bool:
    """Whether the files of the candidate are those that models/champion.json names."""
    files = (WEIGHTS, project.PACKAGE / "model.gguf")
    kind = kind_of(read_object(project.COMPARISON))
    return all(file.is_file() for file in files) and is_champion(champion.RECORD, *files, kind)


def evaluation_files() -> list[tuple[str, Path]]:
    """(place in models/champion, path) of what the evaluation wrote; where the candidate is the champion already, of
    what it was promoted by."""
    if candidate_is_champion() and kept_files(champion.RECORD):
        return [(KEPT, champion.FOLDER / KEPT)]
    return [(f"{KEPT}/{out['path']}", Path(out["path"])) for out in dvc_files.read_lock()[JUDGING[0]]["outs"]]


def compare_with_champion() -> None:
    """Run the stages that depend on models/champion.json, so that `dvc repro` has nothing left to do."""
    if not dvc_files.reproduce("--quiet", "--single-item", *JUDGING):
        raise UserError(f"the champion is named, but `dvc repro {' '.join(JUDGING)}` failed: fix it, then run that")


# ------------------------------------------------------------------------------------------------------------ register


def kind_of(compared: dict[str, Any]) -> dict[str, Any]:
    """What a comparison says of the candidate's kind; of an adapter where it is of before there were kinds."""
    return compared.get("kind", {"name": ADAPTER})


@contextmanager
def packaged(kind: dict[str, Any]) -> Iterator[Path]:
    """A folder with the package of the candidate: that of the stage, and beside it what stands before a question. A
    prompt version's has the GGUF of the base and its system prompt."""
    if kind["name"] == ADAPTER:
        yield project.PACKAGE
        return
    from fine_tuning.model_management.packaging.model_package import write_modelfile

    gguf = BASE_GGUF if kind["name"] == PROMPT else project.PACKAGE / "model.gguf"
    request = read_json(project.PACKAGE / "create.json")
    request |= {"system": kind["system_prompt"]} if kind["system_prompt"] else {}
    request |= {"files": {"model.gguf": f"sha256:{project.sha256_file(gguf)}"}}
    with tempfile.TemporaryDirectory(prefix="promote-") as name:
        folder = Path(name)
        (folder / "model.gguf").symlink_to(gguf.absolute())
        (folder / "template.gotmpl").write_bytes(request["template"].encode())
        (folder / "Modelfile").write_bytes(write_modelfile(request).encode())
        write_json(folder / "create.json", request)
        shown = {"kind": kind["name"], "system_prompt": kind["system_prompt"], "examples": kind["examples"]}
        write_json(folder / Path(champion.KIND).name, shown)
        yield folder


def model_files(kind: dict[str, Any]) -> list[tuple[str, Path]]:
    """(place in models/champion, path) of the model that was scored, for the next comparison."""
    if kind["name"] != PROMPT:
        return [("merged", MERGED)]
    return [(f"merged/{file.name}", file) for file in BASE_GGUF.parent.iterdir() if file.suffix != ".gguf"]


def stage_files(package: Path) -> dict[str, Path]:
    """{path in a version: file} of adapter and package."""
    return {
        f"{place}/{file.relative_to(folder).as_posix()}": file
        for place, folder in (("adapter", project.ADAPTER), ("package", package))
        for file in dvc_files.files_below(folder)
    }


def content_hash(files: dict[str, Path]) -> str:
    """SHA-256 of what the version is: adapter, GGUF and the request that creates the model."""
    missing = [path for path in champion.CONTENT if path not in files]
    if missing:
        raise UserError(f"models/{missing[0]} is missing: run `dvc repro package`")
    content = [path for path in (*champion.CONTENT, champion.KIND) if path in files]
    return champion.content_of({path: project.sha256_file(files[path]) for path in content})


@contextmanager
def staged_artifacts(name: str, files: dict[str, Path], probes: list[Probe]) -> Iterator[Path]:
    """A folder of all that the registry keeps of a version, an MLflow model. The GGUF stays with DVC; its hashes are
    kept."""
    with tempfile.TemporaryDirectory(prefix="promote-") as place:
        write_model(folder := Path(place), name, BASE, read_base_card(BASE))
        for path, file in files.items():
            if path != champion.GGUF:
                champion.copy_file(file, folder / path)
        for pattern in REPORTS:
            for file in sorted(Path().glob(pattern)):
                champion.copy_file(file, folder / "reports" / file.name)
        for text in PROVENANCE:
            if Path(text).is_file():
                champion.copy_file(Path(text), folder / "provenance" / Path(text).name)
        write_json(folder / "provenance" / "conversations.json", split_members())
        write_json(folder / "probes.json", [asdict(probe) for probe in probes])
        # The SHA-256 is a file's identity in Ollama, the MD5 its name in DVC's cache.
        described = {
            path: {"sha256": project.sha256_file(file), "md5": dvc_files.md5_file(file), "bytes": file.stat().st_size}
            for path, file in files.items()
        }
        write_json(folder / "files.json", described)
        yield folder


def split_members() -> dict[str, list[str]]:
    """{split: ids of its conversations} of the data that the adapter was trained on, by dvc.lock; an adopted one was
    trained on none that is known."""
    import pyarrow.parquet

    stages, members = dvc_files.read_lock(), {}
    for split in SPLITS:
        files = dvc_files.locate(Path.cwd(), stages, DATA[split])
        if not files:
            raise UserError(f"{DATA[split]} is not what dvc.lock describes: run `dvc pull` or `dvc repro`")
        members[split] = pyarrow.parquet.read_table(files, columns=["id"])["id"].unique().to_pylist()
    return members | ({"train": []} if adopted_from() else {})


def make_probes(kind: dict[str, Any]) -> list[Probe]:
    """The probes as the candidate's own tokenizer renders them, without those whose roles its template refuses."""
    from fine_tuning.schema.chat_format import ChatSettings, encode_prompt, load_tokenizer, render

    system_prompt = kind.get("system_prompt") or read_params("chat", ChatSettings).system_prompt
    tokenizer = load_tokenizer(MERGED)
    probes = []
    for messages in PROBES:
        with suppress(UserError):
            prompt = render(tokenizer, messages, system_prompt, add_generation_prompt=True).text
            probes.append(Probe(messages, prompt, len(encode_prompt(tokenizer, messages, system_prompt))))
    if not probes:
        raise UserError("the chat template refuses every conversation: check models/merged/chat_template.jinja")
    return probes


def version_tags(compared: dict[str, Any], files: dict[str, Path], forced: str | None) -> dict[str, str]:
    """The tags of the design: what the version is, what it was made from, what was said about it."""
    commit, dirty = project.git_commit(Path.cwd())
    base = read_object(project.BASE_CARD)
    tags = {
        "adapter_sha256": compared["adapter_sha256"],
        "gguf_sha256": project.sha256_file(files[champion.GGUF]),
        "gguf_md5": dvc_files.md5_file(files[champion.GGUF]),
        "dvc_lock_sha256": project.sha256_file(dvc_files.LOCK),
        "git_commit": commit or "none",
        "git_dirty": str(dirty).lower(),
        "adapter_commit": adapter_commit() or "uncommitted",
        "data_md5": dvc_files.locked_md5(dvc_files.read_lock(), project.CONVERSATIONS, "deps") or "none",
        "eval_set_sha256": compared["eval_set_sha256"],
        "base_model": str(base.get("model") or "unknown"),
        "base_revision": str(base.get("revision") or "none"),
        "verdict": compared["verdict"],
        "kind": (kind := kind_of(compared))["name"],
    }
    tags |= {"adopted_from": origin} if (origin := adopted_from()) else {}
    if kind["name"] != ADAPTER:
        tags |= {"examples": str(kind["examples"]), "examples_sha256": split_sha256(TRAIN)}
        tags |= {"system_prompt": kind["system_prompt"]} if kind["system_prompt"] else {}
    return tags | ({"forced_reason": forced} if forced else {})


def adopted_from() -> str | None:
    """Where the adapter comes from, if it was trained elsewhere."""
    return read_object(project.ADAPTER / ORIGIN).get("origin")


def description(name: str, compared: dict[str, Any], tags: dict[str, str]) -> str:
    forced = f", forced: {tags['forced_reason']}" if "forced_reason" in tags else ""
    reasons = "".join(f"- {reason}\n" for reason in compared["reasons"])
    return f"""Verdict **{compared["verdict"]}**{forced}

{reasons}
Adapter `{tags["adapter_sha256"][:12]}` on {tags["base_model"]}, revision {tags["base_revision"]}. Model card:
`adapter/README.md`. Report: `reports/report.html`. GGUF: DVC's object `{tags["gguf_md5"]}`.

    mlflow.pyfunc.load_model("models:/{name}@champion").predict({{"messages": [{{"role": "user", "content": "Hi"}}]}})
"""


def adapter_commit() -> str | None:
    """The first commit up to HEAD whose dvc.lock holds the adapter, None if it was never committed."""
    hashes = f"{dvc_files.md5_path(project.ADAPTER)}|{dvc_files.md5_file(WEIGHTS)}"
    with suppress(UserError):  # outside git
        commits = project.run_command("git", "log", "--reverse", "--format=%H", "-G", hashes, "--", "dvc.lock")
        return commits.partition("\n")[0]
    return None


def evaluation_metrics() -> dict[str, float]:
    """Numbers of metrics/evaluation.json, named by their path in it."""
    values = flatten(read_object(project.EVALUATION))
    return {
        f"evaluation.{re.sub('[^A-Za-z0-9_./ -]', '_', key)}": float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def report(version: ModelVersion, old: ModelVersion | None) -> None:
    print(f"champion: version {version.number}" + (f", before it version {old.number}" if old else ", the first"))
    print(f"kept in {champion.FOLDER} and {champion.RECORD}. Next:")
    if MADE_ON.is_file() and candidate_is_champion():
        print("  python -m tests.check_lock --made-here   # if `dvc repro` ran on this machine as well")
    print(f"  git add {champion.RECORD} {champion.FOLDER}.dvc {LOOKS} dvc.lock metrics")
    print(f"  git commit -m 'Promote version {version.number}' && dvc push")
    if not candidate_is_champion():
        print("  dvc repro   # compares the candidate with it")
    elif not project.run_command("git", "tag", "--list", f"adapter@v0.{version.number}.0"):
        for artifact in ("adapter", "package"):
            print(f"  gto register {artifact} --version v0.{version.number}.0   # for `dvc artifacts get`")
        print("  git push --tags")
    print("  python -m fine_tuning deploy")
