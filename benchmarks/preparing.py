"""Formatting, splitting and tokenising conversations, and logging them durably: time for each, in one run.

    python -m benchmarks.preparing [--base models/base] [--count 10000] [--rounds 5]

Conversations are made of sentences of the sample. Times are CPU time of one core, the best of the rounds, imports
apart; durable logging is the median of wall time. Tokenising is this project's exact encoding with labels, beside the
chat template and tokenizer of transformers alone, which is what it cannot be faster than.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.data_collection.storage.sample import sample_conversations
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder
from fine_tuning.data_preparation.formatter import FORMATS, TrainingDataFormatter
from fine_tuning.schema.chat_format import encode_conversation, load_tokenizer


def generate(count: int) -> list[dict]:
    """`count` conversations of one to three exchanges of some twenty words, the same every time."""
    draw = random.Random(0)
    sample = [[message["content"] for message in c["messages"]] for c in sample_conversations()]
    questions, answers = (sorted({texts[side] for texts in sample if len(texts) > side}) for side in (0, 1))
    made = []
    for index in range(count):
        texts = []
        for _ in range(draw.randint(1, 3)):
            texts += [draw.choice(questions), f"{draw.choice(answers)} That is answer {draw.randrange(10**6)}."]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        made.append({"id": f"c{index:06}", "source": "benchmark", "messages": messages, "feedback": []})
    return made


def best_ms(work: Callable[[], object], rounds: int) -> float:
    """CPU milliseconds of the quickest of `rounds`."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def logging_ms(count: int = 300) -> float:
    """Median wall time in milliseconds of logging one exchange until the disk has it."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        logger = ConversationLogger(Path(folder) / "log.jsonl")
        times = []
        for number in range(count):
            start = time.perf_counter()
            logger.log_conversation("What is machine learning?", f"Answer {number}.", {"session_id": "benchmark"})
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("models/base"), help="folder with a tokenizer")
    parser.add_argument("--count", type=int, default=10_000, help="conversations")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    conversations = generate(arguments.count)

    for name in FORMATS:
        formatter = TrainingDataFormatter(name)
        taken = best_ms(lambda f=formatter: f.create_training_pairs(conversations), arguments.rounds)
        print(f"formatting {name:<12} {taken / arguments.count:8.4f} ms a conversation", flush=True)

    hundreds = [conversations[start : start + 100] for start in range(0, arguments.count, 100)]
    taken = best_ms(lambda: [DatasetBuilder().build_dataset(part) for part in hundreds], arguments.rounds)
    print(f"splitting 100            {taken / len(hundreds):8.4f} ms for the hundred", flush=True)
    taken = best_ms(lambda: DatasetBuilder().build_dataset(conversations), arguments.rounds)
    print(f"splitting all            {taken / arguments.count:8.4f} ms a conversation", flush=True)

    tokenizer, few = load_tokenizer(arguments.base), [c["messages"] for c in conversations[:1000]]
    ours = best_ms(lambda: [encode_conversation(tokenizer, m, None, 512) for m in few], arguments.rounds)
    plain = best_ms(lambda: [tokenizer.apply_chat_template(m) for m in few], arguments.rounds)
    tokens = sum(len(encode_conversation(tokenizer, m, None, 512).input_ids) for m in few)
    print(f"tokenising with labels   {ours / len(few):8.4f} ms a conversation, {1000 * tokens / ours:,.0f} tokens/s")
    print(f"transformers, no labels  {plain / len(few):8.4f} ms a conversation: {ours / plain:.2f} times as long")
    print(f"logging durably          {logging_ms():8.4f} ms an exchange")


if __name__ == "__main__":
    main()
