"""On a GPU the kernels of a model's layers are recorded once for each shape of a batch, and launched as one after that.

A step of a small model launches some ten thousand kernels, and the GPU waits for the program that launches them one by
one. PyTorch records what a shape launches, forward and backward, as CUDA graphs (Nguyen et al. 2021, "Accelerating
PyTorch with CUDA Graphs"). So that few shapes serve many batches, lengths are rounded up and rows filled up with
padding, which changes no loss: attention is causal and padding comes last.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from fine_tuning.runtime.hardware import Hardware
from fine_tuning.schema.prepared import PreparedRow, batch_by_tokens, round_up
from fine_tuning.training.acceleration.micro_batches import is_plain
from fine_tuning.training.acceleration.patches import Patches
from fine_tuning.training.memory import Shape, memory_needed, read_shape
from fine_tuning.training.settings import TrainSettings

LEAST_USES = 4  # recording a shape takes as long as two steps without
MOST_SHAPES = 32
SHARE_OF_MEMORY = 1 / 16  # of the GPU's, for what recordings keep
WORKSPACE = 100e6  # bytes of a recording: the graph, and the space that its products work in
# Parameters times tokens of a batch from which on the products take longer than the launches: 4 operations for each, at
# some 4e14 a second, against 9,000 launches of 10 microseconds.
LARGEST_STEP = 1e13

BatchShape = tuple[int, int]


def may_record(settings: TrainSettings, hardware: Hardware) -> bool:
    """Whether steps are of the kind that can be recorded: plain ones on a GPU, without accumulation.

    A recording writes its gradients into one place every time, where accumulation would add (pytorch/pytorch#181723).
    """
    return hardware.device == "cuda" and settings.gradient_accumulation == 1 and is_plain(settings)


def length_class(length: int) -> int:
    """The length (tokens) that a row is padded to: a multiple of 16, and from 128 on one of four an octave."""
    return round_up(length, max(16, 2 ** ((length - 1).bit_length() - 3)))


def shape_of(batch: Sequence[PreparedRow], budget: int) -> BatchShape:
    """(rows, tokens a row) that a batch is padded to: a length of its class, and all rows that `budget` tokens hold."""
    length = length_class(max(len(row.input_ids) for row in batch))
    return max(len(batch), budget // length), length


def frequent_shapes(
    batches: Sequence[Sequence[PreparedRow]], budget: int, uses_a_batch: float, most: int
) -> set[BatchShape]:
    """The shapes that are used often enough to be recorded, the `most` frequent of them.

    Args:
        batches: of one epoch, made for `budget` tokens each.
        uses_a_batch: how often each batch is trained on, such as the number of epochs.
    """
    counts = Counter(shape_of(batch, budget) for batch in batches)
    often = [shape for shape, count in counts.items() if count * uses_a_batch >= LEAST_USES]
    return set(sorted(often, key=lambda shape: (-counts[shape], shape))[:most])


def shapes_to_record(base: Shape, settings: TrainSettings, hardware: Hardware, trainable: int, memory: int) -> int:
    """How many shapes to record at most: none where that gains nothing or the GPU has no room for it.

    Recordings have activations of their own, for which some space is lost between shapes and which steps that are not
    recorded cannot use: three times those of a batch have to fit. Each keeps its gradients, its output and that one's
    gradient.

    `trainable` are the adapter's parameters, `memory` all bytes of the GPU, used or not: what is free changes, and
    results must not change with it.
    """
    if base.parameters * settings.batch_tokens > LARGEST_STEP:
        return 0
    weights, activations = memory_needed(base, settings, hardware)
    room = min(SHARE_OF_MEMORY * memory, memory - weights - 3 * activations - 0.5e9)
    each = 4 * trainable + 2 * 4 * settings.batch_tokens * base.hidden + WORKSPACE
    return max(0, min(MOST_SHAPES, int(room / each)))


def recordable_shapes(
    base: Path,
    rows: Sequence[PreparedRow],
    trained: Sequence[nn.Parameter],
    settings: TrainSettings,
    hardware: Hardware,
) -> set[BatchShape]:
    """The batch shapes of a run on `rows` to record; none where steps are of another kind or nothing is gained."""
    if not may_record(settings, hardware):
        return set()
    batches = batch_by_tokens(rows, settings.batch_tokens, padded=length_class)
    uses = settings.max_steps / len(batches) if settings.max_steps else settings.epochs
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    trainable = sum(parameter.numel() for parameter in trained)
    most = shapes_to_record(read_shape(base), settings, hardware, trainable, memory)
    return frequent_shapes(batches, settings.batch_tokens, uses, most)


def record_layers(model: Any, shapes: set[BatchShape], patches: Patches) -> None:
    """Let the layers of a causal model replay recordings for batches of these shapes, each made when first needed.

    Attention must need no mask (see `share_prefixes`). Only training steps are recorded. One step's backward pass has
    to be over before the next begins: recordings share their memory. Layers that cannot be recorded, such as those that
    choose experts, run as before: a line says so, and `shapes` is emptied.
    """
    base = model.get_base_model()
    layers = getattr(base, base.base_model_prefix)
    plain = layers.forward
    recordings: dict[BatchShape, Callable[[torch.Tensor], torch.Tensor]] = {}
    pool = torch.cuda.graph_pool_handle()
    # Recordings are made on a stream of their own, of which PyTorch warns once.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    patches.callback(torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch, True)

    def forward(input_ids: torch.Tensor | None = None, **rest: Any) -> Any:
        shape = None if input_ids is None else tuple(input_ids.shape)
        if shape not in shapes or not (layers.training and torch.is_grad_enabled()):
            return plain(input_ids=input_ids, **rest)
        if shape not in recordings:
            stream = torch.cuda.current_stream()
            try:
                recordings[shape] = _recording(layers, plain, input_ids, pool)
            except Exception as error:
                torch.cuda.set_stream(stream)  # a failed recording does not restore it
                shapes.clear()
                print(f"train: continuing without CUDA graphs, which this base or GPU refuses ({type(error).__name__})")
                return plain(input_ids=input_ids, **rest)
        return BaseModelOutputWithPast(last_hidden_state=recordings[shape](input_ids))

    patches.replace(layers, "forward", forward)


def _recording(layers: nn.Module, plain: Any, input_ids: torch.Tensor, pool: Any) -> Callable:
    kind, hidden = input_ids.device.type, _HiddenStates(layers, plain)
    # A cast weight that autocast keeps would be missing when the recording runs again.
    with torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    ):
        recording = torch.cuda.make_graphed_callables(hidden, (input_ids.clone(),), num_warmup_iters=1, pool=pool)
    # What autograd noted while recording belongs to the stream of the recording, with which every step would have to
    # wait for each parameter.
    hidden.output.detach_()
    del hidden.output
    return recording


class _HiddenStates(nn.Module):
    """A model's layers as the one function of one tensor that PyTorch records."""

    def __init__(self, layers: nn.Module, forward: Any) -> None:
        super().__init__()
        self.layers = layers
        self.run = forward
        self.output: torch.Tensor

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        outputs = self.run(input_ids=input_ids, use_cache=False)
        if type(outputs) is not BaseModelOutputWithPast:
            raise TypeError(type(outputs).__name__)
        self.output = outputs.last_hidden_state
        return self.output
