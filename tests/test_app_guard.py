"""Who may talk to the app: attacks from other web pages on a real Streamlit server, which may not look anything up."""

import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from fine_tuning.common.errors import UserError
from fine_tuning.integration import runs_view
from tests.app_checkout import REPOSITORY, write_checkout
from tests.browser import app_process, needs_chromium, settled

pytestmark = pytest.mark.end_to_end

# Counts what a process asks for outside this machine, and refuses it, as a machine without a network does.
NETWORK_GUARD = """
import os, sys

def guard(event, arguments):
    outside = event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1", "::1")
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        outside = arguments[1][0] not in ("localhost", "127.0.0.1", "::1")
    if outside:
        with open(os.environ["LOOKED_UP"], "a") as file:
            file.write(f"{event} {arguments}\\n")
        raise OSError("there is no network")

sys.addaudithook(guard)
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tiny_base):
    """(address, file that lists what the server asked for outside this machine)."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "sitecustomize.py").write_text(NETWORK_GUARD)
    (folder / "checkout").mkdir()
    checkout = write_checkout(folder / "checkout", tiny_base)
    with app_process(checkout, modules=folder, LOOKED_UP=str(folder / "looked-up")) as (address, _):
        yield address, folder / "looked-up"


def handshake(address: str, host: str | None = None, origin: str | None = None) -> int:
    """Status of a WebSocket handshake whose headers are chosen freely, as no browser allows."""
    here = urlsplit(address)
    lines = ["GET /_stcore/stream HTTP/1.1", f"Host: {host or here.netloc}", "Connection: Upgrade"]
    lines += ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    lines += [f"Origin: {origin}"] if origin else []
    with socket.create_connection((here.hostname, here.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(64).split()[1])


def foreign(address: str) -> list[str | None]:
    """Origins that are not the app's, most of them by a hair."""
    name, port = urlsplit(address).netloc.split(":")
    return [
        None, "null", "http://evil.example", f"http://{name}:3000", "http://localhost:3000", f"http://{name}",
        f"http://localhost:{port}", f"https://{name}:{port}", f"http://{name}:{port}.evil.example",
        f"http://{name}:{port}@evil.example", f"http://evil.example:{port}", f"http://{name}.:{port}",
    ]  # fmt: skip


def test_another_page_of_this_machine_cannot_open_the_stream_and_nothing_is_looked_up(guarded):
    address, looked_up = guarded
    started = time.monotonic()
    statuses = {str(origin): handshake(address, origin=origin) for origin in foreign(address)}
    assert set(statuses.values()) == {403}, statuses
    assert time.monotonic() - started < 5, "no request outside holds the server up"
    assert handshake(address, origin=address) == 101
    by_name = address.replace("127.0.0.1", "localhost")
    assert handshake(address, host=urlsplit(by_name).netloc, origin=by_name) == 101
    assert not looked_up.exists(), looked_up.read_text()


def test_another_page_of_this_machine_gets_no_answer_over_http(guarded):
    address, looked_up = guarded
    for origin in foreign(address)[1:]:
        for method, path in (("GET", "/_stcore/host-config"), ("PUT", "/_stcore/upload_file/a/b"), ("GET", "/")):
            answer = httpx.request(method, address + path, headers={"Origin": origin}, trust_env=False)
            assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False), (origin, path)
    assert httpx.post(f"{address}/_stcore/health", trust_env=False).status_code == 403, "a browser says where it is"
    assert httpx.get(f"{address}/_stcore/health", headers={"Origin": address}, trust_env=False).status_code == 200
    assert not looked_up.exists(), looked_up.read_text()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.:{port}"]
)
def test_a_name_that_only_leads_here_is_refused(guarded, host):
    address, _ = guarded
    host = host.format(port=urlsplit(address).port)
    assert handshake(address, host=host, origin=f"http://{host}") == 403
    assert httpx.get(address, headers={"Host": host}, trust_env=False).status_code == 403


