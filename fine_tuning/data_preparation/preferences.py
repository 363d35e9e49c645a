"""What people preferred, read from conversations: pairs of replies to one prompt, and replies with a thumb.

A pair comes from an edit against what it replaced, from a reply that was preferred to its alternatives (`vote`, where
the app asked blindly), and from a liked and a disliked reply to one prompt, also of different conversations. Of
contradicting judgements one person's newest counts, and of several people's the majority; ties make no pair.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fine_tuning.common.errors import count_of
from fine_tuning.data_preparation.catalogue import Catalogue, Conversations, read_spans
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder, loaded
from fine_tuning.data_preparation.splits import SPLITS
from fine_tuning.schema.chat_format import Encoded, RenderError, encode_conversation
from fine_tuning.schema.conversation import short_hash
from fine_tuning.schema.judgements import Judgement, Reply, folded, judgements_of
from fine_tuning.schema.preferences import PreferredPair, Thumb, write_preferences


@dataclass
class Found:
    """A pair, or a single reply with its thumb, before it is encoded."""

    judgement: Judgement
    conversations: list[str]


def settle(judgements: Iterable[Judgement], dropped: Counter[str]) -> tuple[list[Found], list[Found]]:
    """(pairs, replies with a thumb that are in no pair), in an order that depends on nothing but what was said.

    `dropped` counts what was dropped, by reason: `equal_replies`, `tie`.
    """
    direct: dict[tuple[str, tuple[str, ...]], list[Judgement]] = defaultdict(list)
    thumbs: dict[tuple[str, tuple[str, ...]], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        texts = tuple(sorted(folded(reply.text) for reply in _replies(judgement)))
        if len(texts) > len(set(texts)):
            dropped["equal_replies"] += 1
        else:
            (direct if judgement.worse else thumbs)[judgement.key, texts].append(judgement)
    pairs = (_decided(said, lambda j: folded(j.better.text), dropped) for _, said in sorted(direct.items()))
    found = [pair for pair in pairs if pair]
    judged = {(pair.judgement.key, folded(r.text)) for pair in found for r in _replies(pair.judgement)}
    sides: dict[str, dict[bool, list[Found]]] = defaultdict(lambda: {True: [], False: []})
    for _, said in sorted(thumbs.items()):
        if decided := _decided(said, lambda j: j.liked, dropped):
            sides[decided.judgement.key][decided.judgement.liked].append(decided)
    single: list[Found] = []
    for key, side in sides.items():
        taken = min(map(len, side.values()))
        for liked, disliked in zip(side[True], side[False], strict=False):
            first, second = liked.judgement, disliked.judgement
            if (key, tuple(sorted(folded(j.better.text) for j in (first, second)))) in direct:
                continue  # they were compared directly
            pair = Judgement(first.prompt, first.better, second.better, True, "thumbs", first.by, first.at, "")
            found.append(Found(pair, sorted({*liked.conversations, *disliked.conversations})))
        left = [*side[True][taken:], *side[False][taken:]]
        single += [thumb for thumb in left if (key, folded(thumb.judgement.better.text)) not in judged]
    return found, single


def _replies(judgement: Judgement) -> list[Reply]:
    return [reply for reply in (judgement.better, judgement.worse) if reply]


def _decided(said: list[Judgement], answer: Callable[[Judgement], Any], dropped: Counter[str]) -> Found | None:
    """The judgement that counts: of each person the newest, of all of them what most say; None for a tie.

    Whoever has no name is one person, as in an app without sign-in, but for what was said at the same time.
    """
    newest: dict[str | tuple[str, int], Judgement] = {}
    unnamed = max((judgement.at for judgement in said if not judgement.by), default="")
    for number, judgement in enumerate(sorted(said, key=lambda j: (j.at, j.conversation))):
        if judgement.by or judgement.at == unnamed:
            newest[judgement.by or ("unnamed", number)] = judgement
    votes = Counter(map(answer, newest.values())).most_common(2)
    if len(votes) == 2 and votes[0][1] == votes[1][1]:
        dropped["tie"] += 1
        return None
    chosen = max((j for j in newest.values() if answer(j) == votes[0][0]), key=lambda j: (j.at, j.conversation))
    return Found(chosen, sorted({judgement.conversation for judgement in said}))


@dataclass
class PreferenceEncoder:
    """Makes token ids and labels of pairs and thumbs, each in the split of its conversations."""

    builder: DatasetBuilder  # the one that assigned the conversations
    split_of: Mapping[str, str]  # by conversation id; one that is not named is in no split
    cluster_of: Mapping[str, str]  # by conversation id; one that is not named is a cluster of its own
    dropped: Counter[str]  # counts `no_split`, `two_splits`, `overlaps_test`, `too_long`, `template`

    def record(self, found: Found) -> tuple[str, PreferredPair | Thumb] | None:
        """(split, record) of a pair or of a reply with its thumb; None where it was dropped."""
        if not (placed := self._placed(found)):
            return None
        split, encoded = placed
        judgement, first = found.judgement, found.conversations[0]
        better, worse = judgement.better, judgement.worse
        shared: dict[str, Any] = {
            "id": short_hash([judgement.key, *(reply.text for reply in _replies(judgement))]),
            "cluster": self.cluster_of.get(first, first),
            "person": judgement.by,
            "conversations": found.conversations,
            "messages": judgement.prompt,
        }
        if worse is None:
            shared |= {"liked": judgement.liked, "reply": better.text, "author": better.author}
            return split, Thumb(**shared, input_ids=encoded[0].input_ids, labels=encoded[0].labels)
        chosen, rejected = encoded
        return split, PreferredPair(
            **shared,
            kind=judgement.kind,
            chosen=better.text,
            rejected=worse.text,
            chosen_author=better.author,
            rejected_author=worse.author,
            chosen_ids=chosen.input_ids,
            chosen_labels=chosen.labels,
            rejected_ids=rejected.input_ids,
            rejected_labels=rejected.labels,
        )

    def _placed(self, found: Found) -> tuple[str, list[Encoded]] | None:
        """The split of all its conversations, and its encoded replies."""
        prompt = found.judgement.prompt
        replies = [{"role": "assistant", "content": reply.text} for reply in _replies(found.judgement)]
        splits = {self.split_of.get(identity) for identity in found.conversations}
        split = splits.pop()
        if splits:
            reason = "two_splits"
        elif split is None:
            reason = "no_split"
        elif split == "train" and self.builder.overlaps_test([*prompt, *replies]):
            reason = "overlaps_test"
        else:
            try:
                if encoded := self._encode(prompt, replies):
                    return split, encoded
                reason = "too_long"
            except RenderError:
                reason = "template"
        self.dropped[reason] += 1
        return None

    def _encode(self, prompt: list[dict[str, Any]], replies: list[dict[str, Any]]) -> list[Encoded]:
        """All replies after the same prompt, without its oldest turns where it is too long; [] where none is left."""
        tokenizer, limits = loaded(self.builder.tokenizer), (self.builder.system_prompt, self.builder.max_length)
        while True:
            trained = [False] * len(prompt) + [True]
            encoded = [encode_conversation(tokenizer, [*prompt, reply], *limits, trained) for reply in replies]
            dropped = max(one.dropped_messages for one in encoded)
            if not dropped:
                return [] if any(one.cut_tokens for one in encoded) else encoded
            head = int(prompt[0]["role"] == "system")
            prompt = prompt[:head] + prompt[head + dropped :]


@dataclass
class Preferences:
    """The pairs and thumbs of each split, and what was dropped for which reason."""

    pairs: dict[str, list[PreferredPair]]
    thumbs: dict[str, list[Thumb]]
    dropped: Counter[str]

    def write(self, pairs: Path, thumbs: Path) -> None:
        """Write a Parquet file a split into both folders."""
        for split in SPLITS:
            write_preferences(pairs / f"{split}.parquet", PreferredPair, self.pairs[split])
            write_preferences(thumbs / f"{split}.parquet", Thumb, self.thumbs[split])

    def statistics(self) -> dict[str, Any]:
        """Counts by split and kind, and lengths of chosen and rejected replies in trained tokens."""
        every = [pair for split in self.pairs.values() for pair in split]
        lengths = [[sum(label >= 0 for label in side) for side in (p.chosen_labels, p.rejected_labels)] for p in every]
        chosen, rejected = (sum(column) / len(lengths) for column in zip(*lengths, strict=True)) if every else (0, 0)
        longer = sum(chosen > rejected for chosen, rejected in lengths)
        return {
            "pairs": {split: len(found) for split, found in self.pairs.items()},
            "pairs_by_kind": dict(sorted(Counter(pair.kind for pair in every).items())),
            "thumbs": {
                split: {"liked": sum(t.liked for t in found), "disliked": sum(not t.liked for t in found)}
                for split, found in self.thumbs.items()
            },
            "left_out": dict(sorted(self.dropped.items())),
            "chosen_tokens_mean": round(chosen, 1),
            "rejected_tokens_mean": round(rejected, 1),
            "chosen_longer_share": round(longer / len(lengths), 3) if lengths else 0.0,
        }

    def report(self) -> Iterator[str]:
        """A line of how many there are, where there are any, and one of what was left out."""
        counts = self.statistics()
        if every := sum(counts["pairs"].values()):
            kinds = ", ".join(f"{count} {kind}" for kind, count in counts["pairs_by_kind"].items())
            train = counts["pairs"]["train"]
            yield f"{count_of(every, 'pair')} of a preferred and another reply ({kinds}), {train} to train on"
        if thumbs := sum(len(found) for found in self.thumbs.values()):
            yield f"{count_of(thumbs, 'thumb')} on single replies"
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
            yield f"preferences left out: {reasons}"


def find_preferences(conversations: Conversations, catalogue: Catalogue, builder: DatasetBuilder) -> Preferences:
    """The pairs and thumbs of clean conversations that `builder` assigned to the splits of `catalogue`.

    What was judged is in memory, not the conversations.
    """
    dropped: Counter[str] = Counter()
    split_of, cluster_of, judgements = {}, {}, []
    rows = np.flatnonzero(catalogue.facts.column("judged"))
    names = zip(catalogue.split[rows].tolist(), catalogue.cluster_names(rows), strict=True)
    for conversation, (split, cluster) in zip(read_spans(conversations.spans(rows)), names, strict=True):
        identity = conversation["id"]
        judgements += judgements_of(conversation)
        cluster_of[identity] = cluster or identity
        if 0 <= split < len(SPLITS):
            split_of[identity] = SPLITS[split]
    encoder = PreferenceEncoder(builder, split_of, cluster_of, dropped)
    found = Preferences({split: [] for split in SPLITS}, {split: [] for split in SPLITS}, dropped)
    for split, record in filter(None, map(encoder.record, chain(*settle(judgements, dropped)))):
        kind: dict[str, list[Any]] = found.pairs if isinstance(record, PreferredPair) else found.thumbs
        kind[split].append(record)
    return found
