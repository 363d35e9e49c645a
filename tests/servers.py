"""Real servers on loopback for DVC's remotes and MLflow: S3, WebDAV, SSH, HTTP, PostgreSQL.

`python -m tests.servers s3` (`make remote-s3`) starts one in this terminal, makes it a DVC remote of the checkout and
keeps its files in .whetstone/remotes, to try a remote without an account anywhere.
"""

import argparse
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

USER, SECRET = "whetstone", "loopback-only-secret"
BIN = Path(sys.executable).parent
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
PATIENCE = 60.0  # seconds that a server may take to answer


@dataclass(frozen=True)
class Remote:
    """A DVC remote: its address, settings that everybody may see, and secrets, which go into .dvc/config.local."""

    url: str
    settings: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def add_to(self, checkout: Path, name: str, level: str = "repo") -> None:
        """Make it the remote `name` of a checkout, as `dvc remote add` and `dvc remote modify` do."""
        from dvc.repo import Repo

        with Repo(str(checkout)) as repo, repo.config.edit(level) as config:
            config["remote"][name] = {"url": self.url, "verify": "true", **self.settings}
            if level == "local":
                config["remote"][name] |= self.secrets
        if level == "repo":
            self.unlock(checkout, name)

    def unlock(self, checkout: Path, name: str, **other: str) -> None:
        """Put the secrets where git does not see them: `dvc remote modify --local`."""
        from dvc.repo import Repo

        if self.secrets or other:
            with Repo(str(checkout)) as repo, repo.config.edit("local") as config:
                config["remote"][name] = {**self.secrets, **other}


def free_ports(count: int, apart: int = 0) -> list[int]:
    """Ports that nobody listens on; with `apart`, the port that many above each is free too."""
    found: list[int] = []
    while len(found) < count:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(2 if apart else 1)]
            try:
                sockets[0].bind(("127.0.0.1", 0))
                port = sockets[0].getsockname()[1]
                if apart:
                    sockets[1].bind(("127.0.0.1", port + apart))
            except (OSError, OverflowError):
                continue
        if port not in found:
            found.append(port)
    return found


@contextmanager
def running(
    command: list[str], ready: Callable[[], bool], log: Path, user: str | None = None, **environment: str
) -> Iterator[subprocess.Popen]:
    """A server process, from the moment that it answers until the block is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **environment}, user=user, cwd=log.parent
        )
    try:
        end = time.monotonic() + PATIENCE
        while not ready():
            dead = process.poll() is not None
            assert not dead and time.monotonic() < end, f"{command[0]} does not start:\n{log.read_text()[-2000:]}"
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(address: str) -> bool:
    """Whether an HTTP server says anything, a refusal included."""
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def listens(port: int) -> bool:
    """Whether somebody accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -----------------------------------------------------------------------------
# remotes


@contextmanager
def local(folder: Path) -> Iterator[Remote]:
    """A folder: a disk, or a network drive that is mounted."""
    (folder / "files").mkdir(parents=True, exist_ok=True)
    yield Remote(str((folder / "files").resolve()))


