"""`round`: what is new becomes a candidate with a verdict, in one commit. `round --back`: back to the last good state.

What is there is committed before a round begins. A round that fails or is stopped puts it back, from git and from DVC's
cache. After one that is killed the next round goes on with what is there, and `round --back` undoes it. Conversations
are never taken back: what was sealed stays sealed, and the split of a conversation stays known after `--back`.
"""

import argparse
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from fine_tuning.commands.canary import settle
from fine_tuning.commands.conversations import bring_sample, import_files, seal_inbox
from fine_tuning.commands.models import deploy, each_server
from fine_tuning.commands.promote import Outdated, promote_candidate
from fine_tuning.common import dvc_files
from fine_tuning.common.dvc_files import LOCK, pipeline_stands_still, show_file
from fine_tuning.common.errors import UserError, count_of, line_of
from fine_tuning.common.project import (
    COMPARISON,
    MANIFEST,
    WRITTEN,
    changes_by_hand,
    main_checkout,
    person_name,
    root,
    run_command,
)
from fine_tuning.common.records import read_line, read_object, replacing
from fine_tuning.common.settings import read_params
from fine_tuning.common.stage_times import FAILED, about, round_seconds
from fine_tuning.data_collection.storage.shards import read_manifest
from fine_tuning.evaluation.looks import looked_at
from fine_tuning.integration.canary import FINISHED, Canary
from fine_tuning.integration.ollama_client import OllamaClient, OllamaError, is_local, ollama_host
from fine_tuning.integration.round_policy import BEFORE, ROUND_LOCK, RoundsSettings, note_failure, note_success, notify
from fine_tuning.model_management.champion import read_champion
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.model_registry import ADAPTER_TAG, CANDIDATE, open_registry
from fine_tuning.runtime.hardware import detect_hardware

SCRATCH = Path(".whetstone")
RESULTS = (str(LOCK), "metrics", str(MANIFEST))
LEDGER = "data/splits.txt"
SHARE = 0.5  # of the new conversations that a canary gets: with it harm is found soonest


