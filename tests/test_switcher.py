"""Deploy, switch, roll back and list as a person types them, on two servers."""

import json
from pathlib import Path
from typing import Literal

import pytest
import yaml

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import host_key
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.ollama_client import OllamaClient
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.model_management.model_switcher import ModelSwitcher
from fine_tuning.schema.chat_format import load_tokenizer
from tests.fake_ollama import FakeOllama, real_host, silent_host
from tests.registered import here, sh

REAL = real_host()


@pytest.fixture(scope="module")
def count_tokens(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    return lambda prompt: len(tokenizer(prompt, add_special_tokens=False).input_ids)


class RealOllama:
    """The server that OLLAMA_HOST names, asked by the tests as the fake one is."""

    def __init__(self) -> None:
        self.client = OllamaClient(REAL, timeout=10.0)
        self.host = self.client.host

    def digest(self, name: str) -> str | None:
        return self.client.digests().get(name)


@pytest.fixture
def fake(count_tokens, promoted, monkeypatch):
    """An empty fake server that OLLAMA_HOST names; the current folder is a project with versions 1 and 2."""
    with FakeOllama(count_tokens=count_tokens) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.host)
        yield server


@pytest.fixture(params=["fake", "real"] if REAL else ["fake"])
def ollama(request, monkeypatch):
    """The fake server, and the real one where it answers and has no model of this project's name."""
    if request.param == "fake":
        yield request.getfixturevalue("fake")
        return
    server = RealOllama()
    if any(name.startswith("trial:") for name in server.client.digests()):
        pytest.skip(f"{server.host} has a model of its own that is called trial")
    request.getfixturevalue("promoted")
    monkeypatch.setenv("OLLAMA_HOST", server.host)
    yield server
    for tag in ("1", "2", "live", "1-trial", "2-trial"):
        server.client.delete(f"trial:{tag}")


def deploy_both(server):
    """Both versions are deployed, the second is live."""
    here("deploy", "1")
    here("deploy")
    return server


@pytest.fixture
def twice(ollama):
    return deploy_both(ollama)


@pytest.fixture
def fake_twice(fake):
    return deploy_both(fake)


def last_line(capsys) -> str:
    return capsys.readouterr().out.rstrip("\n").split("\n")[-1]


def test_switch_rollback_and_list_agree_on_what_is_live(twice, capsys):
    assert twice.digest("trial:live") == twice.digest("trial:2") != twice.digest("trial:1")
    here("list")
    assert f"{twice.host}: trial:live is version 2 since " in last_line(capsys)

    here("rollback")
    assert last_line(capsys) == f"{twice.host}: trial:live is version 1 again (before: version 2)"
    assert twice.digest("trial:live") == twice.digest("trial:1")

    here("switch", "v2")
    assert last_line(capsys) == f"{twice.host}: trial:live is version 2 (before: version 1)"
    assert twice.digest("trial:live") == twice.digest("trial:2")

    here("list", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert [version["version"] for version in shown["versions"]] == [1, 2]
    assert shown["versions"][1]["aliases"] == ["champion"]
    assert shown["hosts"][twice.host]["version"] == 2 and shown["hosts"][twice.host]["since"]


def test_an_older_version_is_deployed_from_dvcs_cache(fake_twice):
    for name in list(fake_twice.manifests):
        del fake_twice.manifests[name]
    fake_twice.blobs.clear()
    here("deploy", "trial:1")
    assert fake_twice.digest("trial:live") == fake_twice.digest("trial:1")
    version = open_registry("trial").version(1)
    weights = next(layer for layer in fake_twice.manifests["trial:1"].layers if layer["mediaType"].endswith("model"))
    assert weights["digest"] == f"sha256:{version.tags['gguf_sha256']}"


def lose(*versions: int) -> None:
    """Take the GGUFs of these versions out of DVC's cache."""
    for number in versions:
        md5 = open_registry("trial").version(number).tags["gguf_md5"]
        (Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]).unlink()


def test_a_version_whose_gguf_is_nowhere_says_so_in_one_line(twice):
    lose(1)
    with pytest.raises(UserError, match="GGUF of version 1 is neither here nor in DVC's remote: `dvc push`"):
        here("deploy", "1")