def test_no_page_frames_the_app(guarded):
    address, _ = guarded
    for path in ("/", "/runs", "/_stcore/health", "/nothing/here", "/static/no.js"):
        policy = httpx.get(address + path, trust_env=False).headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "default-src 'self'" in policy, path


@needs_chromium
def test_a_framing_page_shows_nothing_of_the_app_and_the_app_itself_shows_everything(guarded, page, tmp_path):
    address, _ = guarded
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    for name in ("", "chat", "compare", "data", "runs", "models"):
        page.goto(f"{address}/{name}")
        page.get_by_role("heading").or_(page.get_by_test_id("stChatInputTextArea")).first.wait_for()
        settled(page)
    assert [text for text in complaints if "Content Security Policy" in text] == []
    (tmp_path / "framing.html").write_text(f"<iframe src='{address}/runs' width=300 height=300></iframe>")
    page.goto(f"file://{tmp_path}/framing.html")
    page.wait_for_timeout(1500)
    assert any("frame-ancestors" in text for text in complaints)
    assert page.frames[1].get_by_test_id("stApp").count() == 0


def test_an_app_that_listens_on_every_address_looks_nothing_up_either(tmp_path, tiny_base):
    (tmp_path / "sitecustomize.py").write_text(NETWORK_GUARD)
    (tmp_path / "checkout").mkdir()
    checkout = write_checkout(tmp_path / "checkout", tiny_base)
    looked_up = tmp_path / "looked-up"
    everywhere = {"STREAMLIT_SERVER_ADDRESS": "0.0.0.0", "LOOKED_UP": str(looked_up)}
    with app_process(checkout, modules=tmp_path, **everywhere) as (address, _):
        assert handshake(address, origin="http://evil.example") == 403
        assert handshake(address, origin=address) == 101
    assert not looked_up.exists(), looked_up.read_text()


# ---------------------------------------------------------------------------------------------------- parameters

REFUSED = {
    "evaluate.metrics": ["../../../../evil"], "base.gguf_converter": "/bin/sh", "base.trust_remote_code": True,
    "base.model": "/x", "clean.engine": "tcp://evil:1", "prepare.engine": "tcp://evil:1", "clean.people_model": "/x",
    "train.launch": "../x", "deploy.host": "http://evil", "deploy.more_hosts": ["http://evil"], "train": {"seed": 1},
    "chat.system_prompt": "${oc.env:HOME}", "prepare.salt": "a\nbase.model=/x", "other.yaml:train.epochs": 1,
    "evaluate.generation": {"items": 1}, "train.lora.target_modules": ["${oc.env:HOME}"], "+train.epochs": 1,
    "train.epochs": "${oc.env:HOME}", "train.learning_rate": -1.0, "train.schedule": "never", "train.lora.rank": None,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_app_changes_no_parameter_that_names_code_a_path_or_a_host(name):
    with pytest.raises(UserError) as error:
        runs_view.overrides(REPOSITORY / "params.yaml", {name: REFUSED[name]})
    assert name.partition(":")[0] in str(error.value)


def test_what_the_app_may_change_are_plain_values_of_todays_parameters():
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_bytes())
    for name in runs_view.MAY_CHANGE:
        value = params
        for part in name.split("."):  # a name that is misspelt is not there
            value = value[part]
        assert not isinstance(value, dict), f"{name} is a section"
    assert {"train.learning_rate", "train.lora.rank", "prepare.train_on", "chat.max_length"} <= runs_view.MAY_CHANGE


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a.b", "", "a\\b", "bleu\n", ".."])
def test_a_metric_is_a_name_and_no_path(name):
    from fine_tuning.common.settings import parse_settings
    from fine_tuning.evaluation.records.settings import EvaluateSettings

    section = yaml.safe_load((REPOSITORY / "params.yaml").read_bytes())["evaluate"] | {"metrics": ["bleu", name]}
    with pytest.raises(UserError, match=r"evaluate\.metrics\.1 .*letters, digits and _"):
        parse_settings("evaluate", section, EvaluateSettings, "params.yaml")
