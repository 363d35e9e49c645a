"""Planted preferences: a simulated person with a rule judges replies of the base; what does each objective learn?

    make repro && python -m benchmarks.planted_preferences [--pairs 50,100,200,400] [--objectives sft,dpo,kto,auto]

The person prefers replies shorter than 80 characters. For each prompt, a short question of the exported conversations,
the base samples six replies of at most 48 tokens; one that keeps the rule and one that breaks it make a pair. Prompts
that are held out give pairs, and are answered again by each trained model. Supervised fine-tuning learns from the
chosen replies, DPO from the pairs, KTO from every reply with a thumb, `auto` from chosen replies and pairs together.
Printed for the base and each run: the share of held-out pairs whose chosen reply is likelier a token, the share of
greedy replies to held-out prompts that keep the rule, the share that keeps another rule nobody voted on (no
exclamation mark), and the mean probability of the right answers to the general questions.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from fine_tuning.common.records import read_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.learning_curve import load_with_adapter
from fine_tuning.evaluation.records.measurements import PREFERENCES, prefers_chosen, right_probability
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.scoring.scorer import likelihoods
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge
from fine_tuning.evaluation.suite.preferences import preference_items, preference_lines
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.schema.chat_format import ChatSettings, encode_conversation, encode_prompt, load_tokenizer
from fine_tuning.schema.preferences import Item, PreferredPair, Thumb, read_pairs, read_thumbs, write_preferences
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.lora_trainer import train_adapter
from fine_tuning.training.settings import TrainSettings

BASE = Path("models/base")
LIMIT = 80  # characters: what the person calls short
SAMPLES, MAX_TOKENS, BATCH = 6, 48, 16
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
    parser.add_argument("--judged", type=Path, help="file of the pairs: read where it exists, else written")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.pairs.split(",")]
    if arguments.judged and arguments.judged.exists():
        judged = json.loads(arguments.judged.read_text(encoding="utf-8"))
    else:
        judged = judge(max(sizes) + arguments.held_out)
        if arguments.judged:
            arguments.judged.write_text(json.dumps(judged), encoding="utf-8")
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
    chat, tokenizer = read_params("chat", ChatSettings), load_tokenizer(BASE)
    model = load_with_adapter(BASE, None, read_params("evaluate", EvaluateSettings).threads)
    exported = chain.from_iterable(map(read_jsonl, sorted(Path("data/exports/openai").glob("*.jsonl"))))
    said = [message for conversation in exported for message in conversation["messages"]]
    asked = {message["content"] for message in said if message["role"] == "user"}
    prompts = sorted((text for text in asked if len(text) <= LONGEST_PROMPT), key=len)  # alike lengths pad little
    random.Random(0).shuffle(batches := [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)])
    pairs: list[dict[str, Any]] = []
    for number, batch in enumerate(tqdm(batches, desc="batches of prompts")):
        conversations = [[{"role": "user", "content": prompt}] for prompt in batch]
        made = replies(model, tokenizer, conversations, chat, samples=SAMPLES, seed=number)
        for place, conversation in enumerate(conversations):
            sampled = made[place * SAMPLES : (place + 1) * SAMPLES]
            sides = [[text for text in sampled if text and keeps_rule(text) == kept] for kept in (True, False)]
            if all(sides):
                name = f"p{number * BATCH + place}"
                names = {"id": name, "cluster": name, "kind": "vote", "person": "planted"}
                texts = {"messages": conversation, "chosen": sides[0][0], "rejected": sides[1][0]}
                pairs.append(names | texts | {"chosen_author": "base", "rejected_author": "base"})
        if len(pairs) >= count:
            break
    print(f"{len(pairs)} pairs of {min((number + 1) * BATCH, len(prompts))} prompts", file=sys.stderr)
    random.Random(0).shuffle(pairs)
    return pairs[:count]


def replies(
    model: Any, tokenizer: Any, conversations: Sequence[Any], chat: ChatSettings, samples: int = 0, seed: int = 0
) -> list[str]:
    """Greedy replies to conversations, or as many drawn at temperature 1 for each of them, one after the other."""
    import torch

    prompts = [encode_prompt(tokenizer, messages, chat.system_prompt) for messages in conversations]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {"temperature": 1.0, "top_k": 0, "num_return_sequences": samples} if samples else {}
    torch.manual_seed(seed)
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, pad_token_id=tokenizer.pad_token_id,
            do_sample=bool(samples), **drawn,
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
    greedy = replies(model, tokenizer, [pair["messages"] for pair in held_out], chat)
    questions = general_items(tokenizer, chat.system_prompt, chat.max_length)
    known = knowledge("candidate", questions, likelihoods(model, questions, evaluate.batch_tokens))
    return (
        mean(map(prefers_chosen, lines)), mean(map(keeps_rule, greedy)), mean(map(keeps_other_rule, greedy)),
        mean(map(right_probability, known)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
