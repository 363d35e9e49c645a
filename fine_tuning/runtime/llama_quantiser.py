"""K-quants, which the `gguf` package cannot write, by llama.cpp's own quantiser.

A K-quant packs 256 weights of a row into one block. Rows that 256 does not divide get the next larger kind with blocks
of 32: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fine_tuning.common.errors import UserError
from fine_tuning.runtime import llama_quantize
from fine_tuning.runtime.base_model import gguf_field, load_model
from fine_tuning.runtime.gguf_writer import write_gguf

K_QUANTS = ("Q6_K", "Q5_K_M", "Q4_K_M")
IMPORTANCE_TOKENS = 8192  # read for the importance matrix; the mean of squares hardly changes after some thousands


def write_k_quant(
    model_dir: Path,
    path: Path,
    kind: str,
    texts: Iterable[Sequence[int]],
    threads: int,
    command: str | None = None,
    converter: str | None = None,
) -> None:
    """Write the model in `model_dir` as GGUF with K-quants at `path`.

    Args:
        texts: token ids of training conversations, of which the first IMPORTANCE_TOKENS make the importance matrix.
        command: llama.cpp's `llama-quantize`; None is PyPI's cyllama, which takes no importance matrix.
        converter: as for `write_gguf`.

    Raises:
        UserError: the quantiser is not there or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        source, importance, made = (Path(folder) / name for name in ("source.gguf", "importance.gguf", "made.gguf"))
        write_gguf(model_dir, source, "F16", converter)
        program = [sys.executable, "-P", llama_quantize.__file__]
        if command:
            write_importance(model_dir, gguf_field(source, "general.architecture"), texts, importance)
            program = [*shlex.split(command), "--imatrix", str(importance)]
        arguments = [str(source), str(made), kind, str(threads)]
        try:
            done = subprocess.run([*program, *arguments], capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise UserError(
                f"package.llama_quantize does not start ({error.strerror}): correct it in params.yaml"
            ) from None
        if "No module named 'cyllama'" in done.stderr:
            raise UserError(
                f"{kind} needs llama.cpp's quantiser: run `pip install --no-deps -r requirements-quantise.txt`, or set "
                "package.llama_quantize to your llama-quantize"
            )
        if done.returncode or not made.is_file():
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            raise UserError(f"llama.cpp's quantiser failed ({last}): choose another package.quantisation")
        os.replace(made, path)


def write_importance(model_dir: Path, architecture: str, texts: Iterable[Sequence[int]], path: Path) -> None:
    """Write the importance matrix as llama-imatrix does: for each linear layer the sum of squares of its inputs, by
    column, over the tokens of `texts`, and how many tokens that were."""
    import gguf
    import torch

    model = load_model(model_dir, torch.float32).eval()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: torch.nn.Linear) -> None:
        sums[name] = torch.zeros(layer.in_features)

        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            sums[name] += inputs[0].flatten(0, -2).square().sum(0)

        layer.register_forward_pre_hook(add)

    for key, layer in model.named_modules():
        name = (
            names.get_name(f"{key}.weight", try_suffixes=(".weight",)) if isinstance(layer, torch.nn.Linear) else None
        )
        if name is not None:
            watch(name, layer)
    tokens = 0
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids[: IMPORTANCE_TOKENS - tokens]]))
            tokens += min(len(ids), IMPORTANCE_TOKENS - tokens)
            if tokens == IMPORTANCE_TOKENS:
                break
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, ["training conversations"])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, 1)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, tokens)
    for name, total in sums.items():
        writer.add_tensor(f"{name}.in_sum2", total.numpy()[None])
        writer.add_tensor(f"{name}.counts", torch.full((1, 1), float(tokens)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
