"""Preference objectives: pairs of replies (DPO, IPO, hinge) and single judged replies (KTO).

Both compare the log-likelihoods of replies with those under the model that training starts from, the reference.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from fine_tuning.schema.preferences import JudgedReply, Pair
from fine_tuning.schema.prepared import PreparedRow, batch_by_tokens, collate
from fine_tuning.training.objectives.objective import Batch
from fine_tuning.training.objectives.token_losses import TokenLosses
from fine_tuning.training.settings import PreferenceSettings


class Referenced:
    """What both objectives share: two rows an item, computed together, and their log-likelihoods under the reference.

    Args:
        weight: how much a unit counts beside a trained token, where steps mix both.
    """

    rows_of: Any  # item -> its two rows

    def __init__(self, token_losses: TokenLosses, settings: PreferenceSettings, weight: float = 1.0) -> None:
        self.token_losses = token_losses
        self.settings = settings
        self.weight = weight
        self.references: dict[str, tuple[float, float]] = {}  # id of an item -> log-likelihoods (nats) of its rows

    def batches(self, items: Sequence[Any], budget: int, multiple: int = 1) -> list[list[Any]]:
        """Items of like length, with at most `budget` padded tokens in both rows together."""
        return batch_by_tokens(items, budget // 2, multiple)

    def collate(self, items: Sequence[Any]) -> Batch:
        """input_ids, attention_mask and labels (items, 2, longest), `reference` (items, 2) in nats."""
        flat = collate([row for item in items for row in self.rows_of(item)], self.token_losses.pad_token_id)
        inputs = {name: values.unflatten(0, (len(items), 2)) for name, values in flat.items()}
        none = (0.0, 0.0)  # while the references themselves are computed
        return inputs | {"reference": torch.tensor([self.references.get(item.id, none) for item in items])}

    def count(self, inputs: Batch) -> torch.Tensor:
        """How much the batch counts: `weight` an item."""
        return torch.as_tensor(self.weight * len(inputs["reference"]), device=inputs["reference"].device)

    def log_likelihoods(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Of both rows of each item, summed over their trained tokens: (items, 2), nats."""
        flat = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
        return -self.token_losses.of_rows(model, flat, 2).unflatten(0, (-1, 2))

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Summed loss of the items, times `weight`."""
        return self.measure(model, inputs)["loss"]

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """Sums over the items: `loss` (times `weight`) and what describes it."""
        raise NotImplementedError


class PairPreference(Referenced):
    """The chosen reply of a pair becomes likelier than the rejected one, measured from the reference.

    With h the difference of both log-ratios to the reference: `sigmoid` is -log s(beta h) (DPO, Rafailov et al. 2023;
    label smoothing as in cDPO, Mitchell 2023), `hinge` is max(0, 1 - beta h) (SLiC, Zhao et al. 2023), `ipo` is
    (h - 1 / (2 beta))^2 with log-ratios a token (Azar et al. 2023). `sft_weight` adds the chosen reply's negative
    log-likelihood a token (RPO, Pang et al. 2024).
    """

    @staticmethod
    def rows_of(pair: Pair) -> tuple[PreparedRow, PreparedRow]:
        """The chosen and the rejected reply, each after the prompt."""
        return pair.chosen, pair.rejected

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """`loss`; `accuracy` and `margin` of the implicit reward; `chosen` and `rejected`, their log-ratios (nats).

        `kl`, minus their mean, is the divergence of the reference from the model (nats a reply) where it wrote both.
        """
        found = self.log_likelihoods(model, inputs)
        ratios = found - inputs["reference"]
        lengths = (inputs["labels"][:, :, 1:] >= 0).sum(-1)
        settings, beta = self.settings, self.settings.beta
        margin = beta * (ratios[:, 0] - ratios[:, 1])
        if settings.loss == "sigmoid":
            smooth = settings.label_smoothing
            losses = -(1 - smooth) * functional.logsigmoid(margin) - smooth * functional.logsigmoid(-margin)
        elif settings.loss == "hinge":
            losses = torch.relu(1 - margin)
        else:
            a_token = ratios / lengths
            losses = (a_token[:, 0] - a_token[:, 1] - 1 / (2 * beta)) ** 2
        if settings.sft_weight:
            losses = losses - settings.sft_weight * found[:, 0] / lengths[:, 0]
        chosen, rejected = ratios.detach().sum(0)
        described = {"accuracy": (margin > 0).sum(), "margin": margin.detach().sum(), "kl": -(chosen + rejected) / 2}
        return {"loss": self.weight * losses.sum(), **described, "chosen": chosen, "rejected": rejected}


class ThumbPreference(Referenced):
    """KTO (Ethayarajh et al. 2024): liked replies become likelier than the reference has them, disliked ones less.

    The point of comparison is the mean log-ratio of replies to other prompts in the batch, at least 0. The rarer of
    liked and disliked weighs as much as the other, as the paper advises.
    """

    def __init__(
        self, token_losses: TokenLosses, settings: PreferenceSettings, weight: float, replies: Sequence[JudgedReply]
    ) -> None:
        super().__init__(token_losses, settings, weight)
        counts = Counter(reply.liked for reply in replies)
        self.class_weights = {liked: max(counts.values()) / count for liked, count in counts.items()}

    @staticmethod
    def rows_of(reply: JudgedReply) -> tuple[PreparedRow, PreparedRow]:
        """The judged reply after its prompt, and after the same prompt the reply to another one."""
        return reply.reply, reply.mismatched

    def batches(self, items: Sequence[JudgedReply], budget: int, multiple: int = 1) -> list[list[JudgedReply]]:
        """Liked and disliked in turn, each by length; see `Referenced`.

        Where one kind is shorter, batches of like length would be of one kind: a step would move every reply alike.
        """
        place: dict[str, float] = {}
        for liked in (True, False):
            own = sorted((item for item in items if item.liked == liked), key=_length)
            place |= {item.id: (number + 0.5) / len(own) for number, item in enumerate(own)}
        ordered = sorted(items, key=lambda item: (place[item.id], item.id))
        found: list[list[JudgedReply]] = []
        for start in range(0, len(ordered), multiple):
            group = ordered[start : start + multiple]
            together = [*found[-1], *group] if found else group
            if found and 2 * len(together) * max(len(item.input_ids) for item in together) <= budget:
                found[-1] = together
            else:
                found.append(group)
        return [sorted(batch, key=_length) for batch in found]

    def collate(self, items: Sequence[JudgedReply]) -> Batch:
        """See `Referenced`; and `sign` (items), 1 for liked, -1 for disliked."""
        sign = torch.tensor([1.0 if item.liked else -1.0 for item in items])
        weights = torch.tensor([self.class_weights.get(item.liked, 1.0) for item in items])
        return super().collate(items) | {"sign": sign, "class_weight": weights}

    def log_ratios(self, model: Any, inputs: Batch, side: int) -> torch.Tensor:
        """Of the judged replies (`side` 0), or of the mismatched ones (1), to the reference: (items), nats."""
        rows = {name: inputs[name][:, side] for name in ("input_ids", "attention_mask", "labels")}
        return -self.token_losses.of_rows(model, rows) - inputs["reference"][:, side]

    @torch.no_grad()
    def compare_with(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Log-ratios of the mismatched replies, whose mean over a whole batch is `kl` of each of its parts."""
        return self.log_ratios(model, inputs, 1)

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """`loss`; `accuracy`, how many move to the side that they were judged for; `kl`, the mean log-ratio (nats)."""
        compared = inputs["kl"] if "kl" in inputs else self.compare_with(model, inputs)
        kl = compared.mean().clamp(min=0)
        rewards = self.settings.beta * (self.log_ratios(model, inputs, 0) - kl) * inputs["sign"]
        losses = inputs["class_weight"] * torch.sigmoid(-rewards)
        return {
            "loss": self.weight * losses.sum(),
            "accuracy": (rewards > 0).sum(),
            "margin": rewards.detach().sum(),
            "kl": kl * len(rewards),
        }


def _length(item: JudgedReply) -> tuple[int, str]:
    return len(item.input_ids), item.id
