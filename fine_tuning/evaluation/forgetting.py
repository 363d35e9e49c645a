"""What every model should still know: a frozen suite of general questions, each with a right and a wrong answer.

An item counts as known if the model finds the right answer likelier, a byte, than the wrong one; ranking by likelihood
needs no generation and no judge. Bytes, because answers differ in length and models in tokenizers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.data_preparation.tokenizer import encode_conversation
from fine_tuning.errors import UserError
from fine_tuning.evaluation.items import Item, label_runs
from fine_tuning.evaluation.scoring import Likelihood
from fine_tuning.evaluation.statistics import mcnemar
from fine_tuning.records import read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUITE = Path(__file__).with_name("general_items.jsonl")
ANSWERS = ("right", "wrong")
LEVEL = 0.05


def general_items(tokenizer: "PreTrainedTokenizerFast", system_prompt: str | None, max_length: int) -> list[Item]:
    """Two items for each question, one for each answer, as `<id>/right` and `<id>/wrong`."""
    items = []
    for question in read_jsonl(SUITE):
        for answer in ANSWERS:
            messages = [
                {"role": "user", "content": question["prompt"]},
                {"role": "assistant", "content": question[answer]},
            ]
            encoded = encode_conversation(tokenizer, messages, system_prompt, max_length)
            runs = label_runs(encoded.labels)
            name = f"{question['id']}/{answer}"
            items.append(
                Item(
                    name, question["category"], question["id"], messages, encoded.input_ids, encoded.labels, runs,
                    ["imported"], [question[answer]],
                )
            )  # fmt: skip
    return items


def known(items: Sequence[Item], scores: Sequence[Likelihood]) -> dict[str, bool]:
    """{question: whether the right answer is the likelier one}; what is no number is not known."""
    nats = {
        item.id: sum(turn[0] for turn in score.turns) / max(1, len(item.texts[0].encode()))
        for item, score in zip(items, scores, strict=True)
    }
    return {
        item.cluster: nats[f"{item.cluster}/right"] < nats[f"{item.cluster}/wrong"]
        for item in items
        if item.id.endswith("/right")
    }


def knowledge(contender: str, items: Sequence[Item], scores: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """Lines of general.jsonl."""
    categories = {item.cluster: item.source for item in items}
    return [
        {"contender": contender, "question": question, "category": categories[question], "known": right}
        for question, right in known(items, scores).items()
    ]


def forgotten(
    lines: Sequence[dict[str, Any]], goldens: Sequence[str], candidate: str = "candidate"
) -> tuple[dict[str, Any], list[str]]:
    """What the candidate lost against each rival on the same questions, and reasons to hold.

    It is held if it lost more than it gained and chance does not explain it (exact McNemar test), or if it lost a
    single one of the questions `goldens`.

    Raises:
        UserError: there is no such question as one of the goldens.
    """
    known: dict[str, dict[str, bool]] = {}
    for line in lines:
        known.setdefault(line["contender"], {})[line["question"]] = line["known"]
    ours = known.pop(candidate, {})
    if ours and (unknown := [question for question in goldens if question not in ours]):
        raise UserError(f"compare.goldens names {', '.join(unknown)}: choose ids of general_items.jsonl")
    table: dict[str, Any] = {}
    reasons = []
    for rival, theirs in known.items():
        lost = [question for question in theirs if theirs[question] and not ours[question]]
        gained = [question for question in theirs if ours[question] and not theirs[question]]
        p_value = mcnemar(len(lost), len(gained))
        table[rival] = {
            "questions": len(theirs),
            "rival_knows": sum(theirs.values()),
            "candidate_knows": sum(ours.values()),
            "lost": lost,
            "gained": gained,
            "p_value": p_value,
            "goldens": sum(theirs[question] for question in goldens),
        }
        if len(lost) > len(gained) and p_value < LEVEL:
            reasons.append(
                f"forgets: of {len(theirs)} general questions it lost {len(lost)} that the {rival} knows and gained "
                f"{len(gained)} (p = {p_value:.2g})"
            )
        if golden := [question for question in lost if question in goldens]:
            reasons.append(f"lost what must not be lost and the {rival} knows: {', '.join(golden)}")
    return table, reasons


def unguarded(table: dict[str, Any], goldens: Sequence[str]) -> str | None:
    """A word on goldens that none of the rivals knows, so that losing them is impossible."""
    if not table or not goldens or any(row["goldens"] for row in table.values()):
        return None
    return "the goldens guard nothing, no rival knows one of them: choose others in compare.goldens"
