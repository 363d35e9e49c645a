"""Planted preferences: a simulated person with a rule judges replies of the base; what does each objective learn?

    make repro && python -m benchmarks.planted_preferences [--pairs 50,100,200,400] [--objectives sft,dpo,kto,auto]
        [--seeds 1] [--validation 0]

The person prefers replies shorter than 80 characters. To each prompt, a short question of the exported conversations,
the base's GGUF samples replies, many prompts at once, until one keeps the rule and one breaks it. It is asked to be
brief for the one that keeps it, which it would write to a tenth of the prompts otherwise; what is learned from and
measured has the prompt alone. Only replies that it ends itself count, as in `prepare`. What was sampled is kept in
`.whetstone/planted` and used again. Prompts that are held out give pairs, and are answered again by each trained
model. Supervised fine-tuning learns from the chosen replies, DPO from the pairs, KTO from every reply with a thumb,
`auto` from chosen replies and pairs together; `auto:supervised_first` sets `train.preference.order`, and `sft>dpo`
trains twice, the second time from the first adapter. Printed for the base and each objective, as means over the seeds:
the share of held-out pairs whose chosen reply is likelier a token, the share of greedy replies to held-out prompts that
keep the rule, the share that keeps another rule nobody voted on (no exclamation mark), and the mean probability of the
right answers to the general questions. With `--validation` the first three also of that many other pairs, for choices.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from fine_tuning.common.project import sha256_file
from fine_tuning.common.records import read_jsonl
from fine_tuning.common.settings import read_params
from fine_tuning.evaluation.records.measurements import PREFERENCES, prefers_chosen, right_probability
from fine_tuning.evaluation.records.settings import EvaluateSettings
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.forgetting import general_items, knowledge
from fine_tuning.evaluation.suite.preferences import preference_items, preference_lines
from fine_tuning.runtime.base_model import read_base_card
from fine_tuning.runtime.llama_engine import LlamaEngine
from fine_tuning.schema.chat_format import ChatSettings, encode_conversation, encode_prompt, load_tokenizer
from fine_tuning.schema.preferences import Item, PreferredPair, Thumb, read_pairs, read_thumbs, write_preferences
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.lora_trainer import train_adapter
from fine_tuning.training.settings import TrainSettings

BASE = Path("models/base")
GGUF = BASE / "base-Q8_0.gguf"
LIMIT = 80  # characters: what the person calls short
SAMPLES, SLOTS = 8, 32
SHORT_TOKENS, MAX_TOKENS = 24, 64  # a reply of less than 80 characters ends in 24
LONGEST_PROMPT = 200  # characters
BRIEFLY = "\n\nAnswer in one short sentence."


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
    parser.add_argument("--validation", type=int, default=0, help="more such pairs, to choose parameters by")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.pairs.split(",")]
    judged = judge(max(sizes) + arguments.held_out + arguments.validation)
    held_out, learned = judged[: arguments.held_out], judged[arguments.held_out :]
    validation = [learned.pop() for _ in range(min(arguments.validation, len(learned)))]
    if too_many := [size for size in sizes if size > len(learned)]:
        print(f"left out, for {len(learned)} pairs are left to learn from: {too_many}", file=sys.stderr)
    measured = [part for part in (held_out, validation) if part]
    more = " validation pairs | rule kept | other rule kept |" if validation else ""
    print(f"| learned from | pairs | held-out pairs | rule kept | other rule kept |{more} general knowledge |")
    print("|---" * (9 if validation else 6) + "|")
    show("base", 0, measure(None, measured))
    settings = read_params("train", TrainSettings)
    for size in (size for size in sizes if size <= len(learned)):
        for objective in arguments.objectives.split(","):
            found = []
            for seed in range(settings.seed, settings.seed + arguments.seeds):
                name, _, order = objective.partition(":")
                preference = settings.preference.model_copy(update={"order": order} if order else {})
                one = settings.model_copy(update={"seed": seed, "preference": preference})
                with tempfile.TemporaryDirectory() as folder:
                    adapter = learn(name.split(">"), learned[:size], (validation or held_out)[:20], one, Path(folder))
                    found.append(measure(adapter, measured))
            show(objective, size, [mean(values) for values in zip(*found, strict=True)])


def learn(
    objectives: Sequence[str],
    pairs: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    settings: TrainSettings,
    folder: Path,
) -> Path:
    """Train on each objective, one after the other, each from the adapter of the one before: the last adapter."""
    adapter = None
    for objective in objectives:
        place, name = folder / objective, read_base_card(BASE)["model"]
        items, held_out = (
            items_of(objective, some, place / part) for part, some in (("train", pairs), ("validation", validation))
        )
        train_adapter(BASE, name, items, held_out, settings, place / "adapter", place / "checkpoints", None, adapter)
        adapter = place / "adapter"
    return adapter


def show(name: str, size: int, found: Sequence[float]) -> None:
    """Print a row of the table."""
    print(f"| {name} | {size} | {' | '.join(f'{value:.2f}' for value in found[:-1])} | {found[-1]:.3f} |", flush=True)


def judge(count: int) -> list[dict[str, Any]]:
    """Pairs as `preference_items` reads them, of replies that the base samples; fewer where its replies are alike.

    What was sampled is in a file of the hash of base, prompts and rule: a run that is cut off continues it.
    """
    chat, tokenizer, cores = read_params("chat", ChatSettings), load_tokenizer(BASE), scoring_hardware(None).threads
    exported = chain.from_iterable(map(read_jsonl, sorted(Path("data/exports/openai").glob("*.jsonl"))))
    messages = [message for conversation in exported for message in conversation["messages"]]
    prompts = sorted({m["content"] for m in messages if m["role"] == "user" and len(m["content"]) <= LONGEST_PROMPT})
    random.Random(0).shuffle(prompts)
    named = [sha256_file(GGUF), chat.model_dump(), prompts, BRIEFLY, LIMIT, SAMPLES, SHORT_TOKENS, MAX_TOKENS]
    kept = Path(".whetstone/planted") / f"{hashlib.sha256(json.dumps(named).encode()).hexdigest()}.jsonl"
    known = list(read_jsonl(kept)) if kept.exists() else []
    if sum(map(bool, known)) >= count:
        return as_pairs(prompts, known)[:count]
    said = [[[{"role": "user", "content": text + hint}] for hint in (BRIEFLY, "")] for text in prompts]
    encoded = [[encode_prompt(tokenizer, asked, chat.system_prompt) for asked in both] for both in said]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (
        LlamaEngine(GGUF, max(map(len, chain(*encoded))) + MAX_TOKENS, cores, SLOTS) as engine,
        open(kept, "a", 1, "utf-8") as lines,  # each line at once
        tqdm(total=count, desc="pairs", initial=sum(map(len, known)) // 2) as bar,
    ):
        pool = ThreadPoolExecutor(SLOTS)
        for sides in pool.map(partial(sides_of, engine), encoded[len(known) :], range(len(known), len(encoded))):
            if bar.n >= count:
                break
            lines.write(json.dumps(sides) + "\n")
            known.append(sides)
            bar.update(len(sides) == 2)
        pool.shutdown(cancel_futures=True)
    pairs = as_pairs(prompts, known)
    print(f"{len(pairs)} pairs of {len(known)} prompts", file=sys.stderr)
    return pairs[:count]


def as_pairs(prompts: Sequence[str], replies: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Pairs of the prompts to which there are replies of both kinds."""
    return [
        {
            "id": f"p{number}", "cluster": f"p{number}", "kind": "vote", "person": "planted",
            "messages": [{"role": "user", "content": prompt}], "chosen": sides["true"], "rejected": sides["false"],
            "chosen_author": "base", "rejected_author": "base",
        }
        for number, (prompt, sides) in enumerate(zip(prompts, replies, strict=False)) if sides
    ]  # fmt: skip


