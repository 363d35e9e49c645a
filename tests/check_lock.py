"""Is HEAD's dvc.lock what running gives? `python -m tests.check_lock` compares, after `dvc repro` in a clean clone.

Commands, parameters and dependencies that no stage makes have to be equal. So have outputs, metrics among them, where
vector instructions, cores and torch are those of metrics/made_on.json: other ones add numbers in another order.
`python -m tests.check_lock --made-here` writes that file: run it where `dvc repro` or `promote` ran, and commit both.
"""

import argparse
import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fine_tuning.common.dvc_files import LOCK, md5_file, parse_lock, read_lock, show_file
from fine_tuning.common.parallel import cores
from fine_tuning.common.records import write_json

MADE_ON = Path("metrics/made_on.json")
VECTORS = re.compile(r"(avx|fma|sse|ssse|amx|bmi|f16c|neon|asimd|sve|bf16|i8mm)\w*")
Stages = dict[str, dict[str, Any]]


def this_machine() -> dict[str, Any]:
    """What the digits of a result depend on."""
    flags, vendor = set(), platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in ("flags", "Features"):
            flags |= {flag for flag in value.split() if VECTORS.fullmatch(flag)}
        elif name == "vendor_id":
            vendor = value
    return {"cpu": vendor, "cpu_flags": sorted(flags), "cores": cores(), "torch": metadata.version("torch")}


def differences(committed: Stages, found: Stages, outputs: bool) -> Iterator[str]:
    """Entries of two locks that are not equal, in words; what stages make only with `outputs`."""
    made = {out["path"] for lock in (committed, found) for stage in lock.values() for out in stage.get("outs", [])}
    for name in sorted(committed.keys() | found.keys()):
        if name not in committed or name not in found:
            yield f"{name}: the stage is in one of them only"
            continue
        before, now = committed[name], found[name]
        for part in ("cmd", "params"):
            if before.get(part) != now.get(part):
                yield f"{name}: {part}"
        for part in ("deps", "outs"):
            old, new = ({entry["path"]: entry.get("md5") for entry in lock.get(part, [])} for lock in (before, now))
            for path in sorted(old.keys() | new.keys()):
                by_stage = any(path == out or path.startswith(f"{out}/") for out in made)
                if (outputs or not by_stage) and old.get(path) != new.get(path):
                    yield f"{name}: {part} {path}"


def uncommitted_outs(committed: Stages, checkout: Path, commit: str) -> Iterator[str]:
    """Outs that a commit holds with other bytes than its dvc.lock names."""
    for name, stage in committed.items():
        for out in stage.get("outs", []):
            data = show_file(checkout, commit, out["path"])
            if data is not None and hashlib.md5(data).hexdigest() != out.get("md5"):
                yield f"{name}: outs {out['path']} as committed"


def check(checkout: Path) -> list[str]:
    """What is wrong with HEAD's dvc.lock, after `dvc repro` in this checkout; prints what was compared."""
    data, noted = (show_file(checkout, "HEAD", str(path)) for path in (LOCK, MADE_ON))
    if data is None:
        return [f"HEAD holds no {LOCK}"]
    committed, made_on = parse_lock(data), json.loads(noted or b"{}")
    if made_on.pop("dvc_lock_md5", None) != hashlib.md5(data).hexdigest():
        return [f"{MADE_ON} is about another dvc.lock: `python -m tests.check_lock --made-here` where it was made"]
    here = this_machine()
    other = [name for name in here if here[name] != made_on.get(name)]
    print(f"check_lock: outputs are {'not compared: other ' + ', '.join(other) if other else 'compared'}")
    return [
        *differences(committed, read_lock(checkout / LOCK), outputs=not other),
        *uncommitted_outs(committed, checkout, "HEAD"),
    ]


def main() -> int:
    """The command line; the exit status is 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--made-here", action="store_true", help=f"write {MADE_ON} for the dvc.lock of this folder")
    if parser.parse_args().made_here:
        if subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet"]).returncode:
            print("check_lock: `dvc status` says that something has not run: `dvc repro` first", file=sys.stderr)
            return 1
        write_json(MADE_ON, this_machine() | {"dvc_lock_md5": md5_file(LOCK)})
        return 0
    wrong = check(Path.cwd())
    for line in wrong:
        print(f"check_lock: {line}", file=sys.stderr)
    if not wrong:
        print("check_lock: dvc.lock is what running gives")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
