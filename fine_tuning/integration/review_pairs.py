"""The pairs of the review with the app's engine: what the terminal and the page Review ask about."""

from functools import partial

from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.review import Pairs
from fine_tuning.integration.chat_models import AppSettings, default_sampling
from fine_tuning.integration.embedded_engine import shared_engines


def open_pairs() -> Pairs:
    """Of the checkout in the current folder; replies are drawn as the chat draws them. Raises UserError if there is
    nothing to review."""
    app = read_params("app", AppSettings)
    limits = {"context": app.context, "threads": app.threads, "slots": app.slots, "timeout": app.timeout}
    return Pairs(partial(shared_engines.use, **limits), default_sampling(app).model_dump(), app.context)
