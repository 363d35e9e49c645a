"""The pages Data, Models, Runs and Compare: AppTest over real shards, DVC, MLflow and a registry."""

import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import httpx
import pytest
import streamlit as st
import yaml
from filelock import FileLock
from streamlit.testing.v1 import AppTest

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_json, read_jsonl, write_json
from fine_tuning.common.stage_times import SAMPLE, TIMES
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.sealing import close_log, seal_log
from fine_tuning.data_collection.storage.shards import write_shard
from fine_tuning.evaluation.looks import record_looks
from fine_tuning.integration import data_view, models_view, runs_view, votes
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.chat_models import ChatModel, Sampling
from fine_tuning.integration.embedded_engine import shared_engines
from fine_tuning.integration.jobs import Job, Jobs, jobs
from fine_tuning.integration.runs_view import Line
from fine_tuning.model_management.model_registry import open_registry
from fine_tuning.schema.chat_format import load_tokenizer
from stages import clean, intake, prepare
from tests import registered
from tests.app_checkout import NOBODY, REPOSITORY, write_checkout
from tests.fake_ollama import FakeOllama, Manifest

WORDS = ("router", "cable", "printer", "screen", "mouse", "battery", "window", "button", "server", "account")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    st.cache_data.clear()
    st.cache_resource.clear()
    jobs.latest = None
    yield
    jobs.stop()
    shared_engines.close()


def open_page(name: str) -> AppTest:
    program = f"from fine_tuning.integration.app_pages.{name} import page\npage()\n"
    at = AppTest.from_string(program, default_timeout=120).run()
    assert not at.exception
    return at


def shown(at: AppTest) -> str:
    """All text of the page."""
    elements = [*at.markdown, *at.caption, *at.info, *at.warning, *at.error, *at.success]
    return "\n".join(str(element.value) for element in elements).replace("\\", "")


def talk(number: int, question: str, reply: str) -> dict:
    return {
        "id": f"c{number}",
        "source": "chat",
        "started_at": f"2026-01-{1 + number % 28:02}T10:00:00.000Z",
        "messages": [
            {"id": f"c{number}-q", "role": "user", "content": question},
            {"id": f"c{number}-a", "role": "assistant", "content": reply},
        ],
        "feedback": [],
        "metadata": {},
    }


# --------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def collected(tmp_path, tiny_base, monkeypatch):
    """A checkout whose conversations went through intake, clean and prepare."""
    write_checkout(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    talks = [
        talk(n, f"Why does the {a} of my {b} fail?", f"Unplug the {b}, wait, and look at the {a} again, number {n}.")
        for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a < b)
    ]
    talks.append(talk(903, talks[1]["messages"][0]["content"], "Nobody knows, ask the shop where you bought it."))
    talks.append(talk(900, "Write to jane.doe@example.org please", "I wrote to jane.doe@example.org for you today."))
    talks.append(talk(901, talks[0]["messages"][0]["content"], talks[0]["messages"][1]["content"]))
    talks.append(talk(902, "Greet mail@example.org", "Good morning {{ first_name }}, how are you?"))
    write_shard("data/conversations", "import", talks)
    for stage in (intake, clean, prepare):
        stage.main()
    return tmp_path


PAGE_FILES = (".whetstone/titles.json", ".whetstone/votes.jsonl", "models/champion.json", "models/base/base.json")
PAGE_FILES += ("metrics/comparison.json", "metrics/clean.json", "metrics/prepare.json", "metrics/evaluation.json")


@pytest.mark.parametrize("name", ["chat", "data", "compare"])
def test_a_page_survives_damaged_files(collected, name):
    ConversationLogger("inbox/conversations.jsonl").log_conversation("New one", "Yes.", {"session_id": "s1"})
    for file in PAGE_FILES:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(b"" if "titles" in file else b'{"torn": [')
    open_page(name)


