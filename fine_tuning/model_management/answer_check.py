"""What a server answers, compared with what llama.cpp answers here with the same GGUF: the proof of prompts and weights
where the server shows neither.

Greedy replies are followed token by token. Runtimes add in another order, so that a near tie may fall otherwise: the
server's token must be about as likely as the likeliest one here. A change that moves no likeliest token is not seen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import cores
from fine_tuning.runtime.llama_engine import LlamaEngine

if TYPE_CHECKING:
    from fine_tuning.model_management.model_deployer import ModelServer, Probe

ANSWER_TOKENS = 24
NEAR_TIE = 0.5  # nats; between runtimes, likeliest tokens 0.1 apart were seen to change places
ALTERNATIVES = 16
GREEDY = {"temperature": 0.0, "seed": 1, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class AnswersDiffer(UserError):
    """The server answers otherwise than the GGUF."""


def compare_answers(server: "ModelServer", model: str, gguf: Path, probes: "Sequence[Probe]") -> int:
    """The number of tokens in which `model`'s replies to the probes are those of `gguf`. Raises AnswersDiffer if a
    reply is another one, UserError if the server fails, llama.cpp cannot load the GGUF here, or nothing could be
    compared."""
    agreed = 0
    context, threads = max(probe.tokens for probe in probes) + 4 * ANSWER_TOKENS, cores()
    with LlamaEngine(gguf, context=context, threads=threads) as engine:
        for number, probe in enumerate(probes, 1):
            reply, stats = server.chat(model, probe.messages, {**GREEDY, "num_predict": ANSWER_TOKENS})
            ids = engine.tokenize(probe.prompt, parse_special=True, add_special=True)
            count = _follow(engine, ids, reply.encode("utf-8", "replace"), stats.done_reason == "length")
            if count is None:
                raise AnswersDiffer(f"{model} on {server.host} answers probe {number} otherwise than its GGUF here")
            agreed += count
    if agreed < len(probes):
        raise UserError(f"{model} on {server.host} answers with nothing that can be compared")
    return agreed


def _follow(engine: LlamaEngine, ids: list[int], reply: bytes, was_cut: bool) -> int | None:
    """How many tokens of `reply` the engine writes after `ids`, None if it writes something else. `was_cut`: the reply
    ended because no more tokens were asked for."""
    at = count = 0
    while count < ANSWER_TOKENS:
        steps = engine.greedy(ids, ANSWER_TOKENS - count, ALTERNATIVES)
        for number, (chosen, *others) in enumerate(steps, 1):
            if was_cut and at == len(reply):
                return count
            # A token without bytes ends the reply, or is a control token that is not shown.
            unshown = not chosen.text and number < len(steps)
            near = [chosen, *(other for other in others if chosen.logprob - other.logprob <= NEAR_TIE)]
            fitting = next((token for token in near if _fits(token.text, reply[at:])), chosen if unshown else None)
            if fitting is None:  # a server replaces or drops what is not a whole character
                return None if _is_text(chosen.text) else count
            ids, at, count = [*ids, fitting.id], at + len(fitting.text), count + 1
            if not fitting.text and at == len(reply):
                return count
            if fitting is not chosen:
                break  # a near tie that the server decided otherwise: continue from there
        else:
            return count
    return count


def _fits(text: bytes, rest: bytes) -> bool:
    return rest.startswith(text) if text else not rest


def _is_text(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
