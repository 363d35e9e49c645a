"""The part of the Hugging Face hub's API that `huggingface_hub` needs to make a repository, upload and download.

Its routes are those that huggingface_hub 2.4 calls (hf_api.py, _commit_api.py, lfs.py, file_download.py) without Xet,
the hub's own storage protocol: set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

LARGE = (".safetensors", ".gguf", ".parquet")


@dataclass
class Repository:
    """One repository: whether it is private, and the files of each commit, the newest last."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, changed: dict[str, bytes]) -> str:
        files = {**(list(self.commits.values())[-1] if self.commits else {}), **changed}
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = list(self.commits)[-1] if revision == "main" else revision
        return sha, self.commits[sha]


@dataclass
class Hub:
    """A hub with its repositories by kind and name, such as models/me/chat; without the token, nobody may write."""

    token: str = "hf_secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def post(self, path: str, body: bytes, authorised: bool) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if not authorised:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            key = f"{asked.get('type', 'model')}s/{name}"
            known = key in self.repositories
            if not known:
                self.repositories[key] = Repository(asked.get("visibility") == "private")
                self.repositories[key].commit({})
            return (409 if known else 200), {"url": f"{self.url}/{key.removeprefix('models/')}", "name": name}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(entry) for entry in json.loads(body)["objects"]]}
        kind, owner, name, action, _ = re.fullmatch(r"/api/(\w+)/([^/]+)/([^/]+)/(\w+)/(.+)", path).groups()
        key = f"{kind}/{owner}/{name}"
        if action == "preupload":
            files = [entry["path"] for entry in json.loads(body)["files"]]
            mode = {file: "lfs" if file.endswith(LARGE) else "regular" for file in files}
            return 200, {"files": [{"path": f, "uploadMode": mode[f], "shouldIgnore": False} for f in files]}
        changed = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.objects[value["oid"]]
        sha = self.repositories[key].commit(changed)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{owner}/{name}/commit/{sha}"}

    def _upload(self, entry: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}
        return entry if entry["oid"] in self.objects else {**entry, "actions": actions}

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a question."""
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            key, what, revision = found.groups()
            if key not in self.repositories:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            sha, files = self.repositories[key].at(revision or "main")
            about = {"id": key.partition("/")[2], "sha": sha, "private": self.repositories[key].private}
            about |= {"siblings": [{"rfilename": name} for name in files]}
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return 200, {}, json.dumps(tree if what == "tree" else about).encode()
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = found.groups()
            key = f"{(kind or 'models/')}{name}"
            if key not in self.repositories:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            sha, files = self.repositories[key].at(revision)
            if file not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
            return 200, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}, files[file]
        return 404, {}, b""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on loopback; its `url` is the HF_ENDPOINT."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_GET(self) -> None:
            self.answer(*hub.get(self.path.partition("?")[0]))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            authorised = self.headers.get("Authorization") == f"Bearer {hub.token}"
            status, said = hub.post(self.path.partition("?")[0], self.body(), authorised)
            self.answer(status, {"Content-Type": "application/json"}, json.dumps(said).encode())

        def do_PUT(self) -> None:
            data = self.body()
            right = hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
            hub.objects[self.path.rpartition("/")[2]] = data
            self.answer(200 if right else 400, {}, b"")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()
