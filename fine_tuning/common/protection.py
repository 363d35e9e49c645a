"""What every entry point does to the checkout first: close it to other users, and repair what a kill left torn.

DVC needs its cache objects readable (0444), and `dvc pull` does not use our umask: the folders around the files
close them. DVC unpickles what lies in its site cache, by default a folder that everybody may write to, who then runs
code as the owner. And DVC rewrites dvc.lock, .dvc files and .dvc/tmp/rwlock in place: after a kill it refuses to run.
"""

import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import yaml

from fine_tuning.common.records import replacing

FOLDERS = ("data", "models", "metrics", "inbox", ".whetstone", "mlartifacts", ".dvc")
SITE_CACHE = ".dvc/tmp/site_cache"
RWLOCK = ".dvc/tmp/rwlock"
REWRITTEN = (RWLOCK, "dvc.lock", "data/conversations.dvc", "models/champion.dvc")
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def protect(checkout: Path | None = None) -> None:
    """Close a checkout to other users and repair files of DVC that a kill tore. Outside a checkout it does nothing.
    What belongs to another user or lies on a read-only file system stays as it is: `verify` reports it."""
    checkout = (checkout or Path.cwd()).resolve()
    if not (checkout / "dvc.yaml").is_file():
        return
    with suppress(OSError):
        for name in FOLDERS[:-1]:  # `dvc init` refuses where there is a .dvc
            (checkout / name).mkdir(mode=0o700, exist_ok=True)
    for path in open_to_others(checkout):
        with suppress(OSError):
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)
    if (checkout / ".dvc").is_dir():
        with suppress(OSError):
            _close_site_cache(checkout)
        _repair(checkout)


def open_to_others(checkout: Path) -> list[Path]:
    """Private folders and databases of a checkout that group or others have any right to."""
    paths = [*(checkout / name for name in FOLDERS), *sorted(checkout.glob("mlflow.db*"))]
    return [path for path in paths if path.exists() and path.stat().st_mode & OTHERS]


def _close_site_cache(checkout: Path) -> None:
    """Name a site cache in the local configuration, unless the user has; that of a copy's original is replaced."""
    from configobj import ConfigObj  # what DVC reads and writes its configuration with

    local, place = checkout / ".dvc/config.local", checkout / SITE_CACHE
    config = ConfigObj(str(local), encoding="utf-8")
    known = config.setdefault("core", {}).get("site_cache_dir")
    if known != str(place) and (known is None or known.endswith(f"/{SITE_CACHE}")):
        config["core"]["site_cache_dir"] = str(place)
        with replacing(local) as file:
            config.write(file)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)


def _repair(checkout: Path) -> None:
    """Remove a torn rwlock; put a torn dvc.lock or .dvc file back as it was committed, and keep the torn one."""
    paths = [checkout / name for name in REWRITTEN]
    if not any(map(_is_torn, paths)):
        return
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # DVC writes all of them under this lock: what looks torn may be half written, and is whole when it is free.
    with suppress(DvcException), Repo(str(checkout)) as repo, repo.lock:
        for path in filter(_is_torn, paths):
            name, kept = path.relative_to(checkout).as_posix(), checkout / f".dvc/tmp/{path.name}.torn"
            committed = subprocess.run(["git", "show", f"HEAD:./{name}"], cwd=checkout, capture_output=True)
            os.replace(path, kept)
            if committed.returncode == 0:
                with replacing(path) as file:
                    file.write(committed.stdout)
            state = "as it was committed; `dvc repro` brings the rest back" if path.exists() else "gone"
            print(f"note: {name} was torn by a kill and is {state} (kept: {kept})", file=sys.stderr)


def _is_torn(path: Path) -> bool:
    """Whether only the beginning of a file was written. DVC ends its files with a newline, and with a value."""
    try:
        data = path.read_bytes()
        if path.name == "rwlock":
            return not _is_rwlock(json.loads(data))
        if b"<<<<<<<" in data:  # a merge that its user has to finish
            return False
        found = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        whole = data.endswith(b"\n") and not data.endswith(b":\n")
        return not whole or ("outs" if path.suffix == ".dvc" else "stages") not in found
    except OSError:
        return False
    except (ValueError, TypeError, yaml.YAMLError):
        return True


def _is_rwlock(content: object) -> bool:
    """Whether DVC takes it for a rwlock; most are empty, and importing DVC takes a fifth of a second."""
    if content in ({}, {"read": {}, "write": {}}):
        return True
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        return bool(SCHEMA(content))
    except Invalid:
        return False
