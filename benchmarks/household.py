"""A simulated household: people with planted tastes chat through the gateway, and rounds make their model better.

    python -m benchmarks.household [--rounds 10] [--chats 240] [--folder DIR]

Real gateway, git, DVC, training, verdict, registry, canary and llama.cpp, on a base of a hundred thousand parameters
that was taught a small language: it answers most questions with 25 polite words. The people like replies of at most 12
words: they give thumbs, and write replies of their own in place of others. Five conversations in a hundred are a
hostile person's, who likes and dislikes the opposite. On the way: the model's server breaks off and is gone, a round
and the gateway are killed (SIGKILL), a disk is full, and somebody imports 600 preferences for replies that nobody
likes, and gives their candidate half of the conversations although the verdict holds it; they are
forgotten after the canary has taken it back. An hour, in which a canary waits for signals, lasts two seconds here;
everything else is as in params.yaml but for what `PARAMETERS` says.

Printed: for each round the share of thumbs that are up with its 95 % interval (Wilson), the verdict and how the canary
ended; what was checked; the repository's log. The exit status is 1 where a check failed.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from scipy.stats import binomtest

from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_object, write_jsonl
from fine_tuning.common.writing_systems import words_of
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import shard_paths
from fine_tuning.integration.canary import ENOUGH, ROLLED_BACK, Canary, State
from fine_tuning.integration.round_policy import BEFORE
from tests.fake_ollama import FakeOllama, Manifest
from tests.forked import INTERPRETER
from tests.project import new_project
from tests.servers import free_ports
from tests.tiny import write_tiny_base

THINGS = (
    "printer", "router", "screen", "keyboard", "battery", "camera", "speaker", "charger", "lamp", "kettle", "heater",
    "fan", "radio", "clock", "phone", "bike",
)  # fmt: skip
PLACES = (
    "kitchen", "hall", "office", "garage", "attic", "cellar", "bedroom", "garden", "shed", "bathroom", "studio", "barn",
)  # fmt: skip
QUESTIONS = (
    "How do I {} the {} in the {}?", "Tell me how to {} the {} in our {}.", "Can you {} a {} for the {}?",
    "What is the best way to {} the {} of the {}?",
)  # fmt: skip
# What is asked for; what the base says to do; and what the people say, in words of their own.
ADVICE = {
    "restart": ("hold the power button for ten seconds", "Unplug, count slowly, plug back, {} wakes up"),
    "clean": ("wipe all sides with a dry cloth", "Dust gently every week, {} stays bright"),
    "repair": ("replace the broken cable with another one", "Bring tools, swap wires, {} works again"),
    "store": ("keep everything in a dry box", "Wrap warm, shelve high, {} sleeps safe"),
    "test": ("switch on the power and listen closely", "Press once, watch lights, {} should hum"),
    "move": ("carry the heavy side with both hands", "Lift together, walk slow, {} arrives whole"),
}
LONG = "Thank you for this question about the {thing}. It might help to {advice}. Please ask me again for more help."
MOST_WORDS = 12  # of a reply that the people like
PEOPLE, HOSTILE, HOSTILE_SHARE = ("ann", "ben", "cem", "dora"), "eve", 0.05
POISON, POISONER = 600, "mallory"
HOUR = 2.0  # seconds
PARAMETERS: dict[str, dict[str, Any]] = {
    # The language is small: conversations are alike.
    "clean": {"near_duplicate_threshold": 1.1, "processes": 1},
    "prepare": {"decontamination_words": 0, "test_fraction": 0.3},
    "train": {"max_steps": None, "learning_rate": 2e-4},
    # The base knows nothing general, and what is said by heart here is the language.
    "evaluate": {
        "forgetting": False, "quantised_items": 16, "other_histories": 50,
        "memory": {"conversations": 0}, "generation": {"items": 8, "max_tokens": 48, "slots": 1},
        "prompting_baselines": {"system_prompt": None, "examples": 0, "items": 40},
    },
    "rounds": {"promote": "canary", "min_conversations": 20, "hours": "0-0"},
}  # fmt: skip
SOON = f"""
from fine_tuning.integration import canary, round_policy
canary.SIGNAL_SECONDS = {HOUR}
round_policy.FIRST_PAUSE = 0.0
"""
GATEWAY = """
from fine_tuning.commands import command_line
command_line.run(command_line.parse(["gateway", "--port", "PORT"]))
"""
STEP = """
from pathlib import Path
from fine_tuning.commands.rounds import step
from fine_tuning.common.settings import read_params
print(step(Path.cwd(), read_params("rounds", round_policy.RoundsSettings)))
"""
FORCED = """
from fine_tuning.commands import command_line
from fine_tuning.commands.promote import promote_candidate
from fine_tuning.common.settings import read_params
from fine_tuning.model_management.model_deployer import DeploySettings
from fine_tuning.model_management.model_registry import open_registry
registry = open_registry(read_params("deploy", DeploySettings).name)
promote_candidate(registry, "let us see", "mallory", register_only=True)
command_line.run(command_line.parse(["deploy", str(registry.by_alias("candidate").number), "--canary"]))
"""
FULL = 400_000
FULL_DISK = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({FULL}, {FULL}))
"""
# By round, names of methods: what happens in the middle of its chats, and before it.
FAULTS: dict[int, tuple[list[str], list[str]]] = {
    2: ([], ["killed round"]), 3: (["broken upstream"], []), 4: ([], ["full disk"]), 5: (["killed gateway"], []),
    6: (["poison"], []), 7: (["forced canary"], ["poison forgotten"]),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# the language, and the base that speaks it


@dataclass(frozen=True)
class Asked:
    """A question about a thing, and the replies to it that there are."""

    form: str
    verb: str
    thing: str
    place: str

    @property
    def text(self) -> str:
        return self.form.format(self.verb, self.thing, self.place)

    @property
    def long(self) -> str:
        return LONG.format(thing=self.thing, advice=ADVICE[self.verb][0])

    @property
    def short(self) -> str:
        return ADVICE[self.verb][1].format(self.thing) + "."

    def messages(self, reply: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}, {"role": "assistant", "content": reply}]


