"""vLLM and llama-server's router in a thread: real HTTP on loopback, with the answers that their documentation gives.

vLLM: docs/features/lora.md at commit 05863f1 and vllm/entrypoints/openai/models/serving.py at commit 00153c8.
llama-server: tools/server/README.md at commit 00dc805, "Using multiple models". Neither program was run.
"""

import json
import threading
from configparser import RawConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeServer:
    """What both have in common: a list of models, and an answer of one of them. A context manager.

    Args:
        key: what --api-key was.
        silent: models that answer nothing.
    """

    def __init__(self, key: str | None = None, silent: tuple[str, ...] = ()) -> None:
        self.key, self.silent = key, silent
        self.encoding: str | None = None  # what a body claims to be compressed by
        self.asked: list[str] = []
        self.loaded: dict[str, str] = {}  # model → where it came from

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, body: Any) -> None:
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if fake.encoding:
                    self.send_header("Content-Encoding", fake.encoding)
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer(*fake.handle(self.path, None, self.headers.get("Authorization")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*fake.handle(self.path, body, self.headers.get("Authorization")))

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def handle(self, path: str, body: Any, authorization: str | None) -> tuple[int, Any]:
        if self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        route, _, query = path.partition("?")
        if route == "/v1/chat/completions":
            return self.chat(body["model"])
        return self.route(route, query, body)

    def chat(self, model: str) -> tuple[int, Any]:
        if model not in self.loaded:
            return error(404, "NotFoundError", f"The model `{model}` does not exist.")
        self.asked.append(model)
        content = "" if model in self.silent else f"I am {model}."
        return 200, {"model": model, "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}

    def route(self, route: str, query: str, body: Any) -> tuple[int, Any]:
        raise NotImplementedError


class FakeVllm(FakeServer):
    """`vllm serve BASE --enable-lora`.

    Args:
        updating: VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        max_lora_rank: what an adapter may have.
    """

    def __init__(self, base: str, updating: bool = True, max_lora_rank: int = 16, **more: Any) -> None:
        super().__init__(**more)
        self.base, self.updating, self.max_lora_rank = base, updating, max_lora_rank
        self.loaded[base] = base

    def route(self, route: str, query: str, body: Any) -> tuple[int, Any]:
        if route == "/v1/models":
            entries = [
                {"id": name, "object": "model", "root": root, "parent": self.base if name != self.base else None}
                for name, root in self.loaded.items()
            ]
            return 200, {"object": "list", "data": entries}
        if route not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") or not self.updating:
            return 404, {"detail": "Not Found"}
        name = body.get("lora_name")
        if route == "/v1/unload_lora_adapter":
            if name not in self.loaded:
                return error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
            del self.loaded[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        folder = body.get("lora_path")
        if not name or not folder:
            return error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.loaded and not body.get("load_inplace"):
            said = "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
            return error(400, "InvalidUserInput", f"The lora adapter '{name}' {said}")
        if not (Path(folder) / "adapter_config.json").is_file():
            return error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((Path(folder) / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            said = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return error(500, "InternalServerError", said)
        self.loaded[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."


class FakeLlamaRouter(FakeServer):
    """`llama-server --models-preset FILE`; `reload=1` reads the file again."""

    def __init__(self, presets: Path, **more: Any) -> None:
        super().__init__(**more)
        self.presets = presets
        self.options: dict[str, dict[str, str]] = {}

    def route(self, route: str, query: str, body: Any) -> tuple[int, Any]:
        if route not in ("/models", "/v1/models"):
            return error(404, "not_found_error", "File Not Found")
        if "reload=1" in query and self.presets.is_file():
            parser = RawConfigParser(delimiters=("=",))
            version, _, text = self.presets.read_text().partition("\n")
            assert version == "version = 1"
            parser.read_string(text)
            self.options = {name: dict(parser[name]) for name in parser.sections()}
            self.loaded = {name: options["model"] for name, options in self.options.items()}
        entries = [{"id": name, "path": path, "status": {"value": "unloaded"}} for name, path in self.loaded.items()]
        return 200, {"data": entries}


def error(status: int, kind: str, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
