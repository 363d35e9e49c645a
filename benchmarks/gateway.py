"""What the gateway costs a stream, and whether it loses an exchange when it is killed.

    python -m benchmarks.gateway [--rounds 5] [--tokens 100] [--rate 50]
    python -m benchmarks.gateway --kills 10 [--exchanges 10000] [--clients 64]

The first form streams replies from a server in a process of its own, directly and through the gateway in turn, with 1,
8 and 32 streams at a time whose beginnings are spread over the length of a reply, and prints medians: milliseconds to
the first token, and tokens a second of all streams together. The server thinks for 20 ms, then writes --rate tokens a
second to each stream. --rate 0 writes as fast as it can: the most that goes through. The second form holds
conversations of five exchanges each while the gateway is killed (SIGKILL) and started again, and compares what the
clients were given with the log.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import httpx
import psutil

from fine_tuning.data_collection.conversation_logger import ConversationLogger

ROOT = Path(__file__).parents[1]
STREAMS = (1, 8, 32)
THINKING = 0.02  # seconds before the first token
TURNS = 5  # exchanges of a conversation
DONE = {"done": True, "done_reason": "stop", "eval_count": 1}


# ----------------------------------------------------------------------------------------------------------------------
# the model's server


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int, rate: float) -> None:
    """Answer one request on a connection that is kept."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length:")[2].split("\r\n")[0])
    asked = json.loads(await reader.readexactly(length))
    answer = f"An answer to: {asked['messages'][-1]['content']}"
    words = [answer] if tokens == 1 else ["word "] * tokens
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")
    await asyncio.sleep(THINKING)
    for number, word in enumerate([*words, ""]):
        message = {"model": "bench", "message": {"role": "assistant", "content": word}, "done": False}
        line = json.dumps(message | (DONE if number == len(words) else {})).encode() + b"\n"
        writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        await writer.drain()
        if rate:
            await asyncio.sleep(1 / rate)
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    if "connection: close" in head:
        writer.close()


def _serve_model(port: int, tokens: int, rate: float) -> None:
    async def serve() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while not writer.is_closing():
                    await _answer(reader, writer, tokens, rate)
            except (ConnectionError, asyncio.IncompleteReadError):
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=1024)
        await server.serve_forever()

    asyncio.run(serve())


