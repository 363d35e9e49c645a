"""Prepared rows that cannot be trained on are refused before the model is loaded."""

from collections.abc import Sequence
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.schema.chat_format import NOT_TRAINED, render
from fine_tuning.schema.prepared import PreparedRow, count_labels


def check_rows(rows: Sequence[PreparedRow], split: str) -> None:
    """Refuse rows that train no token, or labels that are not the row's own tokens. Raises UserError if the split is
    empty, ids and labels do not belong together, or no token is trained."""
    if not rows:
        raise UserError(f"the {split} split is empty: collect more conversations or change prepare's fractions")
    for row in rows:
        if len(row.input_ids) != len(row.labels):
            raise UserError(f"{split}: {row.id} has more ids than labels: run `dvc repro -f -s prepare && dvc repro`")
        if any(label not in (NOT_TRAINED, token) for token, label in zip(row.input_ids, row.labels, strict=True)):
            raise UserError(f"{split}: {row.id} has a foreign label: run `dvc repro -f -s prepare && dvc repro`")
    if not count_labels(rows):
        raise UserError(f"no assistant token would be trained in the {split} split: check prepare.train_on")


def check_only_assistants_train(rows: Sequence[PreparedRow], tokenizer: Any) -> None:
    """Refuse rows in which a trained run of tokens follows anything but the opening of an assistant turn, such as
    `<|im_start|>assistant\\n`, as the tokenizer's chat template writes it. Raises UserError if a user's or the system's
    token would be trained; names the conversation."""
    opener = reply_opener(tokenizer)
    longest = len(tokenizer.encode(opener, add_special_tokens=False)) + 2
    for row in rows:
        for start in _trained_starts(row.labels):
            before = tokenizer.decode(row.input_ids[max(0, start - longest) : start])
            if not before.endswith(opener):
                raise UserError(
                    f"{row.id} would train what is not the assistant's: `dvc repro -f -s prepare && dvc repro`"
                )


def reply_opener(tokenizer: Any) -> str:
    """What the chat template writes right before a reply."""
    user = [{"role": "user", "content": "?"}]
    prompt = render(tokenizer, user, None, add_generation_prompt=True).text
    return prompt.removeprefix(render(tokenizer, user, None).text)


def _trained_starts(labels: Sequence[int]) -> list[int]:
    trained = [label != NOT_TRAINED for label in labels]
    return [i for i, now in enumerate(trained) if now and (i == 0 or not trained[i - 1])]
