"""This cleaner beside Presidio's pattern recognisers and datasketch, on the same generated conversations, in one run.

    pip install -r benchmarks/requirements.txt    # presidio-analyzer, datasketch
    python -m benchmarks.cleaning [--conversations 10000] [--runs 3]

Measured are seconds of CPU, in a process of its own for each side and run, imports apart; the median over the runs is
printed with the smallest and the largest. Peak memory is that of the process (VmHWM), with what it is without work.
Presidio's side only masks (its pattern recognisers, no language model), datasketch's only finds near-duplicates; ours
is shown for the same part, its word pairs made within the time, and as a whole: parse, repair, mask, filter,
deduplicate, cluster, write.
"""

import argparse
import json
import logging
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

SUBJECTS = ("router", "printer", "invoice", "holiday", "recipe", "garden", "contract", "engine", "password", "camera")
VERBS = ("restart", "repair", "cancel", "describe", "compare", "clean", "translate", "explain", "order", "update")
PLACES = ("at home", "in the office", "near the station", "on my phone", "in the kitchen", "on the server")
OPENINGS = (
    "Please tell me how I can {verb} the {subject} {place}.",
    "Why does the {subject} not work {place}?",
    "What is the best way to {verb} a {subject} {place}?",
    "I would like to {verb} my {subject} {place}, what do I need?",
)
ADVICE = (
    "First look at the {subject} and note what you see.",
    "Then {verb} it slowly, step by step, and wait a minute.",
    "Most people {place} never need more than that.",
    "If the {subject} still does not answer, write down the time and the message.",
    "It helps to {verb} one thing at a time, and to keep the old {subject} until the new one runs.",
    "Remember that a {subject} {place} is warmer than you think.",
)
PERSONAL = (
    lambda r: f"My address is {r.choice(SUBJECTS)}.{r.randrange(999)}@example.com.",
    lambda r: f"Call me at +1 650-253-{r.randrange(10_000):04d}.",
    lambda r: f"The server is 192.0.2.{r.randrange(1, 255)}.",
    lambda r: "My card is 4242 4242 4242 4242.",
    lambda r: f"See https://example.org/{r.choice(SUBJECTS)}/{r.randrange(9999)}.",
    lambda r: "Transfer it to DE89 3704 0044 0532 0130 00.",
    lambda r: "The key is sk_live_A1b2C3d4E5f6G7h8I9j0K1l2.",
)
FOREIGN = ("schön", "café", "naïve", "Größe", "señor", "déjà vu")


def conversations(count: int, seed: int = 7) -> list[dict]:
    """Conversations of one to three exchanges: personal data in 15 %, exact duplicates 5 %, near 5 %, mojibake 3 %."""
    random_ = random.Random(seed)
    made: list[dict] = []
    for number in range(count):
        kind = random_.random()
        if made and kind < 0.10:
            texts = [message["content"] for message in made[random_.randrange(len(made))]["messages"]]
            if kind >= 0.05:
                texts[-1] += " Good luck!"
        else:
            texts = [text for _ in range(random_.choice((1, 1, 2, 3))) for text in _exchange(random_)]
            if random_.random() < 0.15:
                texts[0] += " " + random_.choice(PERSONAL)(random_)
            if random_.random() < 0.03:
                texts[-1] += " " + random_.choice(FOREIGN).encode().decode("latin-1")
        messages = [
            {"id": f"g{number}-{index}", "role": ("user", "assistant")[index % 2], "content": text}
            for index, text in enumerate(texts)
        ]
        made.append(
            {
                "id": f"g{number:08d}",
                "source": "generated",
                "started_at": f"2026-01-01T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}.000Z",
                "messages": messages,
                "feedback": [],
                "metadata": {},
            }
        )
    return made


def _exchange(random_: random.Random) -> tuple[str, str]:
    def fill(pattern: str) -> str:
        return pattern.format(
            subject=random_.choice(SUBJECTS), verb=random_.choice(VERBS), place=random_.choice(PLACES)
        )

    question = fill(random_.choice(OPENINGS))
    return question, " ".join(fill(pattern) for pattern in random_.sample(ADVICE, random_.randint(2, 5)))


