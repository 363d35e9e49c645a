"""This evaluator beside lm-evaluation-harness: the same model, the same questions, the same numbers, the time of both.

    python -m benchmarks.evaluation [--questions 84] [--threads 1]

Both sides score both answers of the general questions, without the tokens that end a turn: the harness through its own
`hf` model and `loglikelihood` requests of text, this project by token ids; each in a process of its own, float32 on a
CPU. The seconds are those of
scoring; loading the model and imports are shown apart. The harness counts the line break that the chat template puts
before a reply as part of the reply, because it moves white space at the end of a prompt there, so here it is counted as
well.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

MODEL = Path("models/base")
TOLERANCE = 0.01  # nats an answer: what other batches and padding move in float32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=84)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness; this project counts tokens")
    parser.add_argument("--one", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        found = score_ours(arguments) if arguments.one == "ours" else score_theirs(arguments)
        print(json.dumps(found))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments.requests = Path(folder) / "requests.json"
        arguments.requests.write_text(json.dumps(requests(arguments.questions)))
        for side in ("ours", "theirs"):
            command = [sys.executable, "-m", "benchmarks.evaluation", "--one", side]
            command += ["--requests", str(arguments.requests)]
            command += ["--threads", str(arguments.threads), "--batch-size", str(arguments.batch_size)]
            command += ["--questions", str(arguments.questions)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{side} did not run: {done.stderr.strip().splitlines()[-1]}")
                return
            results[side] = json.loads(done.stdout.strip().splitlines()[-1])
    report(results)


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the times, the largest difference of a log-likelihood, and whether the same answers win."""
    ours, theirs = results["ours"], results["theirs"]
    print(f"{'':12}{'load s':>8}{'score s':>9}{'known':>7}   of {len(ours['nats']) // 2} questions")
    for name, found in (("whetstone", ours), ("lm-eval", theirs)):
        print(f"{name:12}{found['load']:8.1f}{found['seconds']:9.1f}{sum(known(found)):7}")
    widest = max(abs(a - b) for a, b in zip(ours["nats"], theirs["nats"], strict=True))
    print(f"largest difference of a log-likelihood: {widest:.1e} nats")
    print(f"the same answers win: {known(ours) == known(theirs)}")
    print(f"time: {theirs['seconds'] / ours['seconds']:.2f} times ours")
    if widest > TOLERANCE:
        print("the numbers differ: the times are of different things")


def known(found: dict[str, Any]) -> list[bool]:
    """Whether the right answer of each question is the likelier one."""
    return [right > wrong for right, wrong in zip(found["nats"][::2], found["nats"][1::2], strict=True)]


def requests(questions: int) -> list[dict[str, str]]:
    """Prompt and reply of each answer as the chat template writes them, right and wrong in turn."""
    from fine_tuning.common.records import read_jsonl
    from fine_tuning.evaluation.suite.forgetting import SUITE
    from fine_tuning.schema.chat_format import load_tokenizer, render

    tokenizer, found = load_tokenizer(MODEL), []
    for question in list(read_jsonl(SUITE))[:questions]:
        asked = [{"role": "user", "content": question["prompt"]}]
        prompt = render(tokenizer, asked, None, add_generation_prompt=True).text
        found += [{"prompt": prompt, "reply": question[key]} for key in ("right", "wrong")]
    return found


def score_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-likelihoods by this project's scorer."""
    import torch

    from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
    from fine_tuning.evaluation.suite.forgetting import general_items
    from fine_tuning.schema.chat_format import load_tokenizer

    asked = json.loads(arguments.requests.read_text())
    tokenizer = load_tokenizer(MODEL)
    items = general_items(tokenizer, None, 512)[: 2 * arguments.questions]
    moved = []
    for item, request in zip(items, asked, strict=True):
        start, end = item.runs[0]
        blank = len(request["prompt"]) - len(request["prompt"].rstrip())
        start -= len(tokenizer(request["prompt"][-blank:], add_special_tokens=False)["input_ids"]) if blank else 0
        ids = item.input_ids[:end]
        moved.append(replace(item, input_ids=ids, labels=[-100] * start + ids[start:], runs=[(start, end)]))
    started = time.perf_counter()
    with loaded(MODEL, scoring_hardware(arguments.threads)) as model:
        torch.set_num_threads(arguments.threads)
        ready = time.perf_counter()
        scores = likelihoods(model, moved, 1024)
    return {
        "load": ready - started,
        "seconds": time.perf_counter() - ready,
        "nats": [-score[0][0] for score in scores],
    }


def score_theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-likelihoods by lm-evaluation-harness."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(arguments.threads)
    asked = json.loads(arguments.requests.read_text())
    started = time.perf_counter()
    model = HFLM(pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=arguments.batch_size)
    ready = time.perf_counter()
    found = model.loglikelihood(
        [
            Instance(request_type="loglikelihood", doc={}, arguments=(r["prompt"], r["reply"]), idx=index)
            for index, r in enumerate(asked)
        ],
        disable_tqdm=True,
    )
    return {
        "load": ready - started,
        "seconds": time.perf_counter() - ready,
        "nats": [nats for nats, _ in found],
    }


if __name__ == "__main__":
    main()