def run_round(arguments: argparse.Namespace) -> None:
    """Run a round, or go back. Raises UserError if it would touch changes of somebody's own, something else is running,
    git knows no author, or a stage failed; everything but what was sealed is as it was."""
    if root().resolve() != main_checkout():
        raise UserError("this is a temporary experiment's folder: run rounds in the main checkout")
    SCRATCH.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    # A script that starts this with `&` has it ignore SIGINT, and the stages would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with FileLock(ROUND_LOCK, timeout=0):
            _refuse()
            if arguments.back:
                _go_back()
            else:
                _round()
    except Timeout:
        raise UserError("another round is running in this checkout: wait for its end") from None


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM: end what was started as Ctrl-C does, which reaches it by itself."""
    import psutil

    for child in psutil.Process(os.getpid()).children(recursive=True):
        child.send_signal(signal.SIGINT)
    raise KeyboardInterrupt


def _refuse() -> None:
    """See that nothing else is at work here and that there is nothing that a commit could mix up."""
    if changed := changes_by_hand(Path.cwd()):
        raise UserError(
            f"{count_of(len(changed), 'file')} changed and not committed (the first is {changed[0]}): commit or "
            "`git stash` them, then run the round again"
        )
    try:
        run_command("git", "var", "GIT_COMMITTER_IDENT")
    except UserError:
        raise UserError("git knows no author: `git config user.name NAME`, `git config user.email ADDRESS`") from None
    with pipeline_stands_still():
        pass


# -------------------------------------------------------------------------------------------------------------- round


def _round() -> None:
    settings, canary = read_params("rounds", RoundsSettings), Canary(Path.cwd())
    settle(canary)
    if (state := canary.state()) is not None and state.outcome == FINISHED:
        finish(settings)
        state = canary.state()
    if settings.promote == "canary" and state is not None and state.outcome is None:
        raise UserError(f"the canary of {state.tag} runs: wait for its end, or `python -m fine_tuning canary --stop`")
    if not BEFORE.is_file():  # else a round was killed: what was before it is what was before this one
        commit_results("Results before the round")
        with replacing(BEFORE) as file:
            file.write(run_command("git", "rev-parse", "HEAD").encode())
    before = _conversations()
    try:
        bring_sample(argparse.Namespace())
        seal_inbox()
        take_followed(settings)
        FAILED.unlink(missing_ok=True)
        free_gpu(read_params("deploy", DeploySettings))
        print(f"the pipeline runs what is out of date: {about(round_seconds(Path.cwd()))}", flush=True)
        if not dvc_files.reproduce():
            raise UserError(f"the round failed in {_why_failed()}; results and models are as they were")
        _refuse()
        found = looked_at(read_object(COMPARISON))
        verdict, total = str(found.get("verdict")), _conversations()
        new = f", {total - before:+,} since the last round" if before and total != before else ""
        reasons = "\n".join(f"- {reason}" for reason in found.get("reasons", ()))
        text = f"{count_of(total, 'conversation')}{new}\n{reasons}"
        message = f"Round: {verdict}\n\n{text}\n\nVerdict: {verdict}"
        commit = commit_results(message) if settings.commit else None
    except BaseException as error:
        _put_back()
        if isinstance(error, Exception):
            note_failure(Path.cwd(), (line_of(error) or type(error).__name__).removeprefix("error: "))
        raise
    BEFORE.unlink()
    note_success(Path.cwd())
    kept = f"committed as {commit}" if commit else "as before: nothing is new" if settings.commit else "not committed"
    print(f"{text}\nVerdict: {verdict}, {kept}", flush=True)
    if commit or not settings.commit:
        notify(settings, f"Round: {verdict}. {text}")
    follow(settings)


def take_followed(settings: RoundsSettings) -> None:
    if settings.follow:
        files = [Path(path).expanduser() for path in settings.follow]
        import_files(argparse.Namespace(files=files, model=None, follow=True))


def free_gpu(settings: DeploySettings) -> None:
    """Where training will use a GPU of this machine, take what Ollama has loaded out of its memory, and say so."""
    host = ollama_host(settings.host)
    if not is_local(host) or detect_hardware("auto", None).device == "cpu":
        return
    with suppress(OllamaError), OllamaClient(host, timeout=settings.timeout) as client:
        if names := client.unload_from_gpu():
            print(f"Ollama unloaded {', '.join(names)}: training needs the GPU's memory", flush=True)


def finish(settings: RoundsSettings) -> None:
    """Before a round: what the last one could not do, such as without a server, or what a canary has led to. Where the
    pipeline has to run first, or a round was killed, that is left to the round."""
    if not BEFORE.is_file():
        with suppress(Outdated):
            follow(settings)


def follow(settings: RoundsSettings) -> None:
    """Do with the candidate what rounds.promote allows; the champion is named last, when the candidate is in use. Done
    again after a failure, it goes on where it was. Raises UserError if a server is missing, or the candidate is no
    longer what was compared."""
    if settings.promote == "ask":
        return
    found = looked_at(read_object(COMPARISON))
    adapter = found.get("adapter_sha256")
    promoted = read_champion().get("adapter_sha256") == adapter
    if found.get("verdict") != "PROMOTE" or promoted:
        return
    registry, who, share = open_registry(read_params("deploy", DeploySettings).name), person_name(None), None
    servers = each_server(argparse.Namespace(host=None)) if settings.promote == "canary" else ()
    if any([switcher.live() for switcher in servers]):
        state = Canary(Path.cwd()).state()
        tried = [v.number for v in registry.versions() if v.tags.get(ADAPTER_TAG) == adapter]
        if state is None or state.candidate not in tried:
            share = SHARE
        elif state.outcome != FINISHED:
            return  # it runs, or did harm, or somebody stopped it
    promote_candidate(registry, None, who, register_only=True)
    version = registry.by_alias(CANDIDATE)
    assert version is not None
    to_ollama = {"server": "ollama", "host": None, "unproven": False}
    deploy(argparse.Namespace(version=str(version.number), canary=share, **to_ollama))
    if share is None:
        promote_candidate(registry, None, who)
        if settings.commit:
            commit_results(f"Promote version {version.number}\n\nrounds.promote: {settings.promote}")


def _put_back() -> None:
    """Results, splits and outputs of the stages as they were before the round."""
    _take(BEFORE.read_text().strip(), *RESULTS, LEDGER)
    BEFORE.unlink()


def _conversations() -> int:
    return int(read_manifest(MANIFEST).get("total_conversations") or 0)


def _why_failed() -> str:
    failed = read_object(FAILED)
    error = str(failed.get("error", "")).removeprefix("error: ")
    return f"the stage {failed['stage']}: {error}" if error else "`dvc repro`: its output says why"


def commit_results(message: str) -> str | None:
    """Commit what commands write, and nothing else; the short id, None where there was nothing to commit."""
    here = [path for path in WRITTEN if Path(path).exists()]
    run_command("git", "add", "--all", "--", *here)
    if not run_command("git", "status", "--porcelain", "--untracked-files=no", "--", *here):
        return None
    run_command("git", "commit", "--quiet", "--message", message, "--", *here)
    return run_command("git", "rev-parse", "--short", "HEAD").strip()


def _take(commit: str, *paths: str) -> None:
    """Make these paths, and the outputs of the stages, what they are in a commit."""
    run_command("git", "add", "--all", "--", *(path for path in paths if Path(path).exists()))
    known = run_command("git", "ls-files", "--", *paths) + run_command(
        "git", "ls-tree", "-r", "--name-only", commit, "--", *paths
    )
    run_command("git", "restore", f"--source={commit}", "--staged", "--worktree", "--", *known.splitlines())
    if LOCK.is_file():
        dvc_files.checkout_outputs()


# --------------------------------------------------------------------------------------------------------------- back


def _go_back() -> None:
    """Undo a round that was killed, else take over the results of the newest good commit before the present ones.

    The present state is committed first, so that nothing is lost. Conversations, votes, tombstones, splits, parameters,
    the champion and what is live stay as they are.
    """
    if BEFORE.is_file():
        _put_back()
        print("the round that was interrupted is undone: results and models are as they were before it")
        return
    good, verdict = _last_good()
    if saved := commit_results("Before going back"):
        print(f"the present state is kept in {saved}")
    _take(good, *RESULTS)
    short = good[:10]
    commit_results(f"Back to {short}\n\nThe next round trains on all conversations again.\n\nVerdict: {verdict}")
    print(f"results and models are those of {short} ({verdict}); conversations, champion and what is live stay")


def _last_good() -> tuple[str, str]:
    """(commit, verdict) of the newest state before the present one whose candidate was to be promoted or was promoted.
    Raises UserError if there is none, or its files are neither in DVC's cache nor on its remote."""
    here = Path.cwd()
    commits = run_command("git", "log", "--first-parent", "--format=%H", "--", str(LOCK)).split()
    locks = [show_file(here, commit, str(LOCK)) for commit in commits]
    present = LOCK.read_bytes() if LOCK.is_file() else None
    earlier = max((number for number, lock in enumerate(locks) if lock == present), default=-1) + 1
    for commit in commits[earlier:]:
        found: dict[str, Any] = read_line(show_file(here, commit, str(COMPARISON)) or b"{}")
        if found.get("verdict") == "PROMOTE" or "champion" in found:
            if dvc_files.fetch_outputs(commit):
                return commit, str(found["verdict"])
            raise UserError(f"models of {commit[:10]} are not here any more: `dvc pull` may bring them")
    raise UserError("no earlier commit has a candidate whose verdict was PROMOTE: there is nothing to go back to")
