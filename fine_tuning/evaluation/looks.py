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
from fine_tuning.evaluation.records.settings import ADAPTER

LOOKS = Path("data/looks.jsonl")
MOST = 20  # the look at one test split that is held, and all after it


def record_looks(comparisons: Iterable[dict[str, Any]], ledger: Path = LOOKS) -> list[tuple[str, str]]:
    """Add to the ledger what it lacks; returns its (hash of the test split, hash of the adapter) in order.

    `comparisons` are contents of metrics/comparison.json, or its two hashes; champions are passed over. Raises
    UserError if the ledger is damaged.
    """
    known = []
    for number, line in read_lines(ledger) if ledger.is_file() else ():
        try:
            known.append(_pair(read_line(line)))
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"line {number} of {ledger} is damaged: `git checkout {LOOKS}`") from None
    seen = [_pair(found) for found in comparisons if "champion" not in found]
    if new := [pair for pair in dict.fromkeys(seen) if all(pair) and pair not in known]:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with open(ledger, "ab") as file:
            file.writelines(dump_line({"eval_set_sha256": suite, "adapter_sha256": name}) for suite, name in new)
    return list(dict.fromkeys([*known, *new]))


def looked_at(comparison: dict[str, Any], ledger: Path = LOOKS) -> dict[str, Any]:
    """A comparison as it may be shown: recorded, and held where its test split has been looked at too often. Raises
    UserError if the ledger is damaged."""
    suite, adapter = _pair(comparison)
    seen = [other for of, other in record_looks([comparison], ledger) if of == suite]
    number = seen.index(adapter) + 1 if "champion" not in comparison and adapter in seen else 0
    if number < MOST:
        return comparison
    reason = f"look {number} at one test split, and {MOST} are too many: import or collect fresh conversations"
    held = {"verdict": "HOLD"} if comparison["verdict"] == "PROMOTE" else {}
    return comparison | held | {"reasons": [reason, *comparison["reasons"]]}


def _pair(found: dict[str, Any]) -> tuple[str, str]:
    """Hashes of test split and adapter, "" for none. Another kind of version of one adapter is another candidate."""
    adapter, kind = str(found.get("adapter_sha256") or ""), found.get("kind", {}).get("name", ADAPTER)
    return str(found.get("eval_set_sha256") or ""), adapter if kind == ADAPTER else f"{adapter} {kind}"
