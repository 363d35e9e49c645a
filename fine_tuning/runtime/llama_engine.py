"""llama.cpp as an engine: one GGUF in a child process, used by evaluation, the parity proof and the chat app.

    with LlamaEngine(Path("models/package/model.gguf"), context=512, threads=1, slots=4) as engine:
        print(engine.complete("Once upon a time", max_tokens=32).text)

A separate process can be ended cleanly: its memory is freed when the block is left, it ends when its parent
dies, and a crash inside llama.cpp is an error here, not the end of the program.
"""

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from fine_tuning.common.errors import UserError
from fine_tuning.runtime import llama_server


@dataclass(frozen=True)
class Completion:
    """A generated text. `finished` is true when the model ended it itself, by its end token or a stop string."""

    text: str
    ids: list[int]
    finished: bool


@dataclass(frozen=True)
class TokenScore:
    """Natural-log probability of one given token, and whether it was the model's first choice."""

    logprob: float
    first: bool


@dataclass(frozen=True)
class Token:
    """A next token, the bytes that it writes (none for a control token), and its natural-log probability."""

    id: int
    text: bytes
    logprob: float


Result = TypeVar("Result")
GREEDY = {"temperature": 0, "samplers": ["temperature"]}


class LlamaEngine:
    """A running llama.cpp server for one GGUF, a context manager.

    Args:
        gguf: the model file.
        context: tokens that one conversation may hold, prompt and reply together.
        threads: one for each core that is free; more than that and llama.cpp spins.
        slots: conversations computed side by side.
        timeout: seconds that starting and any single answer may take.
        adapters: GGUF files of LoRA adapters, all applied in full where a request has no `lora`, or an empty one.
            `lora=[{"id": 0, "scale": 1.0}]` is the first one alone, with a scale of 0.0 the model without any.

    Raises:
        UserError: the file is missing or no usable GGUF, the process died, or a time-out passed.
    """

    def __init__(
        self,
        gguf: Path,
        context: int,
        threads: int,
        slots: int = 1,
        timeout: float = 300.0,
        adapters: Sequence[Path] = (),
    ) -> None:
        self.gguf, self.adapters = Path(gguf), [Path(adapter) for adapter in adapters]
        self.context = context
        self.slots = slots
        self.timeout = timeout
        self.api_key = secrets.token_urlsafe(24)
        self.base_url = ""
        self._request = {"gguf": str(self.gguf.resolve()), "context": context, "threads": threads, "slots": slots}
        self._request |= {"api_key": self.api_key, "adapters": [str(path.resolve()) for path in self.adapters]}
        self._process: subprocess.Popen[str] | None = None
        self._client: httpx.Client | None = None

    # ---------------------------------------------------------------- life

    def __enter__(self) -> "LlamaEngine":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> "LlamaEngine":
        """Load the model and wait until it answers. Without a `with` block, call close()."""
        for path in (self.gguf, *self.adapters):
            if not path.is_file():
                raise UserError(f"{path} is missing: run `dvc repro`, or `dvc pull` where it was made elsewhere")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        command, pipe = [sys.executable, "-P", llama_server.__file__], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        try:
            answer = self._greet(self._process)
        except BaseException:
            self.close()
            raise
        self.base_url = answer["address"]
        # Never through a proxy: the address is this machine. A connection that idles too long breaks: one a request.
        self._client = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        return self

    def _greet(self, process: subprocess.Popen[str]) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(self.timeout, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(self._request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timed_out = not late.is_alive()
            late.cancel()
        if timed_out:
            raise UserError(f"{self.gguf} did not load within {self.timeout:g} s: free the processor and try again")
        if not line:
            raise UserError(f"llama.cpp died while loading {self.gguf}{self._last_words()}: free memory and try again")
        answer = json.loads(line)
        if "error" in answer:
            reason = self._last_words() or f" ({answer['error']})"
            raise UserError(
                f"{self.gguf} is not a GGUF file that llama.cpp can load{reason}: build it again with `dvc repro`"
            )
        return answer

    def close(self) -> None:
        """End the process and free its memory. Calling it again does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()
        if self._client is not None:
            self._client.close()

    @property
    def files(self) -> str:
        """Names of the files that it runs."""
        return " with ".join(path.name for path in (self.gguf, *self.adapters))

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None when closed."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the process runs; false after close() and after a crash."""
        return self._process is not None and self._process.poll() is None

    def _last_words(self) -> str:
        """The first error line of llama.cpp's log, in brackets; it names the cause, those after it the consequences."""
        self._log.seek(0)
        for line in self._log.read().decode("utf-8", "replace").splitlines():
            stamp, _, words = line.partition(" E ")
            if words and stamp.replace(".", "").isdigit():
                return f" ({words.strip()[:200]})"
        return ""

    # ---------------------------------------------------------------- requests

    @contextlib.contextmanager
    def _answer(self, path: str, body: dict[str, Any]) -> Iterator[httpx.Response]:
        if self._process is None or self._client is None:
            raise RuntimeError("the engine is not running: use it inside its `with` block")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        url, content = self.base_url + path, json.dumps(body)
        try:
            with self._client.stream("POST", url, content=content, headers=headers, timeout=self.timeout) as response:
                if response.is_error:
                    raise self._refused(response)
                yield response
        except httpx.TransportError as error:
            raise self._broken(error) from None

    def _refused(self, response: httpx.Response) -> UserError:
        try:
            problem = json.loads(response.read())["error"]
        except (ValueError, KeyError, TypeError):
            problem = {}
        if problem.get("type") == "exceed_context_size_error":
            most, advice = self.context, f"the context of {self.context}: shorten it, or raise"
            if (
                trained := problem.get("n_ctx", most)
            ) < most:  # llama.cpp goes no further than the model was trained for
                advice = f"the {trained} that {self.gguf.name} was made for: lower"
            tokens = problem.get("n_prompt_tokens")
            return UserError(f"a prompt of {tokens} tokens exceeds {advice} chat.max_length in params.yaml")
        return UserError(
            f"llama.cpp refused a request (HTTP {response.status_code}): {problem.get('message', 'no reason given')}"
        )

    def _broken(self, error: Exception) -> UserError:
        if isinstance(error, httpx.TimeoutException):
            return UserError(
                f"{self.gguf.name} gave no answer within {self.timeout:g} s: ask for fewer tokens or free the processor"
            )
        try:
            status = self._process.wait(timeout=1) if self._process else 0
        except subprocess.TimeoutExpired:
            return UserError(f"the connection to llama.cpp broke ({type(error).__name__}): try again")
        return UserError(f"llama.cpp died (exit status {status}) with {self.gguf.name}: free memory and try again")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._answer(path, body) as response:
            return json.loads(response.read())

    # ---------------------------------------------------------------- what it can do

    def tokenize(self, text: str, parse_special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of `text`. `parse_special` reads control tokens; `add_special` puts the model's own BOS first."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._post("/tokenize", body)["tokens"]

    def score(self, prompt: Sequence[int], target: Sequence[int]) -> list[TokenScore]:
        """Log-probability of each token of `target` after `prompt` and the tokens of `target` before it.

        A teacher-forced score of what is shipped, in the runtime that it is shipped for. `target` may end with an
        end-of-turn token; one in its middle is refused by llama.cpp.
        """
        return [
            TokenScore(step["logprob"], step["top_logprobs"][0]["id"] == step["id"])
            for step in self._forced(prompt, target, 1)
        ]

    def forced_logprobs(self, prompt: Sequence[int], target: Sequence[int], n: int) -> list[list[tuple[int, float]]]:
        """The `n` likeliest tokens with natural-log probabilities before each token of `target`, which is forced."""
        return [
            [(top["id"], top["logprob"]) for top in step["top_logprobs"]] for step in self._forced(prompt, target, n)
        ]

    def _forced(self, prompt: Sequence[int], target: Sequence[int], n: int) -> list[dict[str, Any]]:
        """A step for each token of `target`: its id, its logprob and the `n` top_logprobs.

        A grammar of these very tokens forces the answer, and the probabilities are those from before the grammar.
        llama.cpp's grammars refuse a token that ends inside a character, or its server leaves the token out of the
        answer: then every token is asked for alone.
        """
        *body, last = target
        forced = {
            "prompt": list(prompt),
            "n_predict": len(target),
            "n_probs": n,
            "post_sampling_probs": False,
            "return_tokens": True,
            # The end of a grammar admits every end token: the bias chooses the one that is wanted.
            "grammar": "root ::= " + " ".join(f"<[{token}]>" for token in body) + f" <[{last}]>?",
            "logit_bias": [[last, 1000.0]],
        }
        try:
            answer = self._post("/completion", GREEDY | forced)
        except UserError as error:
            if "grammar" not in str(error):
                raise
        else:
            if answer["tokens"] == list(target) and len(answer["completion_probabilities"]) == len(target):
                return answer["completion_probabilities"]
        return [self._next([*prompt, *target[:place]], token, n) for place, token in enumerate(target)]

    def _next(self, prompt: list[int], token: int, n: int) -> dict[str, Any]:
        """One step of `_forced`. The answer is a whole character, since half of one would be held back."""
        body = {"prompt": prompt, "n_predict": 1, "post_sampling_probs": False, "logit_bias": [[self._letter, 1000.0]]}
        for wanted in (max(n, 200), 1 << 20):  # nearly always among the likeliest, else among all
            answer = self._post("/completion", GREEDY | body | {"n_probs": wanted})
            tops = answer["completion_probabilities"][0]["top_logprobs"]
            if found := [top["logprob"] for top in tops if top["id"] == token]:
                break
        return {"id": token, "logprob": found[0], "top_logprobs": tops[:n]}

    @cached_property
    def _letter(self) -> int:
        return self.tokenize("a")[-1]

    def ends_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether a reply is over for llama.cpp when the model writes `token` after `prompt`."""
        body = {"prompt": list(prompt), "n_predict": 2, "logit_bias": [[token, 1000.0]]}
        return self._post("/completion", GREEDY | body)["stop_type"] == "eos"

    def greedy(self, prompt: Sequence[int], max_tokens: int, n: int) -> list[list[Token]]:
        """The likeliest reply to `prompt`: for each of its tokens the `n` likeliest ones, the chosen one first."""
        body = {"prompt": list(prompt), "n_predict": max_tokens, "n_probs": n, "post_sampling_probs": False}
        answer = self._post("/completion", GREEDY | body)
        return [
            [Token(top["id"], bytes(top["bytes"]), top["logprob"]) for top in [step, *step["top_logprobs"]]]
            for step in answer["completion_probabilities"]
        ]

    def score_many(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], on_done: Callable[[int], None] | None = None
    ) -> list[list[TokenScore]]:
        """Score all (prompt, target) pairs, as many side by side as there are slots."""
        return self._side_by_side(lambda pair: self.score(*pair), pairs, on_done)

    def complete(self, prompt: Sequence[int] | str, max_tokens: int, **sampling: Any) -> Completion:
        """Continue `prompt`, greedily unless `temperature` and `seed` say otherwise.

        Token ids are taken as they are; text gets the model's BOS.
        """
        given = prompt if isinstance(prompt, str) else list(prompt)
        body = {"prompt": given, "n_predict": max_tokens, "return_tokens": True}
        answer = self._post("/completion", GREEDY | body | sampling)
        return Completion(answer["content"], answer["tokens"], answer["stop_type"] in ("eos", "word"))

    def complete_many(
        self,
        prompts: Sequence[Sequence[int] | str],
        max_tokens: int,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Complete all `prompts`, as many side by side as there are slots; `on_done(1)` is called as each ends."""
        return self._side_by_side(lambda prompt: self.complete(prompt, max_tokens), prompts, on_done)

    def _side_by_side(
        self, work: Callable[[Any], Result], tasks: Sequence[Any], on_done: Callable[[int], None] | None
    ) -> list[Result]:
        def one(task: Any) -> Result:
            result = work(task)
            if on_done is not None:
                on_done(1)
            return result

        pool = ThreadPoolExecutor(max_workers=self.slots)
        try:
            return list(pool.map(one, tasks))
        finally:
            pool.shutdown(cancel_futures=True)

    def complete_stream(self, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> Iterator[str]:
        """Yield the continuation of exactly these token ids piece by piece. Closing the iterator stops the model.

        Args:
            sampling: by llama.cpp's names, such as temperature, top_p, top_k, repeat_penalty, seed and stop. What is
                None or left out has llama.cpp's default.

        Raises:
            UserError: as complete(), also when the stream breaks off before its end.
        """
        given = {name: value for name, value in sampling.items() if value is not None}
        body = {"prompt": list(prompt), "n_predict": max_tokens, "stream": True, **given}
        for event in self._events("/completion", body):
            if event["content"]:
                yield event["content"]
            if event["stop"]:
                return

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON events of a streamed answer, until the caller has seen its last one."""
        rest = b""
        with self._answer(path, body) as response:
            for chunk in response.iter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "error" in event:
                            reason = event["error"].get("message", "no reason given")
                            raise UserError(f"llama.cpp broke off: {reason}")
                        yield event
        raise self._broken(ConnectionError("the stream ended early"))