@contextmanager
def model_server(tokens: int, rate: float) -> Iterator[str]:
    """Address of a server that answers /api/chat."""
    port = _free_port()
    process = multiprocessing.Process(target=_serve_model, args=(port, tokens, rate), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def start_gateway(folder: Path, upstream: str, port: int) -> "Popen[str]":
    """A gateway whose inbox is in `folder`, when it listens."""
    for name in ("params.yaml", "dvc.yaml"):
        if not (folder / name).exists():
            (folder / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "fine_tuning", "gateway", "--upstream", upstream, "--port", str(port)]
    process = Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("gateway "), "it does not start"
    return process


# ----------------------------------------------------------------------------------------------------------------------
# latency and throughput


async def _stream(address: str, text: str) -> tuple[float, float, int]:
    """(seconds to the first token, to the end, lines) of one reply; raw sockets, so that the client costs little."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": text}]}).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /api/chat HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    first, lines = 0.0, 0
    while data := await reader.read(1 << 16):
        if not first and b'"message"' in data:
            first = time.perf_counter() - start
        lines += data.count(b'"message"')
    writer.close()
    return first, time.perf_counter() - start, lines


async def _round(address: str, streams: int, name: str, length: float) -> tuple[list[float], float]:
    """(seconds to the first token of each reply, tokens a second while all streams run) of two replies a stream."""

    async def client(number: int) -> list[tuple[float, float, int]]:
        await asyncio.sleep(length * number / streams)  # people do not ask all at once
        return [await _stream(address, f"{name} {number} {reply}") for reply in range(2)]

    done = [reply for replies in await asyncio.gather(*map(client, range(streams))) for reply in replies]
    return [first for first, *_ in done], streams * statistics.mean(lines / seconds for _, seconds, lines in done)


def _cpu_seconds(process: "Popen[str]") -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def measure(rounds: int, tokens: int, rate: float) -> None:
    """Print a line for each number of streams."""
    length = THINKING + (tokens / rate if rate else 0)
    with tempfile.TemporaryDirectory() as folder, model_server(tokens, rate) as upstream:
        process = start_gateway(Path(folder), upstream, port := _free_port())
        ways = {"direct": upstream, "gateway": f"http://127.0.0.1:{port}"}
        try:
            print("         first token, ms          tokens/s                  CPU of the gateway")
            print("streams  direct  gateway  added    direct  gateway  ratio    ms a reply")
            asyncio.run(_round(ways["gateway"], 4, "warm", length))
            for streams in STREAMS:
                firsts: dict[str, list[float]] = {way: [] for way in ways}
                speeds: dict[str, list[float]] = {way: [] for way in ways}
                before = _cpu_seconds(process)
                for number in range(rounds):
                    for way in sorted(ways, reverse=bool(number % 2)):
                        found, speed = asyncio.run(_round(ways[way], streams, f"{streams} {number} {way}", length))
                        firsts[way] += found
                        speeds[way].append(speed)
                cpu = 1000 * (_cpu_seconds(process) - before) / len(firsts["gateway"])
                direct, through = (1000 * statistics.median(firsts[way]) for way in ways)
                plain, recorded = (statistics.median(speeds[way]) for way in ways)
                print(
                    f"{streams:7}  {direct:6.2f}  {through:7.2f}  {through - direct:5.2f}  {plain:8.0f}  "
                    f"{recorded:7.0f}  {recorded / plain:5.3f}    {cpu:10.1f}",
                    flush=True,
                )
            print(httpx.get(f"{ways['gateway']}/health", trust_env=False).json()["recording"])
        finally:
            process.terminate()
            process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# kills


async def converse(address: str, client: str, exchanges: int, acknowledged: dict[str, str]) -> None:
    """Hold conversations until every reply was given whole; what the client was given is added to `acknowledged`."""
    history: list[dict[str, str]] = []
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=30) as http:
        for number in range(exchanges):
            if number % TURNS == 0:
                history = []
            question = {"role": "user", "content": f"{client} asks {number}"}
            while (reply := await _ask(http, [*history, question])) is None:
                await asyncio.sleep(0.05)
            acknowledged[question["content"]] = reply
            history += [question, {"role": "assistant", "content": reply}]


async def _ask(http: httpx.AsyncClient, messages: list[dict[str, str]]) -> str | None:
    """The reply; None where it did not come whole."""
    text = ""
    try:
        async with http.stream("POST", "/api/chat", json={"model": "bench", "messages": messages}) as answer:
            async for line in _lines(answer):
                text += line["message"]["content"]
                if line["done"]:
                    return text
    except (httpx.HTTPError, ValueError, KeyError):
        pass
    return None


async def _lines(answer: httpx.Response) -> AsyncIterator[dict]:
    async for line in answer.aiter_lines():
        yield json.loads(line)


def kill_and_compare(folder: Path, upstream: str, kills: int, exchanges: int, clients: int) -> Counter[str]:
    """Hold conversations through a gateway that is killed `kills` times; counts of what the log has.

    Returns:
        exchanges: what clients were given; lost: of those, what is not in the log; twice: what is there more than once.
    """
    port = _free_port()
    process = start_gateway(folder, upstream, port)
    acknowledged: dict[str, str] = {}

    async def run() -> None:
        nonlocal process
        each = exchanges // clients
        talks = [converse(f"http://127.0.0.1:{port}", f"client {n}", each, acknowledged) for n in range(clients)]
        talking = asyncio.gather(*talks)
        for kill in range(1, kills + 1):
            while len(acknowledged) < kill * each * clients // (kills + 1):
                await asyncio.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process = await asyncio.to_thread(start_gateway, folder, upstream, port)
        await talking

    try:
        asyncio.run(run())
    finally:
        process.terminate()
        process.wait()
    logger = ConversationLogger(folder / "inbox/conversations.jsonl")
    said: Counter[tuple[str, str]] = Counter()
    for conversation in logger.read_conversations():
        for asked, reply in zip(conversation["messages"], conversation["messages"][1:], strict=False):
            if reply["role"] == "assistant" and reply.get("weight") != 0 and "incomplete" not in reply:
                said[asked["content"], reply["content"]] += 1
                said.update((asked["content"], other["content"]) for other in reply.get("alternatives", ())
                            if "incomplete" not in other)  # fmt: skip
    found = Counter(exchanges=len(acknowledged), logged=len(said))
    found["conversations"] = len(logger.read_conversations())
    found["lost"] = sum(pair not in said for pair in acknowledged.items())
    found["twice"] = sum(count > 1 for count in said.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--exchanges", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    if args.kills is None:
        measure(args.rounds, args.tokens, args.rate)
        return
    with tempfile.TemporaryDirectory() as folder, model_server(1, 0) as upstream:
        start = time.perf_counter()
        found = kill_and_compare(Path(folder), upstream, args.kills, args.exchanges, args.clients)
        print(f"{dict(found)}, {args.kills} kills, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
