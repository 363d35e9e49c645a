"""README and docs: generated blocks are current, links lead somewhere, and every command shown exists."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from fine_tuning.common.records import write_jsonl
from fine_tuning.common.settings import read_comments
from tests.project import conversations, new_project
from tests.reference import BLOCK, PAGES, ROOT, blocks, command_names, filled, help_text, run

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in (*PAGES, ROOT / "CONTRIBUTING.md")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def code(page: str, language: str) -> list[str]:
    """The blocks of code in a language, without generated ones."""
    return [body for kind, body in FENCE.findall(BLOCK.sub("", TEXTS[page])) if kind == language]


def typed(text: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell."""
    words = shlex.shlex(text, posix=True, punctuation_chars="|&;()")
    words.whitespace_split = True
    command: list[str] = []
    for word in [*words, "&&"]:
        if set(word) <= set("|&;()"):
            yield command
            command = []
        else:
            command.append(word)


def shown(page: str) -> Iterator[list[str]]:
    """The commands of console and bash blocks, and the pieces of code in sentences that are commands."""
    lines = [line[2:] for body in code(page, "console") for line in body.splitlines() if line.startswith("$ ")]
    for body in code(page, "bash"):
        lines += [line for line in body.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    prose = FENCE.sub("", BLOCK.sub("", TEXTS[page]))
    starts = r"`((?:python -m (?:fine_tuning|benchmarks|tests)|make|dvc|forget|promote|deploy|budget) [^`]+)`"
    for line in [*lines, *re.findall(starts, prose)]:
        yield from (words for words in typed(line.replace("…", "X")) if words)


def check_program(words: list[str]) -> None:
    """A command of `python -m fine_tuning`: its name and options are in its help."""
    name, *rest = words
    assert name in (*command_names(), "COMMAND")
    known = help_text(name) if name != "COMMAND" else ""
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", known))


def check_module(module: str, rest: list[str]) -> None:
    """A script of this repository: it is there and knows the options."""
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert all(word in source for word in rest if word.startswith("--"))


def check_make(targets: list[str]) -> None:
    listed = re.findall(r"^make (\S+)", run("make", "--no-print-directory", "help"), re.MULTILINE)
    servers = {f"remote-{name}" for name in re.findall(r"\w+", (ROOT / "tests/servers.py").read_text())}
    assert {target for target in targets if "=" not in target} <= {*listed, *servers}


def check_dvc(words: list[str]) -> None:
    """DVC's own parser takes the words; parameters and stages are those of this project."""
    from dvc.cli.parser import get_main_parser

    if len(words) <= 2 and words != ["repro"]:  # named in a sentence, without its arguments
        with pytest.raises(SystemExit, match=r"^0$"):
            get_main_parser().parse_args([*words, "--help"])
        return
    arguments = get_main_parser().parse_args(words)
    for setting in getattr(arguments, "set_param", None) or ():
        found = PARAMS
        for key in setting.partition("=")[0].split("."):
            assert key in found, setting
            found = found[key]
    if words[0] == "repro":
        assert set(arguments.targets or ()) <= set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def check_mlflow(words: list[str]) -> None:
    from mlflow.cli import cli

    command = cli.commands[words[0]]
    command = command.commands[words[1]] if hasattr(command, "commands") else command
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args([re.sub(r"\$\w+", "0", word) for word in words[1:]])
    assert (ROOT / arguments.config_file).is_file()


def check_dask(words: list[str]) -> None:
    command = importlib.import_module(f"distributed.cli.dask_{words[0]}").main
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


# Programs whose words are not looked into: they are no part of the requirements, or of the shell.
UNCHECKED = (
    "curl", "docker", "git", "source", "export", "cd", "pre-commit", "grep", "scontrol", "head", "hf", "vllm",
    "llama-server",
)  # fmt: skip


def check(words: list[str]) -> None:
    """Fail where a command or one of its options does not exist."""
    program, *rest = words
    if program == "srun":
        check(rest[1:] if rest[0].startswith("--") else rest)
    elif program == "python" and rest[1] == "fine_tuning":
        check_program(rest[2:])
    elif program == "python" and rest[1].split(".")[0] in ("benchmarks", "tests"):
        check_module(rest[1], rest[2:])
    elif program == "dask":
        check_dask(rest)
    elif program == "python" and rest[1] == "dask":
        check_dask(rest[2:])
    elif program == "python":
        assert rest[:2] == ["-m", "http.server"]
    elif program == "make":
        check_make(rest)
    elif program == "dvc":
        check_dvc(rest)
    elif program == "mlflow":
        check_mlflow(rest)
    elif program in command_names():
        check_program(words)
    elif program == "pip":
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".txt"))
    elif program == "bash":
        check_accelerate(shlex.split(rest[1])[1:])
    else:
        assert program in UNCHECKED


@pytest.mark.parametrize("page", TEXTS)
def test_commands_that_are_shown_exist_and_so_do_their_options(page, capsys):
    for words in shown(page):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page} shows `{' '.join(words)}`: {error!r} {capsys.readouterr().err}")


def test_blocks_of_yaml_and_toml_can_be_read():
    import tomllib

    read = [yaml.safe_load(body) for page in TEXTS for body in code(page, "yaml")]
    read += [tomllib.loads(body) for page in TEXTS for body in code(page, "toml")]
    assert read and all(isinstance(content, dict) for content in read)


