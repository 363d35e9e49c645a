"""Planted preferences: a simulated person with a rule judges replies of the base; what does each objective learn?

    make repro && python -m benchmarks.planted_preferences [--pairs 50,100,200,400] [--objectives sft,dpo,kto,auto]

The person prefers replies shorter than 80 characters. For each prompt, a short first question of a training
conversation, the base samples eight replies of at most 64 tokens; one that keeps the rule and one that breaks it make a
pair. Prompts
that are held out give pairs, and are answered again by each trained model. Supervised fine-tuning learns from the
chosen replies, DPO from the pairs, KTO from every reply with a thumb, `auto` from chosen replies and pairs together.
Printed for the base and each run: the share of held-out pairs whose chosen reply is likelier a token, the share of
greedy replies to held-out prompts that keep the rule, the share that keeps another rule nobody voted on (no
exclamation mark), and the mean probability of the right answers to the general questions.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.learning_curve import load_with_adapter
from fine_tuning.evaluation.records.measurements import PREFERENCES, prefers_chosen, right_probability
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.scoring.scorer import likelihoods
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge
from fine_tuning.evaluation.suite.preferences import preference_items, preference_lines
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import ChatSettings, encode_conversation, encode_prompt, load_tokenizer
from fine_tuning.schema.preferences import Item, PreferredPair, Thumb, read_pairs, read_thumbs, write_preferences
from fine_tuning.schema.prepared import PreparedRow, read_rows
from fine_tuning.training.lora_trainer import train_adapter
from fine_tuning.training.settings import TrainSettings

BASE = Path("models/base")
GGUF = BASE / "base-Q8_0.gguf"
LIMIT = 80  # characters: what the person calls short
SAMPLES, MAX_TOKENS = 8, 64
LONGEST_PROMPT = 200  # characters


def keeps_rule(reply: str) -> bool:
    """What the person votes on."""
    return len(reply) < LIMIT


def keeps_other_rule(reply: str) -> bool:
    """What nobody votes on."""
    return "!" not in reply


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", default="50,100,200,400")
    parser.add_argument("--held-out", type=int, default=100, help="pairs that are measured and not learned from")
    parser.add_argument("--objectives", default="sft,dpo,kto,auto")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.pairs.split(",")]
    judged = judge(max(sizes) + arguments.held_out)
    held_out, learned = judged[: arguments.held_out], judged[arguments.held_out :]
    if too_many := [size for size in sizes if size > len(learned)]:
        print(f"left out, for {len(learned)} pairs are left to learn from: {too_many}", file=sys.stderr)
    print("| learned from | pairs | held-out pairs | rule kept | other rule kept | general knowledge |")
    print("|---|---|---|---|---|---|")
    show("base", 0, measure(None, held_out))
    settings = read_params("train", TrainSettings)
    for size in (size for size in sizes if size <= len(learned)):
        for objective in arguments.objectives.split(","):
            with tempfile.TemporaryDirectory() as folder:
                place, name = Path(folder), read_base_card(BASE)["model"]
                adapter, items = place / "adapter", items_of(objective, learned[:size], place / "train")
                validation = items_of(objective, held_out[:20], place / "validation")
                train_adapter(BASE, name, items, validation, settings, adapter, place / "checkpoints")
                show(objective, size, measure(adapter, held_out))


def show(name: str, size: int, found: Sequence[float]) -> None:
    """Print a row of the table."""
    print(f"| {name} | {size} | {' | '.join(f'{value:.2f}' for value in found[:-1])} | {found[-1]:.3f} |", flush=True)


def judge(count: int) -> list[dict[str, Any]]:
    """Pairs as `preference_items` reads them, of replies that the base samples; fewer where its replies are alike."""
    tokenizer, system_prompt = load_tokenizer(BASE), read_params("chat", ChatSettings).system_prompt
    rows = read_rows("data/prepared/train.parquet", ("id", "messages"))
    first = [next(message for message in row.messages if message["role"] == "user") for row in rows]
    prompts = sorted({message["content"] for message in first if len(message["content"]) <= LONGEST_PROMPT})
    random.Random(0).shuffle(prompts)
    pairs: list[dict[str, Any]] = []
    with LlamaEngine(GGUF, context=512, threads=2, slots=SAMPLES) as engine, ThreadPoolExecutor(SAMPLES) as pool:
        for number, prompt in enumerate(tqdm(prompts, desc="prompts")):
            message = {"role": "user", "content": prompt}
            ids = encode_prompt(tokenizer, [message], system_prompt)
            replies = list(pool.map(partial(sample_reply, engine, ids), range(SAMPLES)))
            sides = [[text for text in replies if text and keeps_rule(text) == kept] for kept in (True, False)]
            if all(sides):
                names = {"id": f"p{number}", "cluster": f"p{number}", "kind": "vote", "person": "planted"}
                said = {"messages": [message], "chosen": sides[0][0], "rejected": sides[1][0]}
                pairs.append(names | said | {"chosen_author": "base", "rejected_author": "base"})
            if len(pairs) == count:
                break
    print(f"{len(pairs)} pairs of {number + 1} prompts", file=sys.stderr)
    return pairs


def sample_reply(engine: LlamaEngine, prompt: Sequence[int], seed: int) -> str:
    """A reply of the base, drawn at temperature 1."""
    return "".join(engine.complete_stream(prompt, MAX_TOKENS, temperature=1.0, seed=seed)).strip()


def greedy_replies(model: Any, tokenizer: Any, conversations: Sequence[Any], chat: ChatSettings) -> list[str]:
    """Greedy replies to conversations."""
    import torch

    prompts = [encode_prompt(tokenizer, messages, chat.system_prompt) for messages in conversations]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )  # fmt: skip
    return [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in made[:, longest:]]


def items_of(objective: str, pairs: Sequence[dict[str, Any]], folder: Path) -> list[Item]:
    """What an objective learns from pairs, through the files that `prepare` writes."""
    chat, tokenizer = read_params("chat", ChatSettings), load_tokenizer(BASE)
    rows, kept, thumbs = [], [], []
    for pair in pairs:
        names = {"cluster": pair["cluster"], "person": pair["person"], "conversations": [pair["id"]]}
        ids: dict[str, list[int]] = {}
        for side, liked in (("chosen", True), ("rejected", False)):
            messages = [*pair["messages"], {"role": "assistant", "content": pair[side]}]
            encoded = encode_conversation(tokenizer, messages, chat.system_prompt, chat.max_length, [False, True])
            ids |= {f"{side}_ids": encoded.input_ids, f"{side}_labels": encoded.labels}
            said = {"messages": pair["messages"], "reply": pair[side], "author": "base"}
            name = f"{pair['id']}/{side}"
            thumbs.append(Thumb(name, liked=liked, **names, **said, input_ids=encoded.input_ids, labels=encoded.labels))
        rows.append(PreparedRow(pair["id"], ids["chosen_ids"], ids["chosen_labels"]))
        kept.append(PreferredPair(**pair, conversations=[pair["id"]], **ids))
    folder.mkdir()
    write_preferences(folder / "pairs.parquet", PreferredPair, kept)
    write_preferences(folder / "thumbs.parquet", Thumb, thumbs)
    if objective == "kto":
        return list(read_thumbs(folder / "thumbs.parquet"))
    items: list[Item] = list(rows) if objective in ("sft", "auto") else []
    return items + (read_pairs(folder / "pairs.parquet") if objective in ("dpo", "auto") else [])


def measure(adapter: Path | None, held_out: Sequence[dict[str, Any]]) -> tuple[float, float, float, float]:
    """(accuracy on held-out pairs, share that keeps the rule, share that keeps the other, general knowledge)."""
    chat, evaluate = read_params("chat", ChatSettings), read_params("evaluate", EvaluateSettings)
    tokenizer, model = load_tokenizer(BASE), load_with_adapter(BASE, adapter, evaluate.threads)
    items = preference_items(held_out, tokenizer, chat.system_prompt, chat.max_length)
    scores = likelihoods(model, items, evaluate.batch_tokens)
    # The base wrote both sides, whoever is asked.
    lines = preference_lines("candidate", held_out, items, scores, lambda author: False)[PREFERENCES]
    replies = greedy_replies(model, tokenizer, [pair["messages"] for pair in held_out], chat)
    questions = general_items(tokenizer, chat.system_prompt, chat.max_length)
    known = knowledge("candidate", questions, likelihoods(model, questions, evaluate.batch_tokens))
    return (
        mean(map(prefers_chosen, lines)), mean(map(keeps_rule, replies)), mean(map(keeps_other_rule, replies)),
        mean(map(right_probability, known)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