# -----------------------------------------------------------------------------
# the sides: each prepares and returns what is measured


def _texts(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return [message["content"] for line in file for message in json.loads(line)["messages"]]


def whole_cleaning(path: Path) -> Callable[[], object]:
    from fine_tuning.data_collection.cleaning.shard_cleaner import clean_shards
    from fine_tuning.data_collection.cleaning.text_repair import CONTROL_TOKENS
    from fine_tuning.data_collection.data_cleaner import default_settings

    _warm_masking()
    settings = default_settings().model_copy(update={"processes": 1})
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=path.parent))
    return lambda: clean_shards([(path, "0")], folder / "clean", folder / "memo", settings, CONTROL_TOKENS)


def our_masking(path: Path) -> Callable[[], object]:
    from fine_tuning.data_collection.personal_data.finder import Masker

    texts = _texts(path)
    _warm_masking()
    return lambda: [Masker().mask(text) for text in texts]


def _warm_masking() -> None:
    from fine_tuning.data_collection.data_cleaner import DataCleaner

    DataCleaner().clean_text(
        "é a@b.example +1 650-253-0000 192.0.2.1 DE89370400440532013000 536-90-4399 cpf 390.533.447-05"
    )


def presidio_masking(path: Path) -> Callable[[], object]:
    """The pattern recognisers for the types that we mask too, each applied to each text, merged as its engine does."""
    from presidio_analyzer import EntityRecognizer
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        EmailRecognizer,
        IbanRecognizer,
        IpRecognizer,
        PhoneRecognizer,
        UrlRecognizer,
        UsSsnRecognizer,
    )

    kinds = (EmailRecognizer, UrlRecognizer, IpRecognizer, IbanRecognizer, CreditCardRecognizer, UsSsnRecognizer)
    recognisers = [kind() for kind in kinds] + [PhoneRecognizer(supported_regions=("US", "GB", "DE", "FR"))]
    texts = _texts(path)

    def mask(text: str) -> str:
        found = [hit for r in recognisers for hit in r.analyze(text, r.supported_entities, None) or []]
        hits = [hit for hit in EntityRecognizer.remove_duplicates(found) if hit.score >= 0.3]
        for hit in sorted(hits, key=lambda hit: hit.start, reverse=True):
            text = f"{text[: hit.start]}<{hit.entity_type}>{text[hit.end :]}"
        return text

    mask("a@b.example +1 650-253-0000")
    return lambda: [mask(text) for text in texts]