def test_the_data_page_counts_and_shows_one_conversation_before_and_after(collected):
    ConversationLogger("inbox/conversations.jsonl").log_conversation("New one", "Yes.", {"session_id": "s1"})
    at = open_page("data")
    numbers = {metric.label: metric.value for metric in at.metric}
    assert (numbers["Collected"], numbers["Dropped"], numbers["Masked"]) == ("50", "2", "2")
    said = [caption.value for caption in at.caption]
    assert any("conversations with" in words and words.endswith("tokens to train on") for words in said)
    assert "Alike or with the same beginning, so always in one split; the largest groups: 2" in said
    assert "New or changed since the last training: 1 to seal, 0 sealed." in shown(at)

    at.text_input(key="find").set_value("jane").run()
    assert "background" in at.html[0].proto.body and "jane.doe@example.org</span>" in at.html[0].proto.body
    at.segmented_control(key="view").set_value("After cleaning").run()
    after = "".join(element.proto.body for element in at.html)
    assert "jane" not in after and "&lt;EMAIL_1&gt;</span>" in after
    at.segmented_control(key="view").set_value("Tokens").run()
    assert "In the split" in shown(at)
    assert "&lt;|im_end|&gt;</span>" in at.html[0].proto.body, "the token that ends the reply is trained"


def test_the_data_page_shows_what_a_running_gateway_counted_and_no_content(collected):
    assert "No gateway runs" in shown(open_page("data"))
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["gateway"]["token"] = "a long random text"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", "fine_tuning", "gateway", "--port", "0", "--upstream"]
    with FakeOllama(reply="Knead it.") as ollama:
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1", "size": 1}]
        ollama.manifests["baker:latest"] = Manifest(layers, "{{ .Prompt }}", "", {})
        with subprocess.Popen([*command, ollama.host], stdout=subprocess.PIPE, text=True) as gateway:
            try:
                address = gateway.stdout.readline().split()[1]
                headers = {"X-Whetstone-Token": "a long random text"}
                with httpx.Client(base_url=address, headers=headers, trust_env=False) as client:
                    for question, record in (("Bread?", "on"), ("Bread, again?", "on"), ("Bread, for me?", "off")):
                        said = {"model": "baker", "messages": [{"role": "user", "content": question}]}
                        client.post("/api/chat", json=said, headers={"X-Whetstone-Record": record})
                text = shown(open_page("data"))
                assert address in text and "recorded 2," in text and "left out (not wanted) 1" in text
                assert "Bread" not in text
                params["gateway"]["token"] = None
                Path("params.yaml").write_text(yaml.safe_dump(params))
                assert "set $WHETSTONE_GATEWAY_TOKEN for the app" in shown(open_page("data"))
            finally:
                gateway.terminate()
    assert "No gateway runs" in shown(open_page("data"))


def test_the_data_page_says_that_people_are_not_masked_until_they_are(collected):
    said = "Names, addresses and dates of birth are not masked: clean.people in params.yaml is off."
    assert said in shown(open_page("data"))
    params = yaml.safe_load((collected / "params.yaml").read_text())
    params["clean"]["people"] = "mask"
    (collected / "params.yaml").write_text(yaml.safe_dump(params))
    assert "Names, addresses" not in shown(open_page("data"))


def test_conversations_are_found_by_any_word_and_filtered_by_state_source_split_and_rating(collected):
    logger = ConversationLogger("inbox/conversations.jsonl")
    exchange = logger.log_conversation("New one", "The aardvark sleeps.", {"session_id": "s1"})
    logger.log_feedback(exchange, 1)
    at = open_page("data")
    table = at.dataframe[-1].value
    assert len(table) == 50 and set(table["split"]) == {"train", "validation", "test", "none"}
    at.text_input(key="find").set_value("AARDVARK").run()
    assert list(at.dataframe[-1].value["id"]) == ["s1"]
    at.text_input(key="find").set_value("").run()
    at.selectbox(key="rating").set_value("1").run()
    assert list(at.dataframe[-1].value["begins"]) == ["New one"]
    at.selectbox(key="rating").set_value("all").run()
    at.selectbox(key="split").set_value("test").run()
    assert 0 < len(at.dataframe[-1].value) < 50 and set(at.dataframe[-1].value["fate"]) == {"kept"}


def test_conversations_are_found_by_day_and_by_what_was_masked_in_them(collected):
    at = open_page("data")
    assert at.selectbox(key="masked").options == ["all", "EMAIL"]
    at.selectbox(key="masked").set_value("EMAIL").run()
    assert list(at.dataframe[-1].value["id"]) == ["c900"] and list(at.dataframe[-1].value["masked"]) == ["EMAIL"]
    at.selectbox(key="masked").set_value("all").run()
    at.date_input(key="days").set_value((date(2026, 1, 2), date(2026, 1, 3))).run()
    assert set(at.dataframe[-1].value["day"]) == {"2026-01-02", "2026-01-03"}


