"""`canary`: how the version does that gets a share of the conversations, and what follows when it is over."""

import argparse
from datetime import UTC, datetime

from filelock import FileLock

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import main_checkout, root
from fine_tuning.common.settings import read_params
from fine_tuning.integration.canary import FINISHED, Canary, would_be_found
from fine_tuning.integration.round_policy import RoundsSettings, notify
from fine_tuning.model_management.model_registry import ModelRegistry, open_registry, registry_locks
from fine_tuning.model_management.model_switcher import STAMP


def canary(arguments: argparse.Namespace) -> None:
    """Show the canary, stop it, and do what follows from its end where that was not done yet. Raises UserError if there
    is none to stop."""
    here = Canary(main_checkout(root()))
    if arguments.stop and not here.stop("by hand"):
        raise UserError("no canary runs: `python -m fine_tuning deploy VERSION --canary` begins one")
    settle(here)
    state = here.state()
    if state is None:
        print("there was no canary yet: `python -m fine_tuning deploy VERSION --canary` begins one")
    elif state.outcome is not None:
        print(f"the canary of {state.tag} is {state.outcome}: {state.why}")
    else:
        counts = here.counts()
        print(f"{state.tag} answers {state.share:.0%} of the new conversations, version {state.live} the others")
        print(f"{counts}\nby now {would_be_found(counts)}")


def settle(here: Canary) -> None:
    """See whether a canary is over; if so, keep its outcome in the registry, and make its version live where it did no
    harm and rounds.promote allows it. Done again after a failure, it ends at the same place."""
    from fine_tuning.commands.models import each_server  # which begins canaries

    here.check()
    with FileLock(registry_locks() / "canary.lock"):
        state = here.state()
        if state is None or state.outcome is None or state.settled:
            return
        log(open_registry(state.name), state.candidate, f"{state.outcome}: {state.why}")
        settings, then = read_params("rounds", RoundsSettings), f"version {state.live} stays live"
        if state.outcome == FINISHED and settings.promote == "ask":
            then = f"`python -m fine_tuning switch {state.candidate}` makes it live"
        elif state.outcome == FINISHED:
            for switcher in each_server(argparse.Namespace(host=None)):
                switcher.switch(state.candidate)
            then = "it is live"
        here.settled(state.number)
        notify(settings, f"the canary of {state.tag} is {state.outcome}: {state.why}; {then}")


def begin(registry: ModelRegistry, candidate: int, live: int, share: float) -> None:
    """Let a version that was deployed answer a share of the new conversations."""
    here = Canary(main_checkout())
    settle(here)
    here.begin(registry.name, candidate, live, share)
    log(registry, candidate, f"begins with {share:.0%} of the new conversations beside version {live}")
    tag = f"{registry.name}:{candidate}"
    print(f"{tag} answers {share:.0%} of the new conversations: `python -m fine_tuning canary` shows how it does")


def log(registry: ModelRegistry, number: int, text: str) -> None:
    registry.set_tags(number, {f"canary.{datetime.now(UTC).strftime(STAMP)}": text})
