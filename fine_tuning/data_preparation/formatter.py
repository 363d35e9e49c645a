"""Training pairs for other trainers: conversations in; ChatML, Alpaca or instruction records out.

The project's own training renders the base model's chat template instead (see tokenizer.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.data_export import to_alpaca, to_chatml, to_instruction, unbroken
from fine_tuning.data_collection.importing.pieces import NotRecognised
from fine_tuning.data_collection.importing.record_formats import recognise
from fine_tuning.data_preparation.selection import TrainOn, read_conversation, select, structure_problem
from fine_tuning.schema.conversation import each_record

FORMATS = ("chatml", "alpaca", "instruction")


class TrainingDataFormatter:
    """Writes one record a conversation, or a part of one between gaps, in one format.

    - `chatml`: {"id", "text": turns between <|im_start|> and <|im_end|>, "messages": the same as a list}
    - `alpaca`: {"id", "instruction", "input", "output"}, "history" and "system" where the conversation has them
    - `instruction`: {"id", "instruction", "response"}, "history" and "system" likewise

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
        """Records of logged exchanges or conversations with `messages`; those without a usable reply give none.

        What stands before a gap, where turns are missing, is a record of its own: no context reaches across.
        """
        write = _WRITERS[self.format]
        pairs = []
        for record in each_record(conversations):
            conversation = read_conversation(record)
            for part in unbroken(conversation) if structure_problem(conversation) is None else ():
                if (selected := select(part, self.train_on)) is not None:
                    pairs.append(write({"id": part["id"], "messages": selected[0]}))
        return pairs

    def validate_format(self, pairs: Any) -> bool:
        """Whether a record, or each of a list of records, is sound in this format; a list without any is not.

        It is sound where the importers read a conversation with a reply from it. A text in ChatML and the messages
        beside it have to say the same.
        """
        if isinstance(pairs, (list, tuple)):
            return bool(pairs) and all(map(self.validate_format, pairs))
        if self.format == "chatml":
            pair = {"text": pairs} if isinstance(pairs, str) else pairs if isinstance(pairs, dict) else {}
            records = [{key: pair[key]} for key in ("text", "messages") if key in pair]
        else:
            records = [pairs] if isinstance(pairs, dict) and _ANSWERS[self.format] in pairs else []
        try:
            found = [recognise(record).messages for record in records]
        except NotRecognised:
            return False
        said = [[(message["role"], message["content"]) for message in messages] for messages in found]
        return bool(said) and said[0] == said[-1] and structure_problem({"messages": found[0]}) is None


# -----------------------------------------------------------------------------
# writing


def _chatml(conversation: dict) -> dict[str, Any]:
    turns = [{"role": m["role"], "content": m["content"]} for m in conversation["messages"]]
    for turn in turns:
        if "<|im_" in turn["content"]:
            # ChatML has no escape: a space in what looks like its marks, so that no turn is forged.
            plain = turn["content"].replace("<|im_start|>", "<|im_start |>")
            turn["content"] = plain.replace("<|im_end|>", "<|im_end |>")
    return to_chatml({"id": conversation["id"], "messages": turns}) | {"messages": turns}


def _alternating(conversation: dict) -> dict:
    """The conversation as questions and answers in turn, system message first; neighbours of a side are one text."""
    messages = conversation["messages"]
    if [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2):
        return conversation
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns: list[dict] = []
    for message in messages:
        role, content = "assistant" if message["role"] == "assistant" else "user", message["content"]
        if message["role"] == "system":
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{content}"}
        else:
            turns.append({"role": role, "content": content})
    if turns[0]["role"] == "assistant":  # a greeting before the first question
        turns.insert(0, {"role": "user", "content": ""})
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return {"id": conversation["id"], "messages": head + turns}


_WRITERS: dict[str, Callable[[dict], dict[str, Any]]] = {
    "chatml": _chatml,
    "alpaca": lambda conversation: to_alpaca(_alternating(conversation)),
    "instruction": lambda conversation: to_instruction(_alternating(conversation)),
}
_ANSWERS = {"alpaca": "output", "instruction": "response"}