def test_a_version_whose_gguf_only_the_remote_has_is_fetched(ollama, promoted, tmp_path):
    sh(promoted, f"dvc remote add -q -d store {tmp_path / 'remote'}")
    sh(promoted, "git checkout -q HEAD~2 -- models/champion.dvc")
    sh(promoted, "dvc push -q models/champion.dvc")
    sh(promoted, "git checkout -q HEAD -- models/champion.dvc")
    lose(1)
    here("deploy", "1")
    assert ollama.digest("trial:live") == ollama.digest("trial:1") is not None


def test_a_request_that_somebody_changed_in_the_registry_is_not_deployed(fake, promoted):
    create = Path(open_registry("trial").version(2).artifacts.removeprefix("file://")) / "package/create.json"
    kept = create.read_bytes()
    try:
        create.write_bytes(kept.replace(b"im_end", b"im_END"))
        with pytest.raises(UserError, match="version 2 is damaged: `python -m fine_tuning verify`"):
            here("deploy")
    finally:
        create.write_bytes(kept)
    assert not fake.manifests


@pytest.fixture
def clone(fake, promoted, tmp_path, monkeypatch):
    """A clone elsewhere: what git and the DVC remote hold, and no registry."""
    sh(promoted, f"dvc remote add -q -d store {tmp_path / 'remote'}")
    sh(promoted, "dvc push -q models/champion.dvc")
    sh(promoted, "git commit -qam Remote")
    sh(tmp_path, f"git clone -q {promoted} clone")
    monkeypatch.chdir(tmp_path / "clone")
    return tmp_path / "clone"


def test_a_clone_without_the_registry_deploys_the_champion(fake, clone, capsys):
    with pytest.raises(UserError, match=r"champion's files are not here: `dvc pull models/champion\.dvc`"):
        here("deploy")
    sh(clone, "dvc pull -q models/champion.dvc")
    here("deploy")
    assert fake.digest("trial:live") == fake.digest("trial:2") is not None
    shown = capsys.readouterr().out
    assert "the registry here does not know it" in shown and "recorded in the registry" not in shown
    here("deploy")  # again: what is there is recognised
    assert fake.requests.count("POST /api/copy") == 1


def test_a_clone_does_not_deploy_champion_s_files_that_were_changed(fake, clone):
    sh(clone, "dvc pull -q models/champion.dvc")
    create = Path("models/champion/package/create.json")
    create.chmod(0o644)
    create.write_bytes(create.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"is not what models/champion\.dvc says"):
        here("deploy")
    assert not fake.manifests


def test_a_champion_json_that_is_not_the_registry_s_is_not_guessed_at(ollama, promoted):
    sh(promoted, "git checkout -q HEAD~2 -- models/champion.json")
    with pytest.raises(UserError, match=r"champion is version 2, models/champion\.json names version 1: `git pull`"):
        here("deploy")


def test_two_hosts_are_deployed_to_and_listed(fake, count_tokens, capsys):
    with FakeOllama(count_tokens=count_tokens) as second:
        here("deploy", "--host", fake.host, "--host", second.host)
        assert fake.digest("trial:live") == second.digest("trial:live") is not None
        capsys.readouterr()
        here("list", "--host", fake.host, "--host", second.host)
        shown = capsys.readouterr().out
        assert f"{fake.host}: trial:live is version 2" in shown and f"{second.host}: trial:live is version 2" in shown


def test_the_names_of_this_machine_are_one_server(fake, capsys):
    names = [fake.host.replace("127.0.0.1", name) for name in ("localhost", "127.0.0.1", "[::1]")]
    here("deploy", *(word for name in names[:2] for word in ("--host", name)))
    assert capsys.readouterr().out.count("9/9") == 1
    here("list", "--host", names[1])
    assert "trial:live is version 2 since" in last_line(capsys), "what was done under one name counts under the other"
    assert {host_key(name) for name in names} == {host_key(fake.host)}
    assert host_key("http://localhost.example:1") != host_key("http://127.0.0.1:1")