@contextmanager
def s3(folder: Path, bucket: str = "whetstone") -> Iterator[Remote]:
    """SeaweedFS as an S3 with one bucket."""
    folder = folder.resolve()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    keys = {"accessKey": USER, "secretKey": SECRET}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = {"identities": [{"name": USER, "credentials": [keys], "actions": actions}]}
    (folder / "identities.json").write_text(json.dumps(identities))
    master, volume, filer, port = free_ports(4, apart=10000)  # each speaks gRPC 10,000 above
    command = [str(BIN / "weed"), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={folder / 'identities.json'}", f"-master.port={master}", f"-volume.port={volume}"]
    command += [f"-filer.port={filer}", f"-s3.port={port}", "-volume.max=16", "-master.volumeSizeLimitMB=256"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # or they take fixed ports
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": USER,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with running(command, partial(answers, endpoint), folder / "log"):
        make_bucket(endpoint, bucket)
        yield Remote(
            f"s3://{bucket}/dvc",
            {"endpointurl": endpoint, "region": "us-east-1"},
            {"access_key_id": USER, "secret_access_key": SECRET},
            environment,
        )


def make_bucket(endpoint: str, name: str) -> None:
    """Create a bucket, and wait until it takes files: the volumes come up after the gateway."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=USER,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 0}),
    )
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key="hello", Body=b"hello")
            client.delete_object(Bucket=name, Key="hello")
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


@contextmanager
def webdav(folder: Path) -> Iterator[Remote]:
    """WsgiDAV with a password. The collection that the address names has to exist."""
    folder = folder.resolve()
    (folder / "data" / "dvc").mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    settings = {
        "host": "127.0.0.1",
        "port": port,
        "provider_mapping": {"/": str(folder / "data")},
        "http_authenticator": {"accept_basic": True, "accept_digest": False, "default_to_digest": False},
        "simple_dc": {"user_mapping": {"*": {USER: {"password": SECRET}}}},
    }
    (folder / "wsgidav.json").write_text(json.dumps(settings))
    command = [str(BIN / "wsgidav"), "--config", str(folder / "wsgidav.json")]
    with running(command, partial(answers, f"http://127.0.0.1:{port}"), folder / "log"):
        yield Remote(f"webdav://127.0.0.1:{port}/dvc", {"user": USER}, {"password": SECRET})


@contextmanager
def ssh(folder: Path) -> Iterator[Remote]:
    """OpenSSH's server with a key of its own, for the user that runs this."""
    folder = folder.resolve()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (port,) = free_ports(1)
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'authorized_keys'}",
        "PasswordAuthentication no",
        "StrictModes no",
        "UsePAM no",
        "PermitRootLogin yes",
        "PidFile none",
        "Subsystem sftp internal-sftp",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where root's server leaves its privileges
    command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    with running(command, partial(listens, port), folder / "log"):
        yield Remote(
            f"ssh://{getpass.getuser()}@127.0.0.1:{port}{folder / 'data'}", {}, {"keyfile": str(folder / "user_key")}
        )


@contextmanager
def http(folder: Path) -> Iterator[Remote]:
    """The files of the remote `local`, for reading only."""
    files = (folder.parent / "local" / "files").resolve()
    files.mkdir(parents=True, exist_ok=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Remote(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


REMOTES = {"local": local, "s3": s3, "webdav": webdav, "ssh": ssh, "http": http}


# -----------------------------------------------------------------------------
# MLflow on PostgreSQL, artifacts on S3


def postgres_folder() -> Path | None:
    """Where PostgreSQL's programs are, None if it is not installed."""
    found = [Path(path).resolve().parent for path in [shutil.which("postgres")] if path]
    return next(iter([*found, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]), None)


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A database server; its address. It refuses to run as root, so root runs it as the user postgres."""
    programs = postgres_folder()
    assert programs is not None
    user = "postgres" if os.getuid() == 0 else None
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if user:
        shutil.chown(folder, user)
    (port,) = free_ports(1)
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-N"]
    subprocess.run(initdb, check=True, capture_output=True, user=user, cwd=folder)
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-F"]
    command += ["-c", "listen_addresses=127.0.0.1"]
    ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    with running(command, lambda: subprocess.run(ready).returncode == 0, folder / "log", user):
        yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"


@contextmanager
def mlflow_server(folder: Path, database: str, artifacts: str, environment: dict[str, str]) -> Iterator[str]:
    """MLflow's server in front of a database and a store of artifacts; its address."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", artifacts]
    address = f"http://127.0.0.1:{port}"
    with running(command, partial(answers, f"{address}/health"), folder / "log", None, **environment):
        yield address


# -----------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=REMOTES)
    kind = parser.parse_args().kind
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this process, however that ends
    checkout = Path.cwd()
    with REMOTES[kind](checkout / ".whetstone" / "remotes" / kind) as remote:
        remote.add_to(checkout, kind, "local")  # a port and a path of this machine are nothing for git
        print(f"the remote {kind!r} is {remote.url}: `dvc push -r {kind}`, `dvc pull -r {kind}`")
        if kind == "local":
            return
        print("it answers until you press Ctrl-C here; its files stay in .whetstone/remotes", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
