"""Whether a candidate that gets a share of the conversations is worse, with evidence that stays valid at every look.

If the candidate is no worse than the live version, a conversation that went badly is one of the candidate's with the
share at which conversations are assigned to it, whoever spoke and whenever. Against that stands the mixture of constant
bets of `win_rate.evidence`: a test martingale, so that users of many kinds, trends and looking after every conversation
raise no false alarm more often than one in DECIDES. Conversations that went well carry no evidence and need not be
counted in time. Assumed: a bad conversation becomes known as soon with the candidate as with the live version.
"""

import math
from bisect import bisect_left

import numpy as np

from fine_tuning.evaluation.verdict.settings import DECIDES
from fine_tuning.evaluation.verdict.win_rate import MOST, STAKES

POWER = 0.8


def harm(candidate: int | np.ndarray, live: int | np.ndarray, share: float) -> np.ndarray:
    """E-values against "the candidate is no worse"; 1 where nothing went badly.

    Args:
        candidate, live: how many conversations of each went badly; arrays of one shape.
        share: of the conversations that are assigned to the candidate, between 0 and 1.
    """
    won, lost = np.log1p(STAKES * (1 - share) / (2 * share)), np.log1p(-STAKES / 2)
    products = np.multiply.outer(candidate, won) + np.multiply.outer(live, lost)
    most = products.max(axis=-1)
    return np.asarray(np.exp(np.minimum(most + np.log(np.exp(products - most[..., None]).mean(axis=-1)), MOST)))


def chance_to_find(share: float, live: float, candidate: float, conversations: int) -> float:
    """Probability, exact, that the evidence has decided by then, looked at after each bad conversation.

    Args:
        live, candidate: of the conversations of each, the part that goes badly.
    """
    from scipy.stats import binom

    bad = share * candidate + (1 - share) * live
    if not bad:
        return 0.0
    most = min(conversations, math.ceil(conversations * bad + 5 * math.sqrt(conversations * bad)) + 5)
    running, needed, decided, total = np.ones(1), 0, 0.0, 0.0
    for count, chance in enumerate(binom.pmf(np.arange(most + 1), conversations, bad)):
        if count:  # `running` is the distribution of the candidate's among the runs that have not stopped
            theirs = share * candidate / bad
            running = np.append(running * (1 - theirs), 0) + np.append(0, running * theirs)
            while needed <= count and harm(needed, count - needed, share) < DECIDES:
                needed += 1
            decided += running[needed:].sum()
            running[needed:] = 0
        total += decided * chance
    return float(total)


def smallest_found(share: float, live: float, conversations: int) -> float | None:
    """The lowest part of bad conversations, in hundredths, with which a candidate would have been found with a
    probability of POWER by then; None where no part would."""
    # The chance rises with the part.
    parts = range(math.floor(100 * live) + 1, 101)
    at = bisect_left(parts, POWER, key=lambda part: chance_to_find(share, live, part / 100, conversations))
    return parts[at] / 100 if at < len(parts) else None