def test_every_block_of_code_is_of_a_kind_that_is_checked():
    kinds = {kind for page in TEXTS for kind, _ in FENCE.findall(BLOCK.sub("", TEXTS[page]))}
    assert kinds == {"", "bash", "console", "python", "toml", "yaml"}  # "": drawings of the pipeline and the tree


def test_generated_blocks_are_current():
    """After a run on another machine the metrics differ: then those of the commit count."""
    stale = [name for name in TEXTS if TEXTS[name] != filled(TEXTS[name], blocks())]
    stale = [name for name in stale if TEXTS[name] != filled(TEXTS[name], blocks("HEAD"))]
    assert not stale, f"out of date: {', '.join(stale)}: run `python -m tests.reference`"


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 180
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[page]):
            assert "://" in target or (ROOT / target).exists(), target
        for target, anchor in re.findall(r"\]\(([^)#\s]+)#([^)]+)\)", TEXTS[page]):
            headings = re.findall(r"^#+ (.+)$", TEXTS[target], re.MULTILINE)
            assert anchor in [re.sub(r"[^\w]+", "-", heading.lower()) for heading in headings], anchor


def test_the_tree_in_the_readme_has_the_layers_of_the_library():
    (tree,) = [body for body in code("README.md", "") if body.startswith("Makefile")]
    named = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in (ROOT / "fine_tuning").glob("*/__init__.py"))


def test_the_security_page_names_tests_that_exist():
    found = 0
    for line in TEXTS["docs/security.md"].splitlines():
        file = ""
        for module, name in re.findall(r"`(?:(test_\w+)::)?(test_\w+)`", line):
            file = module or (name if (ROOT / f"tests/{name}.py").is_file() else file)
            if file != name:
                assert f"def {name}(" in (ROOT / f"tests/{file}.py").read_text(), name
                found += 1
    assert found > 60


def test_the_site_is_built_without_a_broken_link_and_reads_without_a_network(tmp_path):
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    run("zensical", "build", "--strict", cwd=tmp_path)
    pages = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= set(pages)
    loaded = r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"' >]+"
    assert not [address for text in pages.values() for address in re.findall(loaded, text)]


def test_the_import_that_is_shown_prints_what_is_shown(tmp_path, tiny_base):
    (block,) = [body for body in code("docs/data.md", "console") if "import kitchen.jsonl" in body]
    said = block.split("\n$ ")[0].splitlines()[1:]
    project = new_project(tmp_path / "project", tiny_base)
    lines = [*(json.dumps(record) for record in conversations()[:2]), "{"]
    (project.folder / "kitchen.jsonl").write_text("\n".join(lines) + "\n")
    printed = project.run("python", "-m", "fine_tuning", "import", "kitchen.jsonl")
    shard = re.compile(r"\d{8}T\d{9}-import-[0-9a-f]+")
    assert shard.sub("SHARD", printed).splitlines() == [shard.sub("SHARD", line) for line in said]


@pytest.mark.end_to_end
def test_the_differences_between_commits_that_are_shown_are_those_of_the_commits():
    (block,) = [body for body in code("docs/first-run.md", "console") if "metrics diff" in body]
    for step in block.removeprefix("$ ").split("\n$ "):
        command, *said = step.splitlines()
        if said:
            printed = run("bash", "-c", command).splitlines()  # DVC orders files by chance
            assert sorted(line.split() for line in printed) == sorted(line.split() for line in said)


@pytest.mark.end_to_end
def test_without_torch_conversations_are_collected_and_models_compared(tmp_path, tiny_base):
    """The distribution in an environment of its own: what is there is what its extras ask for."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python, whetstone = str(environment / "bin/python"), str(environment / "bin/whetstone")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "-q"]
    wanted = [*pip, "--no-compile", "-c", str(ROOT / "requirements.txt"), f"{ROOT}[collect,gateway,verdict]"]
    installed = subprocess.run(wanted, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    project = new_project(tmp_path / "project", tiny_base).folder

    def here(*command: str) -> str:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert here(python, "-P", "-c", "from importlib.util import find_spec; print(find_spec('torch'))") == "None\n"
    assert all(name in here(whetstone, "--help") for name in command_names())
    (logged,) = code("docs/architecture.md", "python")
    here(python, "-P", "-c", logged)
    assert "1 event sealed" in here(whetstone, "seal")
    write_jsonl(project / "kitchen.jsonl", conversations()[:2])
    assert "2 conversations in data/conversations/" in here(whetstone, "import", "kitchen.jsonl")

    for contender, nats, correct in (("base", 60, 10), ("candidate", 40, 12)):
        common = {"contender": contender, "tokens": 20, "correct": correct, "bytes": 80, "turns": []}
        records = [common | {"id": f"c{n}", "cluster": f"c{n}", "nll": nats + n % 7} for n in range(60)]
        write_jsonl(project / f"{contender}.jsonl", records)
    (compared,) = code("docs/verdict.md", "python")
    assert here(python, "-P", "-c", compared).startswith("PROMOTE\n")


def test_a_value_in_braces_is_one_parameter_on_however_many_lines(tmp_path):
    lines = ("a:", "  # Bounds.", "  b: {X: 1,", "    Y: 2}", "  # Last {.", "  c: 3")
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    assert read_comments(tmp_path / "params.yaml") == {"a": "", "a.b": "Bounds.", "a.c": "Last {."}