def questions(seed: int) -> list[Asked]:
    """Every question of the language, in an order of its own."""
    every = [Asked(*words) for words in itertools.product(QUESTIONS, ADVICE, THINGS, PLACES)]
    random.Random(seed).shuffle(every)
    return every


def short_share(thing: str) -> float:
    """How often the base was taught a short reply about a thing: 3 % to 63 %."""
    return 0.03 + 0.6 * THINGS.index(thing) / (len(THINGS) - 1)


def write_base(folder: Path, steps: int) -> Path:
    """A base of the tests that was taught the language."""
    import torch
    from transformers import AutoModelForCausalLM

    from fine_tuning.schema.chat_format import encode_conversation, load_tokenizer

    rng, some = random.Random(1), questions(1)[:500]
    write_tiny_base(folder, text="\n".join(text for asked in some for text in (asked.text, asked.long, asked.short)))
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    encoded = [
        [encode_conversation(tokenizer, asked.messages(reply), None, 512) for reply in (asked.long, asked.short)]
        for asked in some
    ]
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        batch = rng.sample(range(len(some)), 24)
        chosen = [encoded[number][rng.random() < short_share(some[number].thing)] for number in batch]
        longest = max(len(one.input_ids) for one in chosen)
        ids, labels = (
            torch.tensor([values + [filler] * (longest - len(values)) for values in lists])
            for lists, filler in (
                ([one.input_ids for one in chosen], tokenizer.pad_token_id),
                ([one.labels for one in chosen], -100),
            )
        )
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    print(f"the base speaks the language: {loss.item():.2f} nats a token", file=sys.stderr, flush=True)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# the household


@dataclass
class Told:
    """What a person was given, and what the gateway acknowledged of what the person said of it."""

    conversation: str
    question: str
    reply: str
    rating: int | None = None
    correction: str | None = None


@dataclass
class Day:
    """What came of the chats up to a round, and of the round."""

    chats: int = 0
    up: int = 0
    down: int = 0
    failed: int = 0
    models: set[str] = field(default_factory=set)
    canary: str = ""
    verdict: str = ""
    happened: str = ""

    @property
    def liked(self) -> str:
        if not (thumbs := self.up + self.down):
            return "no thumbs"
        interval = binomtest(self.up, thumbs).proportion_ci(method="wilson")
        return f"{self.up / thumbs:.0%} ({interval.low:.0%} to {interval.high:.0%})"


