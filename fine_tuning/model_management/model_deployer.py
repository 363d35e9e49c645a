"""One version onto one Ollama: nothing answers as `name:live` before it has proved itself as `name:version`."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import check_model_name
from fine_tuning.common.settings import Settings
from fine_tuning.model_management.answer_check import GREEDY, AnswersDiffer, compare_answers
from fine_tuning.model_management.packaging.chat_template import first_difference
from fine_tuning.runtime.base_model import gguf_field
from fine_tuning.runtime.ollama_store import damaged_blobs, stores

LIVE = "live"
OLDEST_SERVER = (0, 5, 5)  # the first whose /api/create takes `files`
# 0.32 was seen to hold the upload, its copy and what it verifies at once; of 0.25 to 0.31 nothing is known.
LAST_IN_PLACE = (0, 24)
SMOKE_TOKENS = 24

Progress = Callable[[int, int], None]


class DeploySettings(Settings):
    """Section `deploy` of params.yaml."""

    name: Annotated[str, AfterValidator(check_model_name)]
    host: str
    more_hosts: list[str]
    timeout: float = Field(gt=0)
    stream_timeout: float = Field(gt=0)


class ModelServer(Protocol):
    """What deploying and switching need of a server; `integration.ollama_client.OllamaClient` is one."""

    host: str

    def version(self) -> str: ...
    def digests(self) -> dict[str, str]: ...
    def upload_blob(self, path: Path, sha256: str, progress: Progress | None = None) -> bool: ...
    def create(self, model: str, request: dict[str, Any]) -> None: ...
    def show(self, model: str) -> dict[str, Any]: ...
    def render(self, model: str, messages: list[dict[str, Any]]) -> str | None: ...
    def chat(
        self, model: str, messages: list[dict[str, Any]], options: dict[str, Any] | None = None
    ) -> tuple[str, Any]: ...
    def copy(self, source: str, destination: str) -> None: ...
    def delete(self, model: str) -> bool: ...


@dataclass(frozen=True)
class Probe:
    """A conversation and what the model must be given for it: made with the tokenizer that trained the model."""

    messages: list[dict[str, Any]]
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Bundle:
    """What is deployed.

    Args:
        request: fields of /api/create (template, parameters, system, license); `model` and `files` are filled in here.
        recorded_digest: manifest digest of an earlier deployment to the same server.
    """

    version: int
    gguf: Path
    gguf_sha256: str
    request: dict[str, Any]
    probes: list[Probe]
    recorded_digest: str | None = None

    @property
    def identity(self) -> str:
        """What was uploaded and asked for, as a line that goes among the model's licences and stays with it. The
        manifest's digest depends on the server's version, which may rewrite the file."""
        request = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        return f"whetstone: gguf sha256:{self.gguf_sha256} request sha256:{request}"


@dataclass
class Deployment:
    """What came of it. `notes` are things that could not be proved, for a person to read."""

    model: str
    digest: str = ""
    server_version: str = ""
    uploaded: bool = False
    created: bool = False
    rendered: int = 0
    compared: int = 0
    prompt_tokens: int | None = None
    notes: list[str] = field(default_factory=list)


class ModelDeployer:
    """Deploys versions of one model to one server.

    Args:
        say: gets one line for each step.
        progress: gets (bytes sent, all bytes) of the upload.
        unproven: continue where the answers differ from the GGUF's or cannot be compared.
    """

    def __init__(
        self,
        server: ModelServer,
        name: str,
        say: Callable[[str], None] = lambda line: None,
        progress: Progress | None = None,
        *,
        unproven: bool = False,
    ) -> None:
        self.server = server
        self.name = check_model_name(name)
        self.live = f"{name}:{LIVE}"
        self._say = say
        self._progress = progress
        self._unproven = unproven

    def deploy(self, bundle: Bundle, record: Callable[[str], None] | None, live: bool = True) -> Deployment:
        """Upload, create `name:version`, prove it, `record` its digest, and make it `name:live`.

        Killed or failing at any step, `name:live` is what it was; running again takes up what is there.

        Args:
            record: keeps the manifest digest; called once the version is proved and before it goes live. None where
                no registry knows the version.
            live: False leaves `name:live` as it is, as for a canary.

        Raises:
            UserError: a step failed; says which and what to do.
        """
        done = Deployment(f"{self.name}:{bundle.version}")
        done.server_version = self.server.version()
        _check_server(done.server_version, self.server.host)
        self._say(f"1/9 Ollama {done.server_version} answers at {self.server.host}")
        before = self.server.digests()
        known = before.get(done.model)
        if known is None:
            self._create(bundle, done)
        elif known == bundle.recorded_digest or self._is(bundle, done.model):
            self._say(f"2/9 the file is there\n3/9 {done.model} is there, made of this very file")
        else:
            raise UserError(
                f"{self.server.host} has another model as {done.model}: `ollama rm {done.model}` if it is not needed, "
                "then deploy again; or set another deploy.name"
            )
        try:
            self._prove(bundle, done)
        except UserError:
            if done.created:
                with suppress(UserError):  # the server is down by now: the next deployment sees what is left
                    self.server.delete(done.model)
            raise
        if record is not None:
            record(done.digest)
        where = "not recorded: the registry here does not know it" if record is None else "recorded in the registry"
        self._say(f"7/9 manifest {done.digest[:12]} {where}")
        if not live:
            self._say(f"8/9 {self.live} stays as it is\n9/9 nothing to compare")
            return done
        go_live(self.server, done.model, self.live, done.digest)
        self._say(f"8/9 {self.live} is now {done.model}\n9/9 both names have one digest")
        return done

    def _is(self, bundle: Bundle, model: str) -> bool:
        """Whether a model that is there was made of this bundle, by this server or by one before its update."""
        return bundle.identity in str(self.server.show(model).get("license", "")).split("\n")

    def _create(self, bundle: Bundle, done: Deployment) -> None:
        _check_room(done.server_version, self.server.host, bundle.gguf.stat().st_size)
        done.uploaded = self.server.upload_blob(bundle.gguf, bundle.gguf_sha256, self._progress)
        self._say(f"2/9 the file {'was sent' if done.uploaded else 'is there'} ({bundle.gguf_sha256[:12]})")
        own = bundle.request.get("license") or []
        request = {
            **bundle.request,
            "files": {"model.gguf": f"sha256:{bundle.gguf_sha256}"},
            "license": [*([own] if isinstance(own, str) else own), bundle.identity],
        }
        try:
            self.server.create(done.model, request)
        except UserError as error:
            if "disk" in str(error):
                raise
            # While it copies, a server with a full disk fails without a word about disks.
            needed = _needed(done.server_version, bundle.gguf.stat().st_size) / 1e9
            hint = f"if its disk is full, make room there: it needs {needed:.1f} GB for this model"
            raise UserError(f"{error}; {hint}") from None
        done.created = True
        self._say(f"3/9 {done.model} was made")

    def _prove(self, bundle: Bundle, done: Deployment) -> None:
        self._check_shown(bundle, done)
        self._say("4/9 template and parameters are those of the bundle")
        self._check_rendering(bundle.probes, done)
        answered = self._smoke(bundle, done)
        digest = self.server.digests().get(done.model)
        if not digest:
            raise UserError(f"{self.server.host} lost {done.model} while it was tried: deploy again")
        done.digest = digest
        self._say(f"6/9 {answered}; {self._check_weights(bundle, done)}")

    def _check_weights(self, bundle: Bundle, done: Deployment) -> str:
        """See that the server's files are what was sent, by their hashes or by the answers that come of them. Returns
        what was done."""
        read = damaged_blobs(self.server.host, done.digest, bundle.gguf_sha256)
        if read and read[0]:
            raise UserError(f"{read[0][0]} is damaged: `{heal(done.model, read[0])}`, then deploy again")
        if read and done.rendered:
            return "its files have the hashes that they are named by"
        try:
            done.compared = compare_answers(self.server, done.model, bundle.gguf, bundle.probes)
        except UserError as error:
            # Shown prompts and a sent file leave little room for an error: only an answer proves one.
            if not self._unproven and (not done.rendered or isinstance(error, AnswersDiffer)):
                file = "" if read else f"its file may be damaged, `{heal(done.model)}` makes it again; "
                template = "" if done.rendered else "it may write other prompts than training, a newer one shows them; "
                raise UserError(
                    f"{error}: {file}{template}`python -m fine_tuning deploy --unproven` goes live all the same"
                ) from None
            done.notes.append(f"the answers are not proved: {error}")
            return "its answers were not proved"
        if not read and done.rendered:
            done.notes.append("Ollama's files cannot be read from here: the answers were compared instead")
        return f"{done.compared} tokens of its answers are those of the GGUF"

    def _check_shown(self, bundle: Bundle, done: Deployment) -> None:
        shown, request = self.server.show(done.model), bundle.request
        template = shown.get("template", "")
        if template != request.get("template", ""):
            if template != gguf_field(bundle.gguf, "tokenizer.chat_template"):
                raise UserError(f"{self.server.host} changed the template of {done.model}: update Ollama, deploy again")
            # Servers from 0.30 on take the GGUF's own template where it can do more, such as calling tools.
            done.notes.append("this Ollama writes prompts by the GGUF's own chat template")
        have = shown_parameters(str(shown.get("parameters") or ""))
        for key, value in (request.get("parameters") or {}).items():
            wanted = value if isinstance(value, list) else [value]
            if sorted(map(_plain, have.get(key, []))) != sorted(map(_plain, wanted)):
                raise UserError(f"{self.server.host} changed {key} of {done.model}: update Ollama, then deploy again")

    def _check_rendering(self, probes: list[Probe], done: Deployment) -> None:
        for probe in probes:
            rendered = self.server.render(done.model, probe.messages)
            if rendered is None:
                done.rendered = 0
                done.notes.append("this Ollama does not show its prompts: the answers were compared instead")
                self._say("5/9 this Ollama does not show its prompts")
                return
            if rendered != probe.prompt:  # probes are made up, so their text may be shown
                at = first_difference(rendered, probe.prompt)
                shown = f"at character {at} it has {rendered[at : at + 24]!r}, not {probe.prompt[at : at + 24]!r}"
                raise UserError(f"{done.model} gets another prompt than in training: {shown}: deploy no further")
            done.rendered += 1
        self._say(f"5/9 {done.rendered} prompts are rendered as in training")

    def _smoke(self, bundle: Bundle, done: Deployment) -> str:
        probe = bundle.probes[0]
        options = {**GREEDY, "num_predict": SMOKE_TOKENS}
        reply, stats = self.server.chat(done.model, probe.messages, options)
        if not stats.reply_tokens and not reply:
            raise UserError(f"{done.model} answers nothing: look at Ollama's log, then deploy again")
        stops = (bundle.request.get("parameters") or {}).get("stop") or []
        leaked = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop in reply]
        if leaked:
            raise UserError(f"{done.model} writes its own stop {leaked[0]!r}: check package parameters, repro again")
        done.prompt_tokens = stats.prompt_tokens
        if stats.prompt_tokens is None or stats.prompt_tokens < probe.tokens:
            done.notes.append(f"the prompt has {probe.tokens} tokens, Ollama counted {stats.prompt_tokens} (cached?)")
        elif stats.prompt_tokens > probe.tokens:
            raise UserError(
                f"{done.model} reads {stats.prompt_tokens} tokens where training had {probe.tokens}: "
                "a doubled BOS? run `dvc repro -f -s package && dvc repro`, then promote again"
            )
        return f"it answers ({stats.prompt_tokens} prompt tokens, {stats.reply_tokens} reply tokens)"


def heal(model: str, blobs: Sequence[Path] = ()) -> str:
    """The commands that rid a server of a model's damaged files: it keeps a file while a name needs it, and takes it
    for the next model of the same content."""
    files = " ".join(map(str, blobs)) or f"$(ollama show --modelfile {model} | sed -n 's/^FROM //p')"
    return f"rm -f {files}; ollama rm {model}"


def go_live(server: ModelServer, model: str, live: str, digest: str) -> None:
    """Point `live` at `model` and see that both have `digest`; if not, put back what was live. Raises UserError if
    `model` is not what it should be, or the copy came out different."""
    before = server.digests()
    if before.get(model) != digest:
        raise UserError(f"{model} on {server.host} is not what was deployed there: `ollama rm {model}`, then deploy it")
    if before.get(live) == digest:
        return
    server.copy(model, live)
    after = server.digests()
    if after.get(live) == digest:
        return
    old = next((name for name, known in before.items() if known == before.get(live) and name != live), None)
    if old:
        server.copy(old, live)
    raise UserError(f"{server.host} made {live} from {model} and they differ: look at its log, then deploy again")


def shown_parameters(text: str) -> dict[str, list[Any]]:
    """The lines of /api/show's `parameters`: a name and a value, text values quoted, repeated names for lists."""
    found: dict[str, list[Any]] = {}
    for line in text.split("\n"):
        key, _, value = map(str.strip, line.strip().partition(" "))
        if key:
            with suppress(ValueError):
                value = json.loads(value)
            found.setdefault(key, []).append(value)
    return found


def _plain(value: Any) -> str:
    """A parameter as text that is the same for 1, 1.0 and 1e+00: Go prints numbers otherwise than Python."""
    return f"{value:.6g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _check_server(version: str, host: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers and (0, 0, 0) < tuple(map(int, numbers.groups())) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise UserError(f"Ollama {version} at {host} is too old: update it to {oldest} or newer")


def _needed(version: str, size: int) -> int:
    """Bytes of disk that a server needs to make a model of a file."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return size * (1 if (0, 0) < numbers <= LAST_IN_PLACE else 3)


def _check_room(version: str, host: str, size: int) -> None:
    """Refuse what this machine's Ollama has no room for: with a full disk it fails without saying why. Where its store
    is not on this machine, or not readable, nothing is known."""
    needed = _needed(version, size)
    rooms = [(shutil.disk_usage(store).free, store) for store in stores(host)]
    if rooms and max(rooms)[0] < needed:
        free, store = max(rooms)
        raise UserError(
            f"Ollama {version} needs {needed / 1e9:.1f} GB for this model, and {free / 1e9:.1f} GB are left in {store}:"
            " make room (`python -m fine_tuning prune`), then deploy again"
        )
