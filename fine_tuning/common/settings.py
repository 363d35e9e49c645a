"""Parameters: one section of params.yaml, checked against a typed model where it is loaded."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import replacing

# Parameters that earlier versions had under another name.
RENAMED = {"evaluate.rivals": "evaluate.prompting_baselines"}
SECTIONS = (
    "base", "chat", "intake", "clean", "export", "prepare", "train", "package", "evaluate", "compare", "app", "gateway",
    "serve", "deploy", "rounds",
)  # fmt: skip


class Settings(BaseModel):
    """A section of params.yaml. Unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


def read_params(section: str, model: type[SettingsT], path: str | Path = "params.yaml") -> SettingsT:
    """Load `section` of the YAML file at `path` as a `model`. Raises UserError if the file, the section or a parameter
    is missing, unknown or of the wrong type, or there is a section that nothing reads; names it."""
    return check_params({section: model}, path)[section]


def check_params(models: Mapping[str, type[SettingsT]], path: str | Path = "params.yaml") -> dict[str, SettingsT]:
    """Load sections of the YAML file at `path`, each as its model; its errors are those of `read_params`."""
    found, problems = load_params(models, path)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return found


def load_params(models: Mapping[str, type[SettingsT]], path: str | Path) -> tuple[dict[str, SettingsT], list[str]]:
    """(the sections that can be loaded, what is wrong with the others) of the YAML file at `path`. Raises UserError if
    there is no such file, or it is not plain YAML."""
    try:
        document = _parsed(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it with `git checkout {path}`") from None
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not plain YAML{where}: correct it, or `git checkout {path}`") from None
    sections = document if isinstance(document, dict) else {}
    missing, problems = [section for section in models if section not in sections], []
    for name in sections:
        if name not in (*SECTIONS, *models) and not _has_a_stage(str(name), Path(path).with_name("dvc.yaml")):
            close = get_close_matches(str(name), SECTIONS, 1)
            if close or not missing:  # what is missing may be what is misspelt
                known = ", or ".join(close or SECTIONS)
                problems.append(f"unknown section {name!r}: rename it to {known}, or take it out")
    problems += [f"the section {name!r} is missing: restore it with `git checkout {path}`" for name in missing]
    found = {}
    for section in (section for section in models if section in sections):
        try:
            found[section] = models[section].model_validate(sections[section])
        except ValidationError as error:
            problems += _problems(section, error)
    return found, problems


@lru_cache(maxsize=4)
def _parsed(text: bytes) -> Any:
    """The document, not to be changed: a stage reads several sections, and the parser takes 0.1 s for params.yaml."""
    # As DVC reads and rewrites it: YAML 1.2, where off and no are words. PyYAML makes booleans of them.
    return YAML(typ="safe", pure=True).load(text)


def _has_a_stage(section: str, pipeline: Path) -> bool:
    """Whether a stage that somebody added to dvc.yaml reads a section."""
    stages = _parsed(pipeline.read_bytes()).get("stages", {}) if pipeline.is_file() else {}
    return any(section == str(name).partition(".")[0] for s in stages.values() for name in s.get("params", ()))


def write_param(section: str, name: str, value: int | str | None, path: str | Path = "params.yaml") -> None:
    """Set one parameter, which is there, of the YAML file at `path`; not a byte of comments and all else changes.
    Raises UserError if it is written in a form that this cannot change, such as a name in quotes."""
    text = Path(path).read_bytes().decode()
    number, _ = YAML().load(text)[section].lc.key(name)
    lines = text.splitlines(keepends=True)
    shown = "null" if value is None else repr(value)
    known = rf"(\b{name}:[ \t]+)(?:null|~|'?[0-9a-f.]+'?)(?![^\s,}}])"
    lines[number], found = re.subn(known, rf"\g<1>{shown}", lines[number], count=1)
    if not found:
        raise UserError(f"{section}.{name} in {path} is in a form that is not changed here: set it to {shown} by hand")
    with replacing(path) as file:
        file.write("".join(lines).encode())


def read_comments(path: str | Path = "params.yaml") -> dict[str, str]:
    """{"train.lora.rank": the comment above it}, in the order of the YAML file at `path`, "" where there is none."""
    comments: dict[str, str] = {}
    above: list[str] = []
    place: list[str] = []
    open_braces = 0  # a mapping in braces is one value, on however many lines
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if match := re.match(r" *# ?(.*)", line):
            above.append(match[1])
            continue
        continued, open_braces = open_braces, open_braces + line.count("{") - line.count("}")
        if continued:
            continue
        if match := re.match(r"( *)([A-Za-z_0-9]+):", line):
            place = [*place[: len(match[1]) // 2], match[2]]
            comments[".".join(place)] = " ".join(above)
            above = []
        elif not line.strip():
            above = []
    return comments


def parse_settings(section: str, values: object, model: type[SettingsT], path: str | Path) -> SettingsT:
    """Check the mapping `values` against `model`; `section` and `path` only name it in the error."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_problems(section, error))}") from None


def _problems(section: str, error: ValidationError) -> list[str]:
    found: dict[str, list[Any]] = {}  # where one of several forms would do, pydantic has a problem with each
    for problem in error.errors(include_url=False):
        found.setdefault(".".join(str(part) for part in (section, *_place(problem))), []).append(problem)
    renamed = {RENAMED[name] for name in found if name in RENAMED}
    return [
        _in_words(name, problems)
        for name, problems in found.items()
        if not (name in renamed and problems[0]["type"] == "missing")
    ]


def _in_words(name: str, problems: Sequence[Any]) -> str:
    kind, given = problems[0]["type"], problems[0]["input"]
    if name in RENAMED:
        return f"parameter {name} is called {RENAMED[name]} now: rename it"
    if kind == "extra_forbidden":
        return f"unknown parameter {name}: check its spelling"
    if kind == "missing":
        return f"parameter {name} is missing: add it, as docs/reference.md has it"
    shown = repr(given) if not given or isinstance(given, (str, int, float)) else type(given).__name__
    if name.endswith("token"):
        shown = "(hidden)"
    elif "://" in shown:  # no password
        shown = re.sub(r"[?#].*(?=')", "?...", re.sub("//.*@", "//...@", shown))
    return f"parameter {name} = {shown} should be {', or '.join(map(_expected, problems))}"


def _expected(problem: Any) -> str:
    """What a value should be, in words that follow "should be"."""
    if problem["type"].startswith("date_"):
        return "a date such as 2026-01-31"
    if problem["type"] == "too_short":
        return f"a list of at least {problem['ctx']['min_length']}"
    return str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


def _place(problem: Any) -> list[int | str]:
    """Where the value stands, without the form that it was tried as, such as `list[str]`."""
    return [part for part in problem["loc"] if "[" not in str(part)]