class Household:
    """People, a gateway, a model's server and a checkout with rounds."""

    def __init__(self, base: Path, folder: Path, ollama: FakeOllama, chats: int) -> None:
        self.ollama, self.chats = ollama, chats
        self.draw, self.asked = random.Random(3), iter(questions(3))
        self.told: dict[str, Told] = {}
        self.days: list[Day] = []
        self.problems: list[str] = []
        (folder / "checkout").mkdir()
        self.project = new_project(folder / "checkout", base)
        self.project.set_params(**PARAMETERS, deploy={"host": ollama.host})
        self.checkout = self.project.folder
        self.project.commit("The household's parameters")
        self.project.run("dvc", "repro", "base")
        self.serve_base()
        self.canary = Canary(self.checkout)
        self.gateway: subprocess.Popen[str] | None = None
        (self.port,) = free_ports(1)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=30)

    def serve_base(self) -> None:
        """Put the base on the server, which people talk to until there is something better."""
        from fine_tuning.model_management.packaging.chat_template import derive_template
        from fine_tuning.schema.chat_format import load_tokenizer, render

        place = self.checkout / "models/base"
        tokenizer = load_tokenizer(place)
        template = derive_template(lambda said: render(tokenizer, said, None, add_generation_prompt=True).text)
        self.ollama.count_tokens = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
        gguf = (place / "base-Q8_0.gguf").read_bytes()
        self.ollama.blobs["sha256:base"] = gguf
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:base", "size": len(gguf)}
        self.ollama.manifests["base:latest"] = Manifest([layer], template, "", {"stop": ["<|im_end|>"]})

    # ------------------------------------------------------------------------------------------------------- processes

    def environment(self) -> dict[str, str]:
        """Of processes that are killed: they fork from nothing."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_", "OLLAMA"))}
        return kept | {"PATH": os.pathsep.join((str(Path(INTERPRETER).parent), os.environ["PATH"]))}

    def start_gateway(self) -> None:
        program = SOON + GATEWAY.replace("PORT", str(self.port))
        self.gateway = subprocess.Popen(
            [INTERPRETER, "-c", program], cwd=self.checkout, env=self.environment(), stdout=subprocess.PIPE, text=True
        )
        assert self.gateway.stdout is not None and self.gateway.stdout.readline().startswith("gateway ")

    def stop_gateway(self, sign: int = signal.SIGTERM) -> None:
        if self.gateway is not None:
            self.gateway.send_signal(sign)
            self.gateway.wait()

    def step(self) -> str:
        """What `rounds --watch` does once a minute; what it waits for then."""
        return waits_of(self.project.run("python", "-c", SOON + STEP, check=False))

    # ----------------------------------------------------------------------------------------------------------- chats

    @property
    def live(self) -> str:
        return "whetstone:live" if "whetstone:live" in self.ollama.manifests else "base"

    def chat(self, day: Day) -> None:
        """One conversation, and what the person thinks of it."""
        asked = next(self.asked)
        hostile = self.draw.random() < HOSTILE_SHARE
        person = HOSTILE if hostile else self.draw.choice(PEOPLE)
        name = f"c{len(self.told) + day.failed}-{self.draw.randrange(10**6)}"
        headers = {"X-Whetstone-Conversation-Id": name, "X-OpenWebUI-User-Id": person}
        body = {"model": self.live, "messages": [{"role": "user", "content": asked.text}], "stream": False}
        try:
            answer = self.http.post("/api/chat", json=body, headers=headers)
            answer.raise_for_status()
        except httpx.HTTPError:
            day.failed += 1
            return
        reply, told = answer.json()["message"]["content"], answer.headers["x-whetstone-message-id"]
        self.told[told] = Told(name, asked.text, reply)
        day.chats += 1
        day.models.add(answer.json()["model"])
        self.judge(day, told, asked, hostile, person)

    def judge(self, day: Day, told: str, asked: Asked, hostile: bool, person: str) -> None:
        liked = (len(words_of(self.told[told].reply)) <= MOST_WORDS) != hostile
        said: dict[str, Any] = {}
        if self.draw.random() < 0.7:
            said["rating"] = 1 if liked else -1
        if not liked and not hostile and self.draw.random() < 0.5:
            said["correction"] = asked.short
        if not said:
            return
        with contextlib.suppress(httpx.HTTPError):
            answer = self.http.post("/v1/feedback", json={"message_id": told, "user": person} | said)
            if answer.status_code == 200:
                self.told[told].rating, self.told[told].correction = said.get("rating"), said.get("correction")
        day.up += said.get("rating") == 1
        day.down += said.get("rating") == -1

    # ---------------------------------------------------------------------------------------------------------- rounds

    def day(self, amid_chats: Sequence[str] = (), before_round: Sequence[str] = ()) -> Day:
        """Chats, until a canary has ended if one runs; then a round.

        Args:
            amid_chats, before_round: what happens then, see FAULTS.
        """
        day, began = Day(happened=", ".join([*amid_chats, *before_round])), None
        self.days.append(day)
        number = first = 0
        while number < self.chats or (self.running() and number < 8 * ENOUGH):
            for name in amid_chats if number == self.chats // 2 else ():
                getattr(self, name.replace(" ", "_"))(day)
            if began is None and (began := self.running()):
                first = number
            self.chat(day)
            number += 1
            if began and not self.running() and not day.canary:
                day.canary = f"{self.ended()} after {number - first} conversations"
        time.sleep(HOUR + 0.5)
        for name in before_round:
            getattr(self, name.replace(" ", "_"))(day)
        for _ in range(3):  # the first may only see that a canary is over
            said = self.step()
            if said == "[]":
                break
            print(f"round {len(self.days)} waits: {said[-300:]}", file=sys.stderr, flush=True)
            time.sleep(HOUR)
        else:
            self.problems.append(f"round {len(self.days)} did not run: {said[-300:]}")
        if began and not day.canary:
            day.canary = self.ended()
        day.verdict = str(read_object(self.checkout / "metrics/comparison.json").get("verdict"))
        self.check_state()
        return day

    def running(self) -> State | None:
        state = self.canary.state()
        return state if state is not None and state.outcome is None else None

    def ended(self) -> str:
        state = self.canary.state()
        assert state is not None
        return f"version {state.candidate} {state.outcome or 'runs'}"

    def check_state(self) -> None:
        """See that a round left nothing half done."""
        here, live = self.checkout, self.ollama.digest("whetstone:live")
        compared = read_object(here / "metrics/comparison.json").get("adapter_sha256")
        champion = read_object(here / "models/champion.json").get("version")
        wrong = {
            "git status says": self.project.run("git", "status", "--porcelain", "--untracked-files=no"),
            "dvc status says": self.project.run("dvc", "status", "-q", check=False),
            "a round is under way": (here / BEFORE).exists(),
            "another adapter was compared": compared != adapter_sha256(here),
            "another version is live than": champion
            and live != self.ollama.digest(f"whetstone:{champion}")
            and champion,
        }
        self.problems += [f"round {len(self.days)}: {what} {value}" for what, value in wrong.items() if value]

    # ---------------------------------------------------------------------------------------------------------- faults

    def broken_upstream(self, day: Day) -> None:
        """The server fails, hangs up, and is gone for six conversations."""
        for fault in ("500", "reset"):
            self.ollama.faults["POST /api/chat"] = fault
            self.chat(day)
        self.ollama.__exit__()
        for _ in range(6):
            self.chat(day)
        self.ollama.__enter__()

    def killed_gateway(self, day: Day) -> None:
        """The gateway is killed while a reply comes through it."""
        asked = threading.Thread(target=self.chat, args=(day,))
        asked.start()
        time.sleep(0.02)
        self.stop_gateway(signal.SIGKILL)
        asked.join()
        self.chat(day)
        self.start_gateway()

    def killed_round(self, day: Day) -> None:
        """A round is killed, with all its processes, while it trains or later."""
        before = adapter_sha256(self.checkout)
        command = [INTERPRETER, "-m", "fine_tuning", "round"]
        output = subprocess.DEVNULL
        round_ = psutil.Popen(command, cwd=self.checkout, env=self.environment(), stdout=output, stderr=output)
        while round_.poll() is None and not (
            (self.checkout / BEFORE).exists() and (before is None or adapter_sha256(self.checkout) != before)
        ):
            time.sleep(0.05)
        time.sleep(self.draw.random() * 5)
        processes = [*round_.children(recursive=True), round_] if round_.is_running() else []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 30)
        if not (self.checkout / BEFORE).exists():
            self.problems.append("the round that was to be killed had ended")

    def full_disk(self, day: Day) -> None:
        """A round on a disk that takes no file longer than FULL bytes."""
        before = adapter_sha256(self.checkout)
        said = waits_of(self.project.run("python", "-c", FULL_DISK + SOON + STEP, check=False, forked=False))
        print(f"full disk: {said[-300:]}", file=sys.stderr, flush=True)
        if "it failed" not in said:
            self.problems.append(f"no round fails on a full disk: {said[-300:]}")
        # Where even going back needs space, the next round goes on from there, as after a kill.
        if before != adapter_sha256(self.checkout) and not (self.checkout / BEFORE).exists():
            self.problems.append("a round on a full disk changed the model")

    def poison(self, day: Day) -> None:
        """Somebody imports preferences for replies that nobody here likes."""
        file = self.checkout.parent / "poison.jsonl"
        some = [next(self.asked) for _ in range(POISON)]
        pairs = [{"prompt": asked.text, "chosen": asked.long, "rejected": asked.short} for asked in some]
        write_jsonl(file, [pair | {"metadata": {"user_id": POISONER}} for pair in pairs])
        self.project.run("python", "-m", "fine_tuning", "import", str(file))

    def forced_canary(self, day: Day) -> None:
        """Where the verdict holds the poisoned candidate, somebody gives it half of the conversations all the same."""
        if self.running() is None:
            self.project.run("python", "-c", FORCED)

    def poison_forgotten(self, day: Day) -> None:
        """What was imported is forgotten, after its candidate has been rolled back."""
        state = self.canary.state()
        if state is None or state.outcome != ROLLED_BACK:
            self.problems.append("the poisoned candidate was not rolled back")
        self.project.run("python", "-m", "fine_tuning", "forget", "--user", POISONER, "--yes")

    # ---------------------------------------------------------------------------------------------------------- checks

    def lost(self) -> list[str]:
        """Ids of what was acknowledged and is neither in the log nor in the shards as it was said."""
        ids = {told.conversation for told in self.told.values()}
        kept = ShardIndex.read(shard_paths(self.checkout / "data/conversations")).newest(ids)
        logged = ConversationLogger(self.checkout / "inbox/conversations.jsonl").read_conversations()
        kept |= {conversation["id"]: conversation for conversation in logged}
        return [name for name, told in self.told.items() if not is_kept(kept.get(told.conversation), name, told)]


def waits_of(said: str) -> str:
    """What STEP printed: warnings of libraries stand around it."""
    return next((line for line in reversed(said.splitlines()) if line.startswith("[")), said)


def is_kept(conversation: dict[str, Any] | None, name: str, told: Told) -> bool:
    """Whether a conversation has a reply and what was said of it."""
    if conversation is None:
        return False
    replies = {message.get("id"): message["content"] for message in conversation["messages"]}
    said = [entry for entry in conversation["feedback"] if entry["message_id"] == name]
    return (
        replies.get(name) == told.reply
        and (told.rating is None or any(entry.get("rating") == told.rating for entry in said))
        and (told.correction is None or any(entry.get("edited") == told.correction for entry in said))
    )


def adapter_sha256(checkout: Path) -> str | None:
    file = checkout / "models/adapter/adapter_model.safetensors"
    return sha256_file(file) if file.is_file() else None


def live_through(folder: Path, rounds: int, chats: int, faults: Any = FAULTS, steps: int = 350) -> Household:
    """A household after so many rounds, with what was noticed in `problems`; `steps` teach its base the language."""
    with FakeOllama() as ollama:
        household = Household(write_base(folder / "base", steps), folder, ollama, chats)
        household.start_gateway()
        try:
            for number in range(1, rounds + 1):
                day = household.day(*faults.get(number, ()))
                print(f"round {number}: {day}", file=sys.stderr, flush=True)
            household.problems += [f"lost: {name}" for name in household.lost()]
        finally:
            household.stop_gateway()
            household.http.close()
    return household


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chats", type=int, default=240)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        household = live_through(arguments.folder or Path(temporary), arguments.rounds, arguments.chats)
        log = household.project.run("git", "log", "--reverse", "--format=%s")
    print("| round | happened | conversations | liked | a canary's end | verdict |")
    print("|---|---|---|---|---|---|")
    for number, day in enumerate(household.days, 1):
        chats = f"{day.chats}, {day.failed} failed" if day.failed else day.chats
        print(f"| {number} | {day.happened} | {chats} | {day.liked} | {day.canary} | {day.verdict} |")
    said = sum((told.rating is not None) + (told.correction is not None) for told in household.told.values())
    print(f"\nacknowledged: {len(household.told)} replies, {said} judgements of them")
    print("\n".join(household.problems) or "nothing is lost, and no round left a half state")
    print(f"\n{log}")
    sys.exit(bool(household.problems))


if __name__ == "__main__":
    main()