def test_of_many_conversations_the_first_are_listed_and_what_changes_shows_at_once(collected, monkeypatch):
    from fine_tuning.integration.app_pages import data

    monkeypatch.setattr(data, "SHOWN", 7)
    at = open_page("data")
    assert len(at.dataframe[-1].value) == 7 and "49 conversations; the first 7 are listed" in shown(at)
    ConversationLogger("inbox/conversations.jsonl").log_conversation("A new one", "Said since.", {"session_id": "s1"})
    at.run()
    assert at.dataframe[-1].value["begins"][0] == "A new one" and "50 conversations; the first 7" in shown(at)


def test_a_tag_stays_with_its_conversation_and_finds_it(collected):
    at = open_page("data")
    at.text_input(key="find").set_value("jane").run()
    at.multiselect(key="tags-c900").set_value(["to  check", "mail"]).run()
    again = open_page("data")
    assert again.selectbox(key="tags").options == ["all", "mail", "to check"]
    again.selectbox(key="tags").set_value("to check").run()
    assert list(again.dataframe[-1].value["id"]) == ["c900"]
    again.multiselect(key="tags-c900").set_value([]).run()
    assert read_json(collected / data_view.TAGS) == {}


def test_a_corrected_reply_is_an_edit_in_the_log_and_shown(collected):
    at = open_page("data")
    at.text_input(key="find").set_value("jane").run()
    at.button(key="correct-c900-a").click().run()
    at.text_area(key="edited-c900-a").set_value("I sent it.")
    at.button(key="save-edit").click().run()
    (event,) = ConversationLogger("inbox/conversations.jsonl").read_events()
    assert (event["event"], event["message_id"], event["content"]) == ("edit", "c900-a", "I sent it.")
    assert event["conversation_id"] == "c900"
    assert any("I sent it." in element.proto.body for element in at.run().html)
    assert "1 to seal" in shown(at)


@pytest.mark.end_to_end
def test_an_uploaded_file_goes_through_the_importers_and_leaves_no_copy(collected):
    registered.sh(collected, "git init -q && dvc init -q")
    at = open_page("data")
    assert at.button(key="import").disabled
    export = (
        b'{"messages": [{"role": "user", "content": "Is it a plane?"}, {"role": "assistant", "content": "A bird."}]}\n'
    )
    at.file_uploader(key="upload").set_value(("../../export.jsonl", export, "application/json")).run()
    at.button(key="import").click().run()
    assert finish(at).returncode == 0, jobs.latest.lines()
    at.text_input(key="find").set_value("plane").run()
    assert list(at.dataframe[-1].value["source"]) == ["import"]
    assert not (collected / ".whetstone/app/uploads").exists()


def test_a_dropped_conversation_tells_its_reason(collected):
    at = open_page("data")
    at.selectbox(key="fate").set_value("duplicate").run()
    assert "Dropped: duplicate" in shown(at)
    assert at.button(key="restore").disabled
    assert at.expander[-1].label == "The one that is kept instead"
    assert "The same conversation is kept under another id." in shown(at)


def test_a_wrongly_dropped_conversation_is_restored_for_good(collected):
    at = open_page("data")
    assert "template field" in at.selectbox(key="fate").options
    at.selectbox(key="fate").set_value("template_field").run()
    at.button(key="restore").click().run()
    assert "1 to seal" in shown(at)
    at.selectbox(key="fate").set_value("new").run()
    assert "Restored: masked as ever" in shown(at)

    folder, manifest = collected / "data/conversations", collected / "data/manifest.json"
    (log,) = close_log(collected / "inbox/conversations.jsonl", folder)
    seal_log(log, folder, manifest)
    log.unlink()
    assert "0 to seal, 1 sealed" in shown(at.run())
    for stage in (intake, clean):
        stage.main()
    (kept,) = [c for path in Path("data/clean").glob("*chat*.jsonl") for c in read_jsonl(path)]
    assert [message["content"] for message in kept["messages"]] == [
        "Greet <EMAIL_1>", "Good morning {{ first_name }}, how are you?",
    ]  # fmt: skip
    assert "template field" not in open_page("data").selectbox(key="fate").options