def _documents(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return [" ".join(message["content"] for message in json.loads(line)["messages"]) for line in file]


def our_near_duplicates(path: Path) -> Callable[[], object]:
    import numpy as np

    from fine_tuning.data_collection.cleaning.near_duplicates import (
        PERMUTATIONS,
        band_keys,
        clusters,
        signatures,
        similar_pairs,
    )

    documents = _documents(path)
    signatures(documents[:1])

    def work() -> int:
        signed = b"".join(signatures(documents[start : start + 1024]) for start in range(0, len(documents), 1024))
        numbers = np.frombuffer(signed, np.uint32).reshape(-1, PERMUTATIONS)
        pairs = similar_pairs(band_keys(signed).T, numbers.__getitem__, 0.8)
        return len(np.unique(clusters(len(documents), pairs)))

    return work


def datasketch_near_duplicates(path: Path) -> Callable[[], object]:
    from datasketch import MinHash, MinHashLSH

    from fine_tuning.data_collection.cleaning.near_duplicates import BANDS, PERMUTATIONS, ROWS, words_of

    documents = [[" ".join(pair).encode() for pair in pairwise(words_of(text))] for text in _documents(path)]

    def work() -> int:
        index = MinHashLSH(threshold=0.8, params=(BANDS, ROWS), num_perm=PERMUTATIONS)
        parents = list(range(len(documents)))

        def root(row: int) -> int:
            while parents[row] != row:
                row = parents[row]
            return row

        sketches = MinHash.bulk(documents, num_perm=PERMUTATIONS, seed=1)
        for row, sketch in enumerate(sketches):
            for other in index.query(sketch):
                if sketches[other].jaccard(sketch) >= 0.8:
                    first, second = sorted((root(other), root(row)))
                    parents[second] = first
            index.insert(row, sketch)
        return len({root(row) for row in range(len(documents))})

    return work


def logging_durably(path: Path) -> Callable[[], object]:
    from fine_tuning.data_collection.conversation_logger import ConversationLogger

    logger = ConversationLogger(path.parent / "inbox" / "log.jsonl")

    def work() -> float:
        times = []
        for _ in range(1000):
            before = time.perf_counter()
            logger.log_conversation("What is a lake?", "Water that stays. " * 10, {"session_id": "s"})
            times.append(time.perf_counter() - before)
        return statistics.median(times)

    return work


# -----------------------------------------------------------------------------
# measuring


def _peak() -> float:
    # not getrusage: what it gives a new process begins with the peak of its parent
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _measure(side: Callable[[Path], Callable[[], object]], path: Path, sender: object) -> None:
    logging.disable()  # Presidio's URL recogniser tells at length that it found no network
    try:
        work = side(path)
    except ImportError as error:
        sender.send(str(error))
        return
    before, start = _peak(), time.process_time()
    result = work()
    sender.send((time.process_time() - start, _peak(), before, result))


def measure(side: Callable[[Path], Callable[[], object]], path: Path, runs: int) -> list[tuple] | str:
    """(CPU seconds, peak MB, MB before the work, result) of each run, or why the side cannot run here."""
    context, outcomes = multiprocessing.get_context("spawn"), []
    for _ in range(runs):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(side, path, sender))
        process.start()
        sender.close()
        outcome = receiver.recv()
        process.join()
        if isinstance(outcome, str):
            return outcome
        outcomes.append(outcome)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cleaning-") as folder:
        path = Path(folder) / "generated.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(c, ensure_ascii=False) + "\n" for c in conversations(options.conversations))
        print(
            f"{options.conversations} conversations, {path.stat().st_size / 1e6:.1f} MB, median of {options.runs} runs"
        )
        print(f"{'':34}{'CPU ms a conversation':>28}{'peak MB':>10}{'before':>9}   result")
        medians = {}
        for side in (
            whole_cleaning,
            our_masking,
            presidio_masking,
            our_near_duplicates,
            datasketch_near_duplicates,
            logging_durably,
        ):
            outcomes = measure(side, path, options.runs)
            name = side.__name__.replace("_", " ")
            if isinstance(outcomes, str):
                print(f"{name:34} not measured: {outcomes}")
                continue
            count = 1000 if side is logging_durably else options.conversations
            each = sorted(outcome[0] / count * 1000 for outcome in outcomes)
            medians[side] = statistics.median(each)
            _, peak, before, result = outcomes[-1]
            print(
                f"{name:34}{medians[side]:12.3f} ({each[0]:.3f} to {each[-1]:.3f}){peak:10.0f}{before:9.0f}   "
                f"{_told(side, result)}"
            )
        for ours, theirs in ((our_masking, presidio_masking), (our_near_duplicates, datasketch_near_duplicates)):
            if ours in medians and theirs in medians:
                print(f"{theirs.__name__.replace('_', ' ')} / ours: {medians[theirs] / medians[ours]:.1f}")


def _told(side: Callable, result: object) -> str:
    if side is whole_cleaning:
        return f"{result['kept']} kept, {json.dumps(result['reasons'])}, masked {sum(result['masked'].values())}"
    if side is logging_durably:
        return f"{result * 1000:.3f} ms a call at the median, on disk"
    if isinstance(result, int):
        return f"{result} clusters"
    return f"{sum('<' in text for text in result)} texts masked"


if __name__ == "__main__":
    main()