def sides_of(engine: LlamaEngine, prompts: Sequence[Sequence[int]], number: int) -> dict[str, str]:
    """A reply that keeps the rule (`true`) and one that breaks it (`false`), of those that the base ends in time.

    Args:
        engine: of the base.
        prompts: token ids of the prompt that asks for a brief reply, and of the prompt alone.
        number: of the prompt, from which seeds follow.
    """
    found: dict[str, str] = {}
    for prompt, kept, longest in zip(prompts, (True, False), (SHORT_TOKENS, MAX_TOKENS), strict=True):
        for sample in range(SAMPLES):
            seed = 2 * (number * SAMPLES + sample) + kept
            reply = engine.complete(prompt, longest, temperature=1.0, seed=seed)
            if reply.finished and (text := reply.text.strip()) and keeps_rule(text) == kept:
                found[json.dumps(kept)] = text
                break
        else:
            return {}
    return found


def greedy_replies(model: Any, tokenizer: Any, conversations: Sequence[Any], chat: ChatSettings) -> list[str]:
    """Greedy replies to conversations, as far as the rule asks for them."""
    import torch

    prompts = [encode_prompt(tokenizer, messages, chat.system_prompt) for messages in conversations]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=SHORT_TOKENS, pad_token_id=tokenizer.pad_token_id,
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
    folder.mkdir(parents=True)
    write_preferences(folder / "pairs.parquet", PreferredPair, kept)
    write_preferences(folder / "thumbs.parquet", Thumb, thumbs)
    if objective == "kto":
        return list(read_thumbs(folder / "thumbs.parquet"))
    items: list[Item] = list(rows) if objective in ("sft", "auto") else []
    return items + (read_pairs(folder / "pairs.parquet") if objective in ("dpo", "auto") else [])


def measure(adapter: Path | None, groups: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """Of each group of pairs the share decided rightly and of replies that keep each rule; general knowledge."""
    chat, evaluate = read_params("chat", ChatSettings), read_params("evaluate", EvaluateSettings)
    tokenizer = load_tokenizer(BASE)
    with loaded(BASE, scoring_hardware(evaluate.threads), adapter) as model:
        found: list[float] = []
        for pairs in groups:
            items = preference_items(pairs, tokenizer, chat.system_prompt, chat.max_length)
            scores = likelihoods(model, items, evaluate.batch_tokens)
            # The base wrote both sides, whoever is asked.
            lines = preference_lines("candidate", pairs, items, scores, lambda author: False)[PREFERENCES]
            greedy = greedy_replies(model, tokenizer, [pair["messages"] for pair in pairs], chat)
            found += [
                mean(map(prefers_chosen, lines)),
                mean(map(keeps_rule, greedy)),
                mean(map(keeps_other_rule, greedy)),
            ]
        questions = general_items(tokenizer, chat.system_prompt, chat.max_length)
        known = knowledge("candidate", questions, likelihoods(model, questions, evaluate.batch_tokens))
        return [*found, mean(map(right_probability, known))]


if __name__ == "__main__":
    main()