def test_a_host_that_is_down_stops_a_deployment_before_it_begins(fake):
    with silent_host() as silent, pytest.raises(UserError, match="no Ollama answers"):
        here("deploy", "--host", fake.host, "--host", silent)
    assert not fake.manifests


def test_list_goes_on_without_a_server(ollama, capsys):
    with silent_host() as silent:
        here("list", "--host", silent)
    shown = capsys.readouterr().out
    assert "champion" in shown and f"no Ollama answers at {silent}" in shown


def test_a_version_that_is_not_deployed_cannot_be_switched_to(ollama):
    with pytest.raises(UserError, match=r"trial:1 is not on .* `python -m fine_tuning deploy 1`"):
        here("switch", "1")
    with pytest.raises(UserError, match="has no version 9"):
        here("switch", "9")
    with pytest.raises(UserError, match="trial:1 is not on"):  # the version before by the registry
        here("rollback")


def test_a_tag_that_somebody_replaced_is_not_switched_to(fake_twice):
    fake_twice.manifests["trial:1"] = fake_twice.manifests["trial:2"]
    with pytest.raises(UserError, match="is not what was deployed there: `ollama rm trial:1`, then deploy it"):
        here("switch", "1")
    with pytest.raises(UserError, match="has another model as trial:1: `ollama rm trial:1`"):
        here("deploy", "1")
    assert fake_twice.digest("trial:live") == fake_twice.digest("trial:2")


def test_a_live_model_of_somebody_else_is_said_to_be_one(fake_twice, capsys):
    fake_twice.manifests["trial:live"] = fake_twice.manifests.pop("trial:1")
    fake_twice.manifests["trial:live"].layers.pop()
    here("list")
    assert "is a model that is not in the registry" in last_line(capsys)


def test_prune_takes_away_what_nobody_needs(fake_twice, promoted, capsys):
    registry = open_registry("trial")
    for number in (3, 4, 5):  # further versions, deployed like the others
        files = registry.download(registry.version(1), "", promoted.parent / f"files{number}")
        registry.register(str(number) * 64, files, {"gguf_sha256": "0" * 64}, {})
        client = OllamaClient(fake_twice.host)
        client.create(f"trial:{number}", {"files": {"model.gguf": f"sha256:{registry.version(1).tags['gguf_sha256']}"}})
        ModelSwitcher(client, registry).record(number, fake_twice.digest(f"trial:{number}"))
    fake_twice.manifests["trial:mine"] = fake_twice.manifests["trial:1"]
    here("prune", "--keep", "1")
    # 1 is previous and what rollback goes back to, 2 is champion and live, 5 is the newest, mine is somebody's.
    assert sorted(fake_twice.manifests) == ["trial:1", "trial:2", "trial:5", "trial:live", "trial:mine"]
    assert "trial:3, trial:4 removed" in (shown := capsys.readouterr().out) and "restart it to free" in shown
    with pytest.raises(UserError, match=r"trial:3 is not on .* `python -m fine_tuning deploy 3`"):
        here("switch", "3")
    here("prune")
    assert "nothing removed" in last_line(capsys)
    with pytest.raises(UserError, match="--keep takes a number from 1 on"):
        here("prune", "--keep", "0")


def test_a_version_that_somebody_replaced_is_not_pruned(fake_twice):
    registry = open_registry("trial")
    registry._client.delete_registered_model_alias("trial", "previous")
    fake_twice.manifests["trial:1"] = fake_twice.manifests["trial:2"]
    here("prune", "--keep", "1")
    assert "trial:1" in fake_twice.manifests


@pytest.mark.parametrize("name", ["0", "latest", "../../etc", "1; rm -rf /", "", "other:1", "1\n"])
def test_what_is_no_version_is_refused(candidate, name):
    with pytest.raises(UserError, match="is not a version"):
        here("switch", name)


def test_before_the_first_promotion_every_command_says_what_to_do(candidate, monkeypatch, capsys):
    with FakeOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.host)
        with pytest.raises(UserError, match="no champion yet"):
            here("deploy")
        here("list")
    assert "has no version yet" in capsys.readouterr().out


