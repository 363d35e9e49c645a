"""The ledger of looks: which candidates were seen on which test split. One JSON object a pair in data/looks.jsonl.

Each look at the primary metric is tested at a level that twenty of them can afford together (LOOK_LEVEL). The file is
in git with union merge and is written by the commands that show a verdict, never by a stage: so a comparison is the
same in every clone, and the twentieth look is held here and not in it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import dump_line, read_line, read_lines

LOOKS = Path("data/looks.jsonl")
MOST = 20  # the look at one test split that is held, and all after it


def record_looks(comparisons: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Add to the ledger what it lacks; returns its (hash of the test split, hash of the adapter) in order.

    Args:
        comparisons: `eval_set_sha256` and `adapter_sha256` of each; others, and champions, are passed over.

    Raises:
        UserError: the ledger is damaged.
    """
    known = dict.fromkeys(_read())
    seen = [(c["eval_set_sha256"], c["adapter_sha256"]) for c in comparisons if _is_a_look(c)]
    if new := [pair for pair in dict.fromkeys(seen) if pair not in known]:
        LOOKS.parent.mkdir(parents=True, exist_ok=True)
        with open(LOOKS, "ab") as file:
            file.writelines(dump_line({"suite": suite, "adapter": adapter}) for suite, adapter in new)
    return [*known, *new]


def looked_at(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison as it may be shown: recorded, and held where its test split has been looked at too often.

    Raises:
        UserError: the ledger is damaged.
    """
    looks = record_looks([comparison])
    if not _is_a_look(comparison):
        return comparison
    suite, adapter = comparison["eval_set_sha256"], comparison["adapter_sha256"]
    number = [other for of, other in looks if of == suite].index(adapter) + 1
    if number < MOST:
        return comparison
    reason = f"look {number} at one test split, and {MOST} are too many: import or collect fresh conversations"
    held = {"verdict": "HOLD"} if comparison["verdict"] == "PROMOTE" else {}
    return comparison | held | {"reasons": [reason, *comparison["reasons"]]}


def _is_a_look(comparison: dict[str, Any]) -> bool:
    pair = comparison.get("eval_set_sha256"), comparison.get("adapter_sha256")
    return "champion" not in comparison and all(isinstance(name, str) for name in pair)


def _read() -> list[tuple[str, str]]:
    found = []
    for number, line in read_lines(LOOKS) if LOOKS.is_file() else ():
        try:
            record = read_line(line)
            found.append((str(record["suite"]), str(record["adapter"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"line {number} of {LOOKS} is damaged: `git checkout {LOOKS}`") from None
    return found
