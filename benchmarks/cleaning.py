"""Cleaning and preparing side by side with presidio and datasketch: time, peak memory and what was found.

    python -m benchmarks.cleaning --peers .venv-peers/bin/python

`benchmarks/requirements.txt` says how to make the environment of the peers; without it only this project is measured.
Every contestant runs alone in a process of its own, on the same generated conversations: sentences of the sample with
injected personal data, exact and near duplicates and mojibake. Times are CPU time of one core, medians of --rounds.
"""

import argparse
import json
import logging
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PERSONAL = {
    "EMAIL": ["anna.schmidt@example.org", "j.doe+shop@mail.example.co.uk", "info@uni-koeln.example"],
    "URL": ["https://www.example.com/a/b?c=d", "http://example.org/path_(x)", "https://sub.example.net:8080/"],
    "PHONE": ["+49 30 901820", "+1 212-736-5000", "+44 20 7946 0958"],
    "IP": ["203.0.113.77", "2001:db8::8a2e:370:7334", "198.51.100.4"],
    "IBAN": ["DE89370400440532013000", "GB29 NWBK 6016 1331 9268 19", "FR1420041010050500013M02606"],
    "CREDIT_CARD": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "US_SSN": ["536-90-4399", "219-09-9998"],
}
PRESIDIO = {
    "EMAIL": "EmailRecognizer",
    "URL": "UrlRecognizer",
    "PHONE": "PhoneRecognizer",
    "IP": "IpRecognizer",
    "IBAN": "IbanRecognizer",
    "CREDIT_CARD": "CreditCardRecognizer",
    "US_SSN": "UsSsnRecognizer",
}
PERMUTATIONS, THRESHOLD = 64, 0.8


# -----------------------------------------------------------------------------
# conversations