# --- canary ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(fake, capsys):
    """Version 1 is live, and half of the new conversations are version 2's; the canary."""
    here("deploy", "1")
    here("deploy", "--canary")
    assert "trial:2 answers 50% of the new conversations: " in last_line(capsys)
    return Canary(Path.cwd())


def set_rounds(**values: object) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["rounds"] |= values
    Path("params.yaml").write_text(yaml.safe_dump(params))


def decisions(number: int) -> list[str]:
    tags = open_registry("trial").version(number).tags
    return [tags[name] for name in sorted(tags) if name.startswith("canary.")]


def talk(canary: Canary, bad: Literal["candidate", "nobody"]) -> None:
    """Two hundred conversations."""
    for number in range(200):
        theirs = canary.candidate_for(f"c{number}", f"c{number}", new=True) is not None
        if theirs and bad == "candidate":
            canary.observe({"event": "feedback", "rating": -1, "conversation_id": f"c{number}"})


def test_a_canary_goes_beside_the_live_version_and_harm_leaves_that_live(fake, beside, capsys):
    assert fake.digest("trial:live") == fake.digest("trial:1") and fake.digest("trial:2")
    here("canary")
    assert "trial:2 answers 50% of the new conversations, version 1 the others" in capsys.readouterr().out
    here("deploy", "--canary", "0.1")
    assert beside.state().share == 0.1
    talk(beside, bad="candidate")
    here("canary")
    assert last_line(capsys).startswith("the canary of trial:2 is rolled back: ")
    assert fake.digest("trial:live") == fake.digest("trial:1")
    begun, other, ended = decisions(2)
    assert begun.startswith("begins with 50%") and other.startswith("begins with 10%")
    assert ended.startswith("rolled back: ") and "e-value" in ended
    here("canary")
    assert decisions(2) == [begun, other, ended], "once"


@pytest.mark.parametrize(("policy", "live"), [("ask", 1), ("canary", 2)])
def test_a_canary_without_harm_becomes_live_or_asks(fake, beside, capsys, monkeypatch, policy, live):
    set_rounds(promote=policy, notify="sh -c 'echo \"$1\" > heard' sh")
    talk(beside, bad="nobody")
    monkeypatch.setattr("fine_tuning.integration.canary.SIGNAL_SECONDS", -1.0)  # none can come any more
    monkeypatch.setattr("fine_tuning.integration.canary.ENOUGH", 50)
    here("canary")
    assert last_line(capsys).startswith("the canary of trial:2 is finished: 0 of ")
    assert fake.digest("trial:live") == fake.digest(f"trial:{live}")
    asks = "`python -m fine_tuning switch 2` makes it live"
    assert Path("heard").read_text().rstrip().endswith(asks if live == 1 else "it is live")


def test_a_canary_is_stopped_by_hand_and_by_whatever_goes_live(fake, beside, capsys):
    here("canary", "--stop")
    assert last_line(capsys) == "the canary of trial:2 is stopped: by hand"
    with pytest.raises(UserError, match="no canary runs"):
        here("canary", "--stop")
    here("deploy", "2", "--canary")
    here("switch", "2")
    here("canary")
    assert last_line(capsys) == "the canary of trial:2 is stopped: version 2 went live"
    assert [text.partition(" ")[0] for text in decisions(2)] == ["begins", "stopped:", "begins", "stopped:"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("2", "--canary", "1.5"), "a share between 0 and 1"),
        (("2", "--canary", "nan"), "a share between 0 and 1"),
        (("1", "--canary"), "version 1 is live already"),
        (("2", "--canary", "--host", "127.0.0.1:1"), "not on --host"),
    ],
)
def test_a_canary_that_compares_nothing_is_refused(fake, words, why):
    here("deploy", "1")
    with pytest.raises(UserError, match=why):
        here("deploy", *words)
    assert Canary(Path.cwd()).state() is None


def test_a_canary_needs_a_live_version(fake):
    with pytest.raises(UserError, match="no version of ours is live"):
        here("deploy", "2", "--canary")