def test_html_in_a_conversation_stays_text(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(write_checkout(tmp_path, tiny_base))
    ConversationLogger("inbox/conversations.jsonl").log_conversation("<img src=http://evil.example>", "<script>")
    at = open_page("data")
    bodies = "".join(element.proto.body for element in at.html)
    assert "&lt;img" in bodies and "<img" not in bodies and "<script" not in bodies


def test_a_conversation_whose_id_has_no_utf_8_is_opened_and_tagged(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(write_checkout(tmp_path, tiny_base))
    write_shard("data/conversations", "import", [talk(1, "Where is it?", "Here it is.") | {"id": "c\ud800"}])
    at = open_page("data")
    assert "Where is it?" in at.html[0].proto.body
    at.multiselect(key="tags-c?").set_value(["odd"]).run()
    assert not at.exception and read_json(data_view.TAGS) == {"c\ud800": ["odd"]}
    assert list(open_page("data").dataframe[-1].value["tags"]) == ["odd"]


# -------------------------------------------------------------------------------------------------- models and runs


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_base):
    """A project with version 1 promoted and a second candidate whose verdict is HOLD."""
    folder = registered.write_project(tmp_path_factory.mktemp("registered") / "project", tiny_base)
    assert registered.type_command(folder, "promote").returncode == 0
    registered.repro(folder, seed=2, verdict="HOLD")
    return add_params(folder)


def add_params(folder: Path, host: str = NOBODY) -> Path:
    """Give a project of tests/registered.py what the pages read beyond its own parameters."""
    ours = yaml.safe_load((REPOSITORY / "params.yaml").read_bytes())
    params = yaml.safe_load((folder / "params.yaml").read_bytes()) | {name: ours[name] for name in ("app", "clean")}
    params["app"] |= {"max_tokens": 16, "context": 512}
    params["deploy"]["host"] = host
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def finish(at: AppTest, seconds: float = 90.0) -> Job:
    """Wait until the command that the page started has ended, and show the page again."""
    assert jobs.latest is not None
    deadline = time.monotonic() + seconds
    while jobs.latest.running:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not at.run().exception
    return jobs.latest


@pytest.mark.end_to_end
def test_every_action_is_confirmed_then_done_and_told(promoted, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    with FakeOllama(count_tokens=lambda prompt: len(tokenizer(prompt, add_special_tokens=False).input_ids)) as ollama:
        add_params(promoted, ollama.host)
        at = open_page("models")
        assert at.button(key="promote").disabled, "it is the champion already"
        assert at.button(key="switch").disabled and at.button(key="rollback").disabled
        for number, key in ((1, "deploy"), (2, "deploy"), (1, "switch")):
            at.selectbox(key="version").set_value(number).run()
            at.button(key=key).click().run()
            at.button(key="confirm-now").click().run()
            assert finish(at).returncode == 0, jobs.latest.lines()
            assert ollama.digest("trial:live") == ollama.digest(f"trial:{number}")
        at.button(key="rollback").click().run()
        assert "Version 2 answers again." in shown(at)
        at.button(key="confirm-now").click().run()
        assert finish(at).returncode == 0
        assert ollama.digest("trial:live") == ollama.digest("trial:2")


def test_a_promotion_bears_the_name_of_whoever_is_signed_in(candidate):
    add_params(candidate)
    at = AppTest.from_string("from fine_tuning.integration.app_pages.models import page\npage()\n", default_timeout=120)
    at.secrets["auth"] = {"client_id": "a", "cookie_secret": "c" * 32}
    at.user = {"is_logged_in": True, "email": "ann@example.org"}
    at.run()
    at.button(key="promote").click().run()
    at.button(key="confirm-now").click().run()
    assert finish(at).returncode == 0, jobs.latest.lines()
    (version,) = open_registry("trial", candidate).versions()
    assert version.tags["promoted_by"] == "ann@example.org"


def test_an_earlier_version_answers_without_ollama(promoted):
    add_params(promoted)
    at = open_page("chat")
    deadline = time.monotonic() + 120
    while len(at.selectbox(key="model").options) < 2:  # the store was copied: MLflow corrects its addresses first
        assert time.monotonic() < deadline
        at.run()
    assert at.selectbox(key="model").options == [
        "Champion · version 2 · trial:2 · built-in engine",
        "Version · version 1 · trial:1 · built-in engine",
    ]
    at.selectbox(key="model").set_value("Version · version 1 · trial:1 · built-in engine").run()
    at.chat_input(key="message").set_value("Hello?").run()
    deadline = time.monotonic() + 60
    while not (events := list(ConversationLogger("inbox/conversations.jsonl").read_events())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (events[0]["metadata"]["model"], events[0]["metadata"]["version"]) == ("trial:1", 1)

    md5 = open_registry("trial", promoted).version(1).tags["gguf_md5"]
    (promoted / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()  # as `forget --withdraw` does
    assert at.run().selectbox(key="model").options == ["Champion · version 2 · trial:2 · built-in engine"]


def test_the_gate_disables_promotion_and_says_why(project, monkeypatch):
    monkeypatch.chdir(project)
    at = open_page("models")
    assert at.button(key="promote").disabled
    assert not at.button(key="force").disabled
    assert "Promotion is off: the verdict is HOLD." in shown(at)
    assert "no Ollama answers" in shown(at)
    assert "Deploy, Switch, Roll back: off, Ollama does not answer." in shown(at)


def test_a_forced_promotion_needs_a_reason_and_registers_a_version(project, monkeypatch):
    monkeypatch.chdir(project)
    at = open_page("models")
    at.button(key="force").click().run()
    assert at.button(key="confirm-now").disabled
    registry = open_registry("trial", project)
    (first,) = registry.versions()
    assert models_view.reasons(registry, first)[0].startswith("perplexity 9.")
    drawing = models_view.lineage(first.tags, ["version 1"], live=True)
    assert first.tags["adapter_sha256"][:10] in drawing and "version -> live" in drawing


def test_the_champion_is_not_promoted_twice(project, monkeypatch, tmp_path):
    ledger = REPOSITORY / "data/looks.jsonl"
    before = ledger.read_bytes()
    found = models_view.candidate(project)
    assert ledger.read_bytes() == before and (project / "data/looks.jsonl").is_file()
    assert found is not None and found.obstacle is None
    (tmp_path / "metrics").mkdir()
    (tmp_path / "models/adapter").mkdir(parents=True)
    (tmp_path / "metrics/comparison.json").write_bytes((project / "metrics/comparison.json").read_bytes())
    assert "dvc pull" in str(models_view.candidate(tmp_path).obstacle)
    (tmp_path / "models/adapter/adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "models/champion.json").write_text(f'{{"adapter_sha256": "{found.adapter_sha256}"}}')
    assert models_view.candidate(tmp_path).obstacle == "it is the champion already"


def test_a_report_is_shown_without_an_origin():
    assert models_view.as_page(b"<script>1</script>").startswith("data:text/html;charset=utf-8;base64,")


def test_commits_and_the_workspace_are_lines_of_one_table(project, monkeypatch):
    monkeypatch.chdir(project)
    lines = runs_view.dvc_lines(project)
    assert lines[0].kind == "workspace"
    assert runs_view.changed(lines[0], lines[1])["train.seed"] == 2
    names = {row["name"] for row in runs_view.differences(lines[0], lines[1])}
    assert {"train.seed", "trial.verdict", "comparison.verdict"} <= names
    at = open_page("runs")
    assert at.dataframe[0].value["what"].tolist()[0] == "workspace"
    shown = {(line.metrics["comparison.eval_set_sha256"], line.metrics[runs_view.JUDGED]) for line in lines[:1]}
    assert shown <= set(record_looks([])), "what the page shows is looked at"


def test_the_verdicts_that_the_page_shows_are_looks_but_for_a_champions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def line(adapter: str, **more: object) -> Line:
        return Line(
            "commit", adapter, None, metrics={runs_view.JUDGED: adapter, "comparison.eval_set_sha256": "s"} | more
        )

    lines = [
        line("a"),
        line("b"),
        line("a"),
        line("c", **{"comparison.champion.version": 1}),
        Line("MLflow run", "", None),
    ]
    runs_view.record_lines(lines)
    assert record_looks([]) == [("s", "a"), ("s", "b")]


@pytest.mark.end_to_end
def test_an_experiment_is_started_with_changed_parameters_and_compared(candidate):
    add_params(candidate)
    registered.sh(candidate, "git commit -qam 'More parameters'")
    at = open_page("runs")
    assert at.button(key="experiment").disabled, "nothing is changed"
    at.multiselect(key="parameters").set_value(["train.seed", "train.lora.target_modules"]).run()
    assert (at.number_input(key="set-train.seed").min, at.number_input(key="set-train.seed").max) == (0, 2**32)
    at.number_input(key="set-train.seed").set_value(2**32).run()
    assert "train.seed = 4294967296 should be less than" in at.error[0].value.replace("\\", "")
    assert at.button(key="experiment").disabled
    at.number_input(key="set-train.seed").set_value(7)
    at.text_input(key="set-train.lora.target_modules").set_value("q_proj, v_proj").run()
    at.button(key="experiment").click().run()
    assert finish(at).returncode == 0, jobs.latest.lines()
    train = yaml.safe_load((candidate / "params.yaml").read_bytes())["train"]
    assert (train["seed"], train["lora"]["target_modules"]) == (7, ["q_proj", "v_proj"])
    at.button(key="refresh").click().run()
    kinds = at.dataframe[0].value["what"].tolist()
    assert kinds.count("experiment") == 1
    two = [name for name in at.selectbox(key="one").options if name.startswith(("experiment", "commit"))]
    at.selectbox(key="one").set_value(two[0])
    at.selectbox(key="other").set_value(two[1]).run()
    differences = at.dataframe[-1].value
    assert "train.seed" in differences["name"].tolist()


def test_a_running_command_is_shown_live_and_stopped_by_its_button(candidate):
    add_params(candidate)
    curve = (
        "import pathlib; pathlib.Path('.whetstone/training.csv').write_text('step,steps,loss\\n1,4,2.5\\n2,4,2.0\\n')"
    )
    program = f"{curve}; print(\"Running stage 'train':\", flush=True); import time; time.sleep(60)"
    write_json(candidate / TIMES, {stage: 10.0 for stage in SAMPLE})
    job = jobs.start("Train", [sys.executable, "-c", program], candidate)
    while "Running" not in "".join(job.lines()):
        time.sleep(0.05)
    at = open_page("home")
    assert at.button(key="train").disabled and at.button(key="back").disabled
    progress = at.get("progress")[0].proto
    assert progress.value == round(100 * 5.5 / 9), "five stages of nine, and half of the sixth"
    assert "stage train, about 35 s to the verdict" in progress.text
    assert at.get("vega_lite_chart"), "the loss so far"
    at.button(key="stop-job").click().run()
    at.run()
    assert "Train: stopped" in shown(at)


def test_the_end_of_a_command_is_announced_on_every_page_once(candidate):
    add_params(candidate)
    job = jobs.start("Train", [sys.executable, "-c", "import time; time.sleep(2); print('done: all of it')"], candidate)
    program = "from fine_tuning.integration.app_jobs import announce\nannounce()\n"
    at = AppTest.from_string(program, default_timeout=60).run()
    assert "Train" in at.sidebar.get("progress")[0].proto.text
    wait(job)
    assert [toast.value.replace("\\", "") for toast in at.run().toast] == ["Train: done: all of it"]
    assert not at.run().toast
    assert not AppTest.from_string(program, default_timeout=60).run().toast, "who was not there is not told"


# --------------------------------------------------------------------------------------------------------------- home


def test_the_first_page_says_what_is_true_and_trains_on_what_is_new(candidate):
    add_params(candidate)
    params = yaml.safe_load((candidate / "params.yaml").read_bytes()) | {"intake": {"sample": False}}
    (candidate / "params.yaml").write_text(yaml.safe_dump(params))
    ConversationLogger("inbox/conversations.jsonl").log_conversation("How do I restart my lamp?", "Press the button.")
    at = open_page("home")
    assert "Training is off: 1 file changed and not committed: params.yaml." in shown(at)
    assert at.button(key="train").disabled
    registered.sh(candidate, "git commit -qam 'More parameters'")
    at.run()
    said = shown(at)
    assert "1 conversation." in said and "PROMOTE. The candidate is better: perplexity" in said
    assert "New chats: the candidate: its verdict is PROMOTE, and nothing is live yet." in said
    assert "It takes about" in said
    at.button(key="train").click().run()
    assert finish(at).returncode == 0, jobs.latest.lines()
    assert "Verdict: PROMOTE, committed as" in shown(at)
    assert registered.sh(candidate, "git log -1 --format=%s") == "Round: PROMOTE\n"
    at.button(key="back").click().run()
    assert "The present state is committed first." in shown(at)
    at.button(key="confirm-now").click().run()
    assert finish(at).returncode == 0, jobs.latest.lines()
    assert "results and models are those of" in shown(at)
    assert registered.sh(candidate, "git log -1 --format=%s").startswith("Back to")


def test_the_first_page_says_what_the_next_round_waits_for_and_stops_a_canary(candidate):
    add_params(candidate)
    canary = Canary(candidate)
    canary.begin("trial", 7, 2, 0.5)
    at = open_page("home")
    said = shown(at)
    assert "Canary: trial:7 answers 50% of new chats. 0 of 0 conversations with the candidate went badly" in said
    assert "The next round waits" not in said, "nobody watches"
    with FileLock(candidate / ".whetstone/rounds.lock"):
        assert "The next round waits: 1 file changed and not committed (params.yaml); the canary of trial:7 runs" in (
            shown(at.run())
        )
    at.button(key="stop-canary").click().run()
    finish(at)
    assert canary.state().outcome == "stopped"
    assert "The canary of trial:7 is stopped: by hand." in shown(at)


def test_the_training_form_has_the_comments_and_bounds_of_every_parameter_that_it_may_change():
    found = {parameter.name: parameter for parameter in runs_view.changeable(REPOSITORY / "params.yaml")}
    assert found.keys() == runs_view.MAY_CHANGE
    seed, patience = found["train.seed"], found["train.early_stopping_patience"]
    assert seed.comment == "Same seed, data, parameters and kind of machine: the same bytes."
    assert (seed.value, seed.optional, patience.value, patience.optional) == (42, False, None, True)
    assert (seed.forms[0]["minimum"], patience.forms[0]["type"]) == (0, "integer")
    assert found["train.schedule"].forms[0]["enum"][0] == "cosine"
    arguments = runs_view.overrides(REPOSITORY / "params.yaml", {"train.learning_rate": 1e-4, "train.max_steps": None})
    assert arguments == ["-S", "train.learning_rate=0.0001", "-S", "train.max_steps=null"]


@pytest.mark.end_to_end
def test_a_run_that_failed_shows_nothing_of_the_commit_it_started_from(candidate):
    registered.sh(candidate, "dvc exp run -q --queue -n broken -S train.seed=none")
    try:
        registered.sh(candidate, "dvc queue start -q")
        deadline = time.monotonic() + 300
        while "Failed" not in registered.sh(candidate, "dvc queue status"):
            assert time.monotonic() < deadline
            time.sleep(1)
    finally:
        registered.sh(candidate, "dvc queue stop -q --kill || true")
    lines = runs_view.dvc_lines(candidate)
    (broken,) = (line for line in lines if line.kind == "experiment")
    assert broken.status == "failed" and broken.params["train.seed"] == "none"
    assert broken.metrics == {} and lines[0].metrics["comparison.verdict"] == "PROMOTE"


def test_an_experiment_that_only_trained_has_no_verdict_of_another_adapter():
    start = {"train.validation_loss": 1.8, "prepare.rows": 9, runs_view.JUDGED: "a", "comparison.verdict": "PROMOTE"}
    only_trained = start | {"train.validation_loss": 1.7}
    assert runs_view.own_metrics(only_trained, start) == {"train.validation_loss": 1.7, "prepare.rows": 9}
    judged = only_trained | {runs_view.JUDGED: "b", "comparison.verdict": "HOLD"}
    assert runs_view.own_metrics(judged, start) == judged
    judged_otherwise = start | {"comparison.verdict": "HOLD"}
    assert runs_view.own_metrics(judged_otherwise, start) == judged_otherwise


def test_a_run_stands_with_the_experiment_that_has_its_numbers():
    numbers = {"train.train_loss": 2.5, "train.validation_loss": 2.25}
    one, other = Line("commit", "a", None, metrics=numbers), Line("commit", "b", None)
    same = Line("MLflow run", "r", None, metrics=numbers | {"train.tokens_per_second": 181.0}, run_id="1")
    alone = Line("MLflow run", "s", None, metrics={}, run_id="2")
    table = runs_view.joined([one, other], [same, alone])
    assert [(line.name, line.run_id) for line in table] == [("a", "1"), ("b", None), ("s", "2")]
    assert table[0].metrics["train.tokens_per_second"] == 181.0


# --------------------------------------------------------------------------------------------------------------- jobs


def wait(job: Job) -> None:
    deadline = time.monotonic() + 20
    while job.running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_tells_its_stages_progress_and_outcome(tmp_path):
    program = (
        "print(\"Running stage 'clean':\"); print('10%\\r20%\\r90%'); print('\\x1b[31merror: it is full: mend it')"
    )
    job = Job("dvc repro", [sys.executable, "-c", program + "; raise SystemExit(1)"], tmp_path)
    wait(job)
    assert job.stages() == ["clean"]
    assert job.lines() == ["Running stage 'clean':", "90%", "error: it is full: mend it"]
    assert job.outcome() == "it is full: mend it"


def test_a_stopped_job_leaves_no_process_behind(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    running = Jobs()
    job = running.start("long", [sys.executable, "-c", f"{child}; print('up', flush=True); time.sleep(60)"], tmp_path)
    while "up" not in job.lines():
        time.sleep(0.05)
    with pytest.raises(UserError, match="long is running"):
        running.start("other", ["true"], tmp_path)
    job.stop(patience=2)
    assert (job.running, job.outcome()) == (False, "stopped")
    deadline = time.monotonic() + 10  # what was killed is gone when the kernel comes to it
    while group := [path for path in Path("/proc").glob("[0-9]*/stat") if _in_group(path, job._process.pid)]:
        assert time.monotonic() < deadline, group
        time.sleep(0.05)


def _in_group(path: Path, group: int) -> bool:
    try:
        state, _, found = path.read_text().rpartition(") ")[2].split()[:3]
    except OSError:
        return False
    return int(found) == group and state != "Z"


# ------------------------------------------------------------------------------------------------------------ compare


def test_two_models_answer_blind_and_the_vote_is_a_preference(tmp_path, tiny_base, monkeypatch):
    checkout = write_checkout(tmp_path, tiny_base)
    monkeypatch.chdir(checkout)
    (checkout / "models/package").mkdir()
    candidate = checkout / "models/package/model.gguf"
    candidate.write_bytes((checkout / "models/base/base-Q8_0.gguf").read_bytes())
    at = open_page("compare")
    at.text_area(key="prompt").set_value("Hello?")
    at.button(key="ask-both").click().run()
    duel = at.session_state["duel"]
    for reply in duel.replies:
        reply._thread.join(30)
    at.run()
    assert "gguf" not in "".join(markdown.value for markdown in at.markdown), "nobody knows who is who"
    at.button(key="vote-second").click().run()

    (held,) = ConversationLogger("inbox/conversations.jsonl").read_conversations()
    assert held["source"] == "compare"
    assert held["messages"][1]["content"] == duel.replies[1].text
    assert [other["content"] for other in held["messages"][1]["alternatives"]] == [duel.replies[0].text]
    assert held["feedback"][0]["over"] == [held["messages"][1]["alternatives"][0]["id"]]
    ((_, _, rate),) = votes.standings(votes.read(checkout))
    assert rate.n == 1 and rate.value in (0, 1)
    assert "win rate" in shown(at)


def test_a_version_of_another_kind_is_compared_with_what_stands_before_its_questions(tmp_path, tiny_base, monkeypatch):
    with FakeOllama() as ollama:
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1", "size": 1}]
        for tag in ("whetstone:3", "other:latest"):
            ollama.manifests[tag] = Manifest(
                layers, "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}", "", {}
            )
        monkeypatch.chdir(write_checkout(tmp_path, tiny_base, ollama.host))
        kind = {"kind": "prompt", "system_prompt": "Say where.", "examples": 0}
        write_json(tmp_path / "models/champion.json", {"name": "whetstone", "version": 3} | kind)
        at = open_page("compare")
        named = {option.split(" · ")[-2]: option for option in at.selectbox(key="one-model").options}
        at.selectbox(key="one-model").set_value(named["whetstone:3"])
        at.selectbox(key="other-model").set_value(named["other:latest"])
        at.text_area(key="prompt").set_value("Hello?")
        at.button(key="ask-both").click().run()
        for reply in at.session_state["duel"].replies:
            reply._thread.join(30)
        assert sorted(ollama.prompts) == ["system: Say where.\nuser: Hello?\n", "user: Hello?\n"]


def test_a_test_prompt_is_taken_over_for_both(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(write_checkout(tmp_path, tiny_base))
    (tmp_path / "models/package").mkdir()
    (tmp_path / "models/package/model.gguf").write_bytes((tmp_path / "models/base/base-Q8_0.gguf").read_bytes())
    at = open_page("compare")
    at.pills(key="test").set_value("Who are you?").run()
    assert at.text_area(key="prompt").value == "Who are you?"


def test_votes_count_for_a_pair_whatever_side_it_stood_on(tmp_path):
    one, other = (ChatModel(name, "embedded", f"{name}.gguf") for name in "ab")
    logger = ConversationLogger(tmp_path / "inbox/conversations.jsonl")
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=40, repeat_penalty=1.1, max_tokens=8)
    for models, vote in (((one, other), "first"), ((other, one), "second"), ((one, other), "tie")):
        votes.record(tmp_path, logger, "Hi", ("x", "y"), models, vote, sampling, by="ann")
    assert [(first, rate.value) for first, _, rate in votes.standings(votes.read(tmp_path))] == [(one.label, 2.5 / 3)]
    held = logger.read_conversations()
    assert [c["metadata"]["user_id"] for c in held] == ["ann"] * 2, "a tie prefers nothing"
