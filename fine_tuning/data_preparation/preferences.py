"""What people preferred, read from conversations: pairs of replies to one prompt, and replies with a thumb.

A pair comes from an edit against what it replaced, from a reply that was preferred to its alternatives (`vote`, where
the app asked blindly), and from a liked and a disliked reply to one prompt, also of different conversations. Of
contradicting judgements one person's newest counts, and of several people's the majority; ties make no pair.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.common.errors import count_of
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder
from fine_tuning.data_preparation.splits import LEFT_OUT, SPLITS
from fine_tuning.schema.chat_format import Encoded, RenderError, encode_conversation
from fine_tuning.schema.conversation import short_hash
from fine_tuning.schema.judgements import Judgement, Reply, folded, judgements_of
from fine_tuning.schema.preferences import PreferredPair, Thumb, write_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Found:
    """A pair, or a single reply with its thumb, before it is encoded."""

    judgement: Judgement
    conversations: list[str]


def settle(judgements: Iterable[Judgement], dropped: Counter[str]) -> tuple[list[Found], list[Found]]:
    """(pairs, replies with a thumb that are in no pair), in an order that depends on nothing but what was said.

    Args:
        dropped: counts what was dropped, by reason: `equal_replies`, `tie`.
    """
    direct: dict[tuple[str, frozenset[str]], list[Judgement]] = defaultdict(list)
    thumbs: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        texts = [folded(reply.text) for reply in (judgement.better, judgement.worse) if reply]
        if len(texts) == 1:
            thumbs[judgement.key, texts[0]].append(judgement)
        elif texts[0] == texts[1]:
            dropped["equal_replies"] += 1
        else:
            direct[judgement.key, frozenset(texts)].append(judgement)
    pairs = [_decided(said, lambda j: folded(j.better.text), dropped) for _, said in sorted(direct.items(), key=_order)]
    found = [pair for pair in pairs if pair]
    judged = {(pair.judgement.key, folded(r.text)) for pair in found for r in _replies(pair.judgement)}
    sides: dict[str, dict[bool, list[Found]]] = defaultdict(lambda: {True: [], False: []})
    for _, said in sorted(thumbs.items(), key=_order):
        if decided := _decided(said, lambda j: j.liked, dropped):
            sides[decided.judgement.key][decided.judgement.liked].append(decided)
    single: list[Found] = []
    for key, side in sides.items():
        taken = min(map(len, side.values()))
        for liked, disliked in zip(side[True], side[False], strict=False):
            first, second = liked.judgement, disliked.judgement
            if (key, frozenset(folded(j.better.text) for j in (first, second))) in direct:
                continue  # they were compared directly
            pair = Judgement(first.prompt, first.better, second.better, True, "thumbs", first.by, first.at, "")
            found.append(Found(pair, sorted({*liked.conversations, *disliked.conversations})))
        left = [*side[True][taken:], *side[False][taken:]]
        single += [thumb for thumb in left if (key, folded(thumb.judgement.better.text)) not in judged]
    return found, single


def _order(item: tuple[tuple[str, Any], list[Judgement]]) -> tuple[str, list[str]]:
    (key, texts), _ = item
    return key, sorted(texts) if isinstance(texts, frozenset) else [texts]


def _replies(judgement: Judgement) -> list[Reply]:
    return [judgement.better, *([judgement.worse] if judgement.worse else [])]


def _decided(said: list[Judgement], answer: Callable[[Judgement], Any], dropped: Counter[str]) -> Found | None:
    """The judgement that counts: of each person the newest, of all of them what most say; None for a tie."""
    newest: dict[str, Judgement] = {}
    for number, judgement in enumerate(sorted(said, key=lambda j: (j.at, j.conversation))):
        newest[judgement.by or f"unnamed {number}"] = judgement
    votes = Counter(map(answer, newest.values())).most_common(2)
    if len(votes) == 2 and votes[0][1] == votes[1][1]:
        dropped["tie"] += 1
        return None
    chosen = max((j for j in newest.values() if answer(j) == votes[0][0]), key=lambda j: (j.at, j.conversation))
    return Found(chosen, sorted({judgement.conversation for judgement in said}))


class PreferenceEncoder:
    """Makes token ids and labels of pairs and thumbs, each in the split of its conversations.

    Args:
        split_of: conversation id -> its split, None where it is in none.
        cluster_of: conversation id -> its cluster.
        overlaps_test: whether messages share a run of words with the test split.
        dropped: counts what was dropped, by reason: `no_split`, `two_splits`, `overlaps_test`, `too_long`, `template`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        system_prompt: str | None,
        max_length: int,
        split_of: Callable[[str], str | None],
        cluster_of: Callable[[str], str],
        overlaps_test: Callable[[list[dict[str, Any]]], bool],
        dropped: Counter[str],
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.split_of = split_of
        self.cluster_of = cluster_of
        self.overlaps_test = overlaps_test
        self.dropped = dropped

    def pair(self, found: Found) -> tuple[str, PreferredPair] | None:
        """(split, record) of a pair; None where it was dropped."""
        judgement, worse = found.judgement, found.judgement.worse
        assert worse is not None
        if not (placed := self._placed(found)):
            return None
        split, (chosen, rejected) = placed
        return split, PreferredPair(
            id=short_hash([judgement.key, judgement.better.text, worse.text]),
            cluster=self.cluster_of(found.conversations[0]),
            kind=judgement.kind,
            person=judgement.by,
            conversations=found.conversations,
            messages=judgement.prompt,
            chosen=judgement.better.text,
            rejected=worse.text,
            chosen_author=judgement.better.author,
            rejected_author=worse.author,
            chosen_ids=chosen.input_ids,
            chosen_labels=chosen.labels,
            rejected_ids=rejected.input_ids,
            rejected_labels=rejected.labels,
        )

    def thumb(self, found: Found) -> tuple[str, Thumb] | None:
        """(split, record) of a reply with its thumb; None where it was dropped."""
        judgement = found.judgement
        if not (placed := self._placed(found)):
            return None
        split, (encoded,) = placed
        return split, Thumb(
            id=short_hash([judgement.key, judgement.better.text]),
            cluster=self.cluster_of(found.conversations[0]),
            liked=judgement.liked,
            person=judgement.by,
            conversations=found.conversations,
            messages=judgement.prompt,
            reply=judgement.better.text,
            author=judgement.better.author,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
        )

    def _placed(self, found: Found) -> tuple[str, list[Encoded]] | None:
        reason, encoded = None, []
        splits = {self.split_of(identity) for identity in found.conversations}
        split = splits.pop()
        if splits or split is None:
            reason = "two_splits" if splits else "no_split"
        else:
            replies = [{"role": "assistant", "content": r.text} for r in _replies(found.judgement)]
            if split == "train" and self.overlaps_test([*found.judgement.prompt, *replies]):
                reason = "overlaps_test"
            else:
                try:
                    encoded = self._encode(found.judgement.prompt, replies)
                except RenderError:
                    reason = "template"
                else:
                    reason = None if encoded else "too_long"
        if reason or split is None:
            self.dropped[str(reason)] += 1
            return None
        return split, encoded

    def _encode(self, prompt: list[dict[str, Any]], replies: list[dict[str, Any]]) -> list[Encoded]:
        """All replies after the same prompt, without its oldest turns where it is too long; [] where none is left."""
        while True:
            encoded = [
                encode_conversation(
                    self.tokenizer,
                    [*prompt, reply],
                    self.system_prompt,
                    self.max_length,
                    [False] * len(prompt) + [True],
                )
                for reply in replies
            ]
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