def generate(count: int) -> Iterator[dict]:
    """`count` conversations, the same every time; "injected" and "copy_of" say what was done to them."""
    from fine_tuning.data_collection.sample import sample_conversations

    draw = random.Random(0)
    turns = [[message["content"] for message in c["messages"]] for c in sample_conversations()]
    questions = sorted({texts[0] for texts in turns})
    answers = sorted({texts[1] for texts in turns if len(texts) > 1})
    made: list[dict] = []
    for index in range(count):
        kind = draw.random()
        if made and kind < 0.2:
            earlier = draw.choice(made)
            texts, injected = [m["content"] for m in earlier["messages"]], earlier["injected"]
            if kind < 0.1:  # a near duplicate: one word more
                texts = [*texts[:-1], f"{texts[-1]} Indeed."]
            copy_of = earlier["copy_of"] or earlier["id"]
        else:
            texts, injected, copy_of = [], [], None
            for _ in range(draw.randint(1, 3)):
                texts.append(" ".join(draw.choices(questions, k=2)))
                texts.append(" ".join(draw.choices(answers, k=4)))
            if kind < 0.5:
                name = draw.choice(sorted(PERSONAL))
                injected = [[name, draw.choice(PERSONAL[name])]]
                texts[0] += f" Reach me under {injected[0][1]} please."
            elif kind < 0.6:
                texts[1] += " Schöne Grüße, naïve café – “quoted”…".encode().decode("windows-1252", "replace")
        messages = [
            {"id": f"{index}-{i}", "role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(texts)
        ]
        conversation = {"id": f"c{index:06}", "source": "benchmark", "started_at": None, "messages": messages}
        conversation |= {"feedback": [], "metadata": {}, "injected": injected, "copy_of": copy_of}
        made.append(conversation)
        yield conversation


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def texts_of(file: Path) -> list[str]:
    return [message["content"] for conversation in read(file) for message in conversation["messages"]]


# -----------------------------------------------------------------------------
# contestants: each takes the file and gives (what is timed, what it found when it is done)


def whole_cleaning(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    """Parse, repair, mask, filter, deduplicate and cluster, from file to files, in one process."""
    from fine_tuning.data_collection.data_cleaner import default_settings
    from fine_tuning.data_collection.shard_cleaner import clean_shards
    from fine_tuning.data_collection.text_repair import CONTROL_TOKENS

    settings = default_settings().model_copy(update={"processes": 1})

    def run() -> dict:
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            return clean_shards([(file, "0" * 64)], here / "clean", here / "memo", settings, CONTROL_TOKENS)

    return run, lambda summary: {"kept": summary["kept"], "clusters": summary["clusters"]}


def masking(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    from fine_tuning.data_collection.personal_data import find

    texts = texts_of(file)
    kinds = tuple(PERSONAL)

    def run() -> list[list[tuple[str, int, int]]]:
        return [[(hit.type, hit.start, hit.end) for hit in find(text, kinds)] for text in texts]

    return run, lambda hits: recall(file, hits)


def presidio(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    logging.disable(logging.CRITICAL)  # it wants to fetch a list of domains, and does without
    from presidio_analyzer import predefined_recognizers

    recognisers = [(kind, getattr(predefined_recognizers, name)()) for kind, name in PRESIDIO.items()]
    texts = texts_of(file)

    def run() -> list[list[tuple[str, int, int]]]:
        return [
            [
                (kind, hit.start, hit.end)
                for kind, recogniser in recognisers
                for hit in recogniser.analyze(text, recogniser.supported_entities, None) or []
                if hit.score >= 0.4
            ]
            for text in texts
        ]

    return run, lambda hits: recall(file, hits)


def recall(file: Path, hits: list[list[tuple[str, int, int]]]) -> dict:
    """Share of the injected values that a hit of their type covers."""
    found = total = position = 0
    for conversation in read(file):
        for kind, value in conversation["injected"]:
            text = conversation["messages"][0]["content"]
            start = text.index(value)
            total += 1
            found += any(k == kind and s <= start and e >= start + len(value) for k, s, e in hits[position])
        position += len(conversation["messages"])
    return {"recall": round(found / total, 4)}


def near_duplicates(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    import sqlite3

    from fine_tuning.data_collection.near_duplicates import Clusters, shingles, signatures

    documents = [[message["content"] for message in conversation["messages"]] for conversation in read(file)]

    def run() -> list[int]:
        clusters = Clusters(sqlite3.connect(""), THRESHOLD)
        for start in range(0, len(documents), 256):
            for signature in signatures([shingles(texts) for texts in documents[start : start + 256]]):
                clusters.add(signature)
        return [clusters.cluster(row) for row in range(len(documents))]

    return run, lambda clusters: joined(file, clusters)


def datasketch(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    from datasketch import MinHash, MinHashLSH

    documents = [[message["content"] for message in conversation["messages"]] for conversation in read(file)]
    word = re.compile(r"\w+")

    def run() -> list[int]:
        index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        parents: list[int] = []
        for row, texts in enumerate(documents):
            words = word.findall(" ".join(texts).lower())
            signature = MinHash(num_perm=PERMUTATIONS)
            signature.update_batch({f"{a} {b}".encode() for a, b in pairwise(words)})
            near = [parents[int(other)] for other in index.query(signature)]
            parents.append(min(near, default=row))
            index.insert(str(row), signature)
        return parents

    return run, lambda clusters: joined(file, clusters)


def joined(file: Path, clusters: list[int]) -> dict:
    """Share of the copies, exact and near, that are in a cluster with their original."""
    rows = {conversation["id"]: row for row, conversation in enumerate(read(file))}
    copies = [(rows[c["id"]], rows[c["copy_of"]]) for c in read(file) if c["copy_of"]]
    found = sum(clusters[copy] == clusters[original] for copy, original in copies)
    return {"recall": round(found / len(copies), 4)}


def formatting(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    from fine_tuning.data_preparation.formatter import TrainingDataFormatter

    conversations, formatter = read(file), TrainingDataFormatter("chatml")
    return lambda: formatter.create_training_pairs(conversations), lambda pairs: {"pairs": len(pairs)}


def splitting(file: Path) -> tuple[Callable[[], Any], Callable[[Any], dict]]:
    """100 conversations at a time, as a first user of DatasetBuilder has them."""
    from fine_tuning.data_preparation.dataset_builder import DatasetBuilder

    conversations = read(file)
    portions = [conversations[start : start + 100] for start in range(0, len(conversations), 100)]
    return (
        lambda: [DatasetBuilder().build_dataset(portion) for portion in portions],
        lambda built: {"rows": sum(len(rows) for dataset in built for rows in dataset.values())},
    )


CONTESTANTS: dict[str, tuple[Callable[[Path], tuple], str | None]] = {
    "whole cleaning": (whole_cleaning, None),
    "masking": (masking, "presidio"),
    "presidio": (presidio, None),
    "near duplicates": (near_duplicates, "datasketch"),
    "datasketch": (datasketch, None),
    "formatting": (formatting, None),
    "splitting": (splitting, None),
}
PEERS = ("presidio", "datasketch")


def contest(name: str, file: Path, rounds: int) -> dict:
    """Run one contestant in this process."""
    run, judge = CONTESTANTS[name][0](file)
    with open(file, "rb") as lines:
        conversations = sum(1 for _ in lines)
    baseline = peak_mb()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
    return {
        "ms": 1000 * statistics.median(seconds) / conversations,
        "peak": peak_mb(),
        "grown": peak_mb() - baseline,
        **judge(result),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def durable_logging(count: int = 300) -> float:
    """Median wall time in ms of logging one exchange until the disk has it."""
    from fine_tuning.data_collection.conversation_logger import ConversationLogger

    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        logger = ConversationLogger(Path(folder) / "log.jsonl")
        times = []
        for number in range(count):
            start = time.perf_counter()
            logger.log_conversation("What is machine learning?", f"Answer {number}.", {"session_id": "benchmark"})
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


# -----------------------------------------------------------------------------
# the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="conversations")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--peers", help="python of an environment with presidio and datasketch")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(contest(arguments.contestant, arguments.file, arguments.rounds)))
        return

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversations.jsonl"
        write(file, arguments.count)
        results = {}
        for name in CONTESTANTS:
            if name not in PEERS or arguments.peers:
                python = arguments.peers if name in PEERS else sys.executable
                results[name] = apart(python, name, file, arguments.rounds)
                show(name, results[name])
        four_times = Path(folder) / "four_times.jsonl"
        write(four_times, 4 * arguments.count)
        larger = apart(sys.executable, "whole cleaning", four_times, 1)
        show("whole cleaning, 4 times as many", larger)
    for ours, (_, peer) in CONTESTANTS.items():
        if peer in results:
            ratio = results[peer]["ms"] / results[ours]["ms"]
            print(f"{ours}: {ratio:.1f} times as fast as {peer}, {memory_ratio(results, ours, peer):.1f} of its memory")
    print(f"durable logging: {durable_logging():.3f} ms an exchange (median, wall time)")


def memory_ratio(results: dict[str, dict], ours: str, peer: str) -> float:
    return results[ours]["peak"] / results[peer]["peak"]


def write(file: Path, count: int) -> None:
    with open(file, "w", encoding="utf-8") as out:
        for conversation in generate(count):
            out.write(json.dumps(conversation, ensure_ascii=False) + "\n")


def apart(python: str, name: str, file: Path, rounds: int) -> dict:
    command = [python, "-m", "benchmarks.cleaning", "--contestant", name, "--file", str(file), "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, result: dict) -> None:
    rest = ", ".join(f"{key} {value}" for key, value in result.items() if key not in ("ms", "peak", "grown"))
    print(
        f"{name:<32} {result['ms']:8.4f} ms a conversation  peak {result['peak']:6.1f} MB"
        f" (+{result['grown']:.1f})  {rest}",
        flush=True,
    )


if __name__ == "__main__":
    main()
