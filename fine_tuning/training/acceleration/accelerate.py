"""`train.acceleration: auto`: faster training with the same losses and gradients, installed for one run.

What is installed, each where model, settings and hardware allow it: fused LoRA layers and norms (`fused`), a common
prefix that is computed once a batch (`shared_prefix`), logits at trained positions only (here), recorded kernels on a
GPU (`cuda_graphs`) and, through `count_micro_batches`, two halves of a batch at once. All changes to the model go
through `Patches` and are undone when the block ends.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fine_tuning.runtime.hardware import Hardware
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import PreparedRow, batch_by_tokens, collate
from fine_tuning.training.acceleration.cuda_graphs import (
    BatchShape,
    length_class,
    record_layers,
    recordable_shapes,
    shape_of,
)
from fine_tuning.training.acceleration.fused import fuse, has_plain_head, label_losses
from fine_tuning.training.acceleration.patches import Patches
from fine_tuning.training.acceleration.shared_prefix import lay_out, share_prefixes
from fine_tuning.training.objectives.objective import Batch
from fine_tuning.training.objectives.token_losses import TokenLosses
from fine_tuning.training.settings import TrainSettings


@contextmanager
def accelerated(
    model: Any,
    plain: TokenLosses,
    base: Path,
    train_rows: Sequence[PreparedRow],
    longest: int,
    settings: TrainSettings,
    hardware: Hardware,
) -> Iterator[TokenLosses]:
    """Yield what computes losses: `plain`, or a faster form of it on a model that is patched meanwhile.

    Args:
        model: with its adapter.
        base: folder of the model, which says how much memory it takes.
        longest: tokens of the longest row, of training and validation.
    """
    with Patches() as patches:
        if settings.acceleration == "off":
            yield plain
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if hardware.precision != "float16":  # which is computed from weights in float32
            fuse(model, patches)
        random = settings.lora.dropout or settings.neftune_alpha
        shared = not (random or settings.packing) and share_prefixes(model, longest, patches)
        shapes = recordable_shapes(base, train_rows, trained, settings, hardware) if shared else set()
        if shapes:
            record_layers(model, shapes, patches)

        def drop_gradients(set_to_none: bool = True) -> None:
            # Model.zero_grad looks through all modules, which takes as long as much of a GPU's step.
            for parameter in trained:
                parameter.grad = None

        patches.replace(model, "zero_grad", drop_gradients)
        mixed = hardware.precision != "float32"
        yield AcceleratedTokenLosses(model, plain, settings.batch_tokens, shared and not shapes, shapes, mixed, patches)


class AcceleratedTokenLosses(TokenLosses):
    """The same losses with less work: the output head sees only the positions that carry a label.

    The head of a small model with a large vocabulary costs a fifth of the work, most of it for prompts and padding.

    Args:
        budget: tokens of a batch.
        shared_prefixes: whether the model was changed by `share_prefixes` and batches are laid out for it.
        shapes: batch shapes that `record_layers` records; batches are padded to them.
        mixed_precision: whether autocast computes in another number format than that of the weights.
    """

    def __init__(
        self,
        model: Any,
        plain: TokenLosses,
        budget: int,
        shared_prefixes: bool,
        shapes: set[BatchShape],
        mixed_precision: bool,
        patches: Patches,
    ) -> None:
        super().__init__(plain.pad_token_id, plain.packing)
        self.budget = budget
        self.shared_prefixes = shared_prefixes
        self.shapes = shapes
        self._at = threading.local()  # trained positions of the batch that a thread computes, and hidden states there
        self._head = model.get_output_embeddings()
        self._fused_head = not mixed_precision and has_plain_head(model)
        hook = self._head.register_forward_pre_hook(lambda module, inputs: self._select(inputs[0]))
        patches.callback(hook.remove)

    def batches(self, rows: Sequence[PreparedRow], budget: int, multiple: int = 1) -> list[list[PreparedRow]]:
        """As in the plain form; for recorded kernels lengths are rounded up."""
        return batch_by_tokens(rows, budget, multiple, length_class if self.shapes else int)

    def collate(self, rows: Sequence[PreparedRow]) -> Batch:
        """As in the plain form; batches of a recorded shape are padded to it."""
        if self.shapes and (shape := shape_of(rows, self.budget)) in self.shapes:
            return collate(rows, self.pad_token_id, shape)
        return super().collate(rows)

    def __call__(self, model: Any, inputs: Batch, together: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        row_of = None
        if self.shared_prefixes:
            inputs = lay_out(inputs, together)
            row_of = inputs.pop("row_of")
        labels = inputs["labels"]
        # Looked up before the layers run: afterwards this would wait for the GPU to finish them.
        rows, columns = (labels[:, 1:] != NOT_TRAINED).nonzero(as_tuple=True)
        targets = labels[rows, columns + 1]
        self._at.trained = rows, columns
        try:
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[0]
        finally:
            self._at.trained = None
        # Kept until the next step, the hidden states would keep their whole graph alive.
        hidden, self._at.hidden = self._at.hidden, None
        if self._fused_head:
            losses = label_losses(hidden, self._head.weight, targets)
        else:
            losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        return losses, rows if row_of is None else row_of[0, columns + 1]

    def _select(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        # (rows, tokens, hidden) -> (1, trained positions, hidden); the fused head gets them separately.
        if getattr(self._at, "trained", None) is None:
            return (hidden,)
        self._at.hidden = hidden[self._at.trained]
        return (hidden[:1, :1] if self._fused_head else self._at.hidden.unsqueeze(0),)