def find_preferences(
    conversations: Iterable[dict[str, Any]],
    assigned: Iterable[tuple[str, str]],
    clusters: Iterable[tuple[str, str]],
    builder: DatasetBuilder,
    tokenizer: "PreTrainedTokenizerFast",
) -> Preferences:
    """The pairs and thumbs of clean conversations. What was judged is in memory, not the conversations.

    Args:
        assigned: (conversation id, split) of every conversation.
        clusters: (conversation id, cluster id) of near-duplicates; who is not named stands alone.
        builder: the one that assigned them.
    """
    dropped: Counter[str] = Counter()
    judgements = [j for conversation in conversations for j in judgements_of(conversation)]
    judged = {judgement.conversation for judgement in judgements}
    split_of = {identity: split for identity, split in assigned if identity in judged and split != LEFT_OUT}
    cluster = {identity: name for identity, name in clusters if identity in judged}
    encoder = PreferenceEncoder(
        tokenizer,
        builder.system_prompt,
        builder.max_length,
        split_of.get,
        lambda identity: cluster.get(identity, identity),
        builder.overlaps_test,
        dropped,
    )
    found = Preferences({split: [] for split in SPLITS}, {split: [] for split in SPLITS}, dropped)
    pairs, thumbs = settle(judgements, dropped)
    for pair in filter(None, map(encoder.pair, pairs)):
        found.pairs[pair[0]].append(pair[1])
    for thumb in filter(None, map(encoder.thumb, thumbs)):
        found.thumbs[thumb[0]].append(thumb[1])
    return found
