"""Training pairs for other trainers: conversations in; ChatML, Alpaca or instruction records out.

The project's own training renders the base model's chat template instead (see tokenizer.py).
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fine_tuning.data_preparation.selection import TrainOn, read_conversation, select, structure_problem
from fine_tuning.data_preparation.tokenizer import ROLES
from fine_tuning.errors import UserError

FORMATS = ("chatml", "alpaca", "instruction")

_CHATML_TURN = re.compile(r"<\|im_start\|>([a-z]+)\n(.*?)<\|im_end\|>(?:\n|\Z)", re.DOTALL)


class TrainingDataFormatter:
    """Writes one record a conversation in one format.

    - `chatml`: {"text": turns between <|im_start|> and <|im_end|>, "messages": the same as a list}
    - `alpaca`: {"instruction", "input", "output"} with "history" and "system" where the conversation has them
    - `instruction`: {"instruction", "response"} with "history" and "system" likewise

    The last trained reply is the output; earlier exchanges are `history`, pairs of question and answer.

    Args:
        format: one of FORMATS.
        train_on: which replies may be an output, see `selection.select`.

    Raises:
        UserError: the format is unknown.
    """

    def __init__(self, format: str = "chatml", train_on: TrainOn = "all") -> None:
        if format not in FORMATS:
            raise UserError(f"unknown training format {format!r}: choose one of {', '.join(FORMATS)}")
        self.format = format
        self.train_on = train_on

    def create_training_pairs(self, conversations: Iterable[dict]) -> list[dict[str, Any]]:
        """Records of logged exchanges or conversations with `messages`; those without a usable reply give none."""
        write = {"chatml": _chatml, "alpaca": _alpaca, "instruction": _instruction}[self.format]
        pairs = []
        for record in conversations:
            conversation = read_conversation(record)
            if structure_problem(conversation) is None:
                selected = select(conversation, self.train_on)
                if selected is not None:
                    pairs.append(write(selected[0]))
        return pairs

    def validate_format(self, pairs: Any) -> bool:
        """Whether a record, or each of a list of records, is sound in this format; a list without any is not."""
        if isinstance(pairs, (list, tuple)):
            return bool(pairs) and not any(self.problem(pair) for pair in pairs)
        return self.problem(pairs) is None

    def problem(self, pair: Any) -> str | None:
        """What is wrong with a record, in a few words and without its content; None for a sound one."""
        if self.format == "chatml" and isinstance(pair, str):
            pair = {"text": pair}
        if not isinstance(pair, dict):
            return "not a record"
        return {"chatml": _chatml_problem, "alpaca": _alpaca_problem, "instruction": _instruction_problem}[self.format](
            pair
        )


# -----------------------------------------------------------------------------
# writing


def _chatml(messages: Sequence[dict]) -> dict[str, Any]:
    turns = [{"role": m["role"], "content": _plain(m["content"])} for m in messages]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return {"text": text, "messages": turns}


def _plain(content: str) -> str:
    """ChatML text has no escape: what looks like its marks is written with a space, so that no turn is forged."""
    if "<|im_" in content:
        return content.replace("<|im_start|>", "<|im_start |>").replace("<|im_end|>", "<|im_end |>")
    return content


def _alpaca(messages: Sequence[dict]) -> dict[str, Any]:
    question, answer, context = _exchange(messages)
    return {"instruction": question, "input": "", "output": answer, **context}


def _instruction(messages: Sequence[dict]) -> dict[str, Any]:
    question, answer, context = _exchange(messages)
    return {"instruction": question, "response": answer, **context}


def _exchange(messages: Sequence[dict]) -> tuple[str, str, dict[str, Any]]:
    """(last question, its answer, {"system"?, "history"?}); neighbours of the same side are one text."""
    if len(messages) == 2:  # the common case, a question and its answer
        return messages[0]["content"], messages[1]["content"], {}
    system: list[str] = []
    sides: list[tuple[bool, str]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            system.append(content)
            continue
        answers = message["role"] == "assistant"
        if sides and sides[-1][0] == answers:
            sides[-1] = (answers, f"{sides[-1][1]}\n\n{content}")
        else:
            sides.append((answers, content))
    if sides[0][0]:  # a greeting before the first question
        sides.insert(0, (False, ""))
    pairs = [[sides[index][1], sides[index + 1][1]] for index in range(0, len(sides), 2)]
    context: dict[str, Any] = {}
    if system:
        context["system"] = "\n\n".join(system)
    if len(pairs) > 1:
        context["history"] = pairs[:-1]
    return pairs[-1][0], pairs[-1][1], context


# -----------------------------------------------------------------------------
# validation


def _chatml_problem(pair: dict) -> str | None:
    turns = pair.get("messages")
    if "text" in pair:
        text = pair["text"]
        if not isinstance(text, str):
            return "text is not a string"
        found = [{"role": match[1], "content": match[2]} for match in _CHATML_TURN.finditer(text)]
        if _CHATML_TURN.sub("", text).strip() or any("<|im_start|>" in turn["content"] for turn in found):
            return "text outside of <|im_start|> and <|im_end|>"
        if turns is not None and turns != found:
            return "text and messages differ"
        turns = found
    if not isinstance(turns, list) or not turns:
        return "no turns"
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            return "a turn without a known role and a content"
    problem = structure_problem({"messages": turns})
    return {"no_reply": "no assistant turn after a user turn", "malformed": "an empty turn"}.get(problem or "")


def _alpaca_problem(pair: dict) -> str | None:
    if not isinstance(pair.get("input", ""), str):
        return "input is not a string"
    return _pair_problem(pair, "instruction", "output")


def _instruction_problem(pair: dict) -> str | None:
    return _pair_problem(pair, "instruction", "response")


def _pair_problem(pair: dict, asked: str, answered: str) -> str | None:
    for name in (asked, answered):
        if not isinstance(pair.get(name), str) or not pair[name].strip():
            return f"{name} is missing or empty"
    if not isinstance(pair.get("system", ""), str):
        return "system is not a string"
    history = pair.get("history", [])
    if not isinstance(history, list) or any(
        not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(side, str) for side in turn)
        for turn in history
    ):
        return "history is not a list of pairs"
    return None
