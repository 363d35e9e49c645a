"""Parameters: one section of params.yaml, checked against a typed model where it is loaded."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
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

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def read_params(section: str, model: type[SettingsT], path: str | Path = "params.yaml") -> SettingsT:
    """Load `section` of the YAML file at `path` as a `model`.

    Raises:
        UserError: the file, the section or a parameter is missing, unknown or of the wrong type, or there is a section
            that nothing reads; names it.
    """
    return check_params({section: model}, path)[section]


def check_params(models: Mapping[str, type[SettingsT]], path: str | Path = "params.yaml") -> dict[str, SettingsT]:
    """Load the sections of the YAML file at `path`, each as its model; errors are those of `read_params`."""
    try:
        # As DVC reads and rewrites it: YAML 1.2, where off and no are words. PyYAML makes booleans of them.
        document = YAML(typ="safe", pure=True).load(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it with `git checkout {path}`") from None
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not plain YAML{where}: correct it, or `git checkout {path}`") from None
    found = document if isinstance(document, dict) else {}
    missing = [section for section in models if section not in found]
    for name in found:
        if name not in (*SECTIONS, *models) and not _has_a_stage(str(name), Path(path).with_name("dvc.yaml")):
            close = get_close_matches(str(name), SECTIONS, 1)
            if close or not missing:  # what is missing may be what is misspelt
                known = ", or ".join(close or SECTIONS)
                raise UserError(f"{path}: unknown section {name!r}: rename it to {known}, or take it out")
    if missing:
        raise UserError(f"{path}: the section {missing[0]!r} is missing: restore it with `git checkout {path}`")
    return {section: parse_settings(section, found[section], model, path) for section, model in models.items()}


def _has_a_stage(section: str, pipeline: Path) -> bool:
    """Whether a stage that somebody added to dvc.yaml reads a section."""
    stages = YAML(typ="safe", pure=True).load(pipeline.read_bytes()).get("stages", {}) if pipeline.is_file() else {}
    return any(section == str(name).partition(".")[0] for s in stages.values() for name in s.get("params", ()))


def write_param(section: str, name: str, value: int | str | None, path: str | Path = "params.yaml") -> None:
    """Set one parameter, which is there, of the YAML file at `path`; not a byte of comments and all else changes.

    Raises:
        UserError: it is written in a form that this cannot change, such as a name in quotes.
    """
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
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if match := re.match(r" *# ?(.*)", line):
            above.append(match[1])
        elif match := re.match(r"( *)([A-Za-z_0-9]+):", line):
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
        raise UserError(f"{path}: {_first_problem(section, error)}") from None


def _first_problem(section: str, error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    for problem in problems:
        if new := RENAMED.get(_name(section, problem)):
            return f"parameter {_name(section, problem)} is called {new} now: rename it"
    problem, place, name = problems[0], _place(problems[0]), _name(section, problems[0])
    if problem["type"] == "extra_forbidden":
        return f"unknown parameter {name}: check its spelling"
    if problem["type"] == "missing":
        return f"parameter {name} is missing: restore it from git"
    given = problem["input"]
    scalar = not given or isinstance(given, (str, int, float))
    shown = repr(given) if scalar else type(given).__name__
    # Where one of several forms would do, pydantic has a problem with each.
    reasons = [_expected(other) for other in problems if _place(other) == place]
    return f"parameter {name} = {shown} should be {', or '.join(reasons)}"


def _expected(problem: Any) -> str:
    """What a value should be, in words that follow "should be"."""
    if problem["type"].startswith("date_"):
        return "a date such as 2026-01-31"
    if problem["type"] == "too_short":
        return f"a list of at least {problem['ctx']['min_length']}"
    return str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


def _name(section: str, problem: Any) -> str:
    return ".".join(str(part) for part in (section, *_place(problem)))


def _place(problem: Any) -> list[int | str]:
    """Where the value stands, without the form that it was tried as, such as `list[str]`."""
    return [part for part in problem["loc"] if "[" not in str(part)]
