"""Train a LoRA adapter (Hu et al. 2021) on assistant tokens: sorted batches, logits at trained positions only."""

import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments, set_seed

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import code_sha256, sha256_file, versions
from fine_tuning.common.records import read_json, unlinked, write_json
from fine_tuning.runtime.base_model import load_model, quiet_transformers
from fine_tuning.runtime.hardware import Hardware, detect_hardware, is_main_process, process_count
from fine_tuning.schema.preferences import Item, JudgedReply, Pair, rows_of
from fine_tuning.schema.prepared import PreparedRow, count_labels
from fine_tuning.training.acceleration.accelerate import accelerated
from fine_tuning.training.acceleration.micro_batches import count_micro_batches
from fine_tuning.training.adopted import take_adapter
from fine_tuning.training.checkpoints import is_outdated, newest_checkpoint, sort_adapter_config
from fine_tuning.training.label_trainer import LabelTrainer
from fine_tuning.training.memory import check_memory, read_shape
from fine_tuning.training.objectives.mixture import objective_for
from fine_tuning.training.objectives.retention import general_texts
from fine_tuning.training.objectives.token_losses import TokenLosses
from fine_tuning.training.processes import check_spreading, keep_adapter_whole, spreading, take_own_gpu
from fine_tuning.training.qlora_trainer import WeightsMemory, check_bitsandbytes, load_quantised_base, weights_memory
from fine_tuning.training.row_checks import check_rows
from fine_tuning.training.run_guard import Progress, RunGuard, check_loss, is_over
from fine_tuning.training.settings import TrainSettings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value")
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "lion_8bit": "lion_8bit", "sgd": "sgd"}


@dataclass
class TrainingResult:
    """What a run measured. Losses are mean negative log-likelihoods a trained token, in nats; without supervised rows
    those of the preference objective; without steps there is no training loss. `validation` has what every objective
    measured, by name."""

    steps: int
    train_loss: float | None
    validation_loss_before: float
    validation_loss: float
    trained_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_mb: float
    base_weights: WeightsMemory
    trainable_parameters: int
    hardware: Hardware
    validation: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)


def train_adapter(
    base: Path,
    base_name: str,
    train_items: Sequence[Item],
    validation_items: Sequence[Item],
    settings: TrainSettings,
    output: Path,
    checkpoints: Path,
    progress: Progress | None = None,
    start_from: Path | None = None,
    references: Path | None = None,
) -> TrainingResult:
    """Train an adapter on `base` and write it to `output`; resume from `checkpoints` if a run was cut off.

    Args:
        base: Hugging Face folder.
        train_items, validation_items: prepared rows, pairs and judged replies; each kind has its own batches.
        base_name: what the adapter's configuration calls its base, such as the id on the hub.
        checkpoints: folder of this run's checkpoints, named by `checkpoint_key`; emptied by the caller when done.
        progress: called with each logged step's values (step, loss, learning_rate, grad_norm, eval_loss).
        start_from: folder of an adapter of the same shape to continue training, instead of a new one. With
            `settings.max_steps` 0 it is measured and copied as it is, whatever its shape.
        references: folder where log-likelihoods of preference items under the model before training are kept.

    Raises:
        UserError: nothing to train, too little memory, a target module that the base lacks, an adapter to start from
            that does not fit, bitsandbytes that is needed and does not work, or a loss that is no number (the last good
            checkpoint stays).
        KeyboardInterrupt: Ctrl-C, after the step under way and a checkpoint.
    """
    train_rows, validation_rows = rows_of(train_items), rows_of(validation_items)
    check_rows(train_rows, "train")
    check_rows(validation_rows, "validation")
    hardware, micro_batches = prepare_machine(settings)
    plain = load_base(base, settings, hardware)
    longest = max(len(row.input_ids) for row in (*train_rows, *validation_rows))
    texts = general_texts(base, plain, longest) if settings.retention else ()
    adopted = start_from if settings.max_steps == 0 else None
    model = adapted_model(plain, base_name, settings, start_from)
    token_losses = TokenLosses(model.config.get_text_config().pad_token_id or 0, settings.packing)
    guard = RunGuard(settings, progress)
    supervised = [item for item in train_items if isinstance(item, PreparedRow)]
    with accelerated(model, token_losses, base, supervised, longest, settings, hardware) as token_losses:
        objective = objective_for(train_items, validation_items, token_losses, settings, texts)
        batches = objective.training_batches(train_items, settings.batch_tokens, micro_batches)
        trainer = LabelTrainer(
            objective=objective,
            micro_batches=micro_batches,
            supervised_first=settings.preference.order == "supervised_first",
            model=model,
            args=training_arguments(settings, hardware, checkpoints, len(batches)),
            train_dataset=batches,
            eval_dataset=objective.batches(validation_items, 2 * settings.batch_tokens),
            callbacks=[guard],
        )
        trainer.remove_callback(PrinterCallback)
        before = first_loss(trainer)
        note_references(trainer, base, start_from, references)
        started = time.monotonic()
        tokens = 0 if adopted else run_steps(trainer, guard, checkpoints)
        seconds = time.monotonic() - started
        after = trainer.validate()
    steps, history = trainer.state.global_step, [] if adopted else trainer.state.log_history
    loss = supervised_loss(after)
    check_loss("validation", loss, steps)
    if adopted:
        take_adapter(adopted, output)
    else:
        save_adapter(model, base_name, output)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainingResult(
        steps=steps,
        train_loss=sum(losses) / len(losses) if losses else None,
        validation_loss_before=before,
        validation_loss=loss,
        trained_tokens=count_labels(train_rows),
        tokens=sum(len(row.input_ids) for row in train_rows),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_mb=peak_memory_mb(hardware),
        base_weights=weights_memory(model, hardware),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        hardware=hardware,
        validation=after,
        history=[entry for entry in history if "train_loss" not in entry],
    )


def prepare_machine(settings: TrainSettings) -> tuple[Hardware, int]:
    """Set seeds, threads and deterministic kernels: (what to train on, micro-batches to compute at once). Raises
    UserError if the settings ask for what this machine or bitsandbytes cannot do."""
    gc.collect()  # reference cycles of an earlier training in this process
    check_spreading(settings)
    take_own_gpu()
    hardware = detect_hardware(settings.precision, settings.threads)
    check_bitsandbytes(settings, hardware)
    quiet_transformers()
    micro_batches = count_micro_batches(settings, hardware)
    torch.set_num_threads(hardware.threads // micro_batches)
    if hardware.device != "cpu":
        torch.accelerator.empty_cache()
    if hardware.device == "cuda":
        # By default attention and matrix products on a GPU do not add in a fixed order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    set_seed(settings.seed)
    return hardware, micro_batches


def adapted_model(plain: PreTrainedModel, base_name: str, settings: TrainSettings, start_from: Path | None) -> Any:
    """The base with the adapter that is trained: a new one, or one to start from, as it is where no step is taken."""
    if start_from and settings.max_steps == 0:
        return attach_trained(plain, start_from)
    model = attach_adapter(plain, settings)
    if start_from:
        check_adapter(start_from, base_name, settings)
        load_adapter(model, start_from / "adapter_model.safetensors")
    return model


def note_references(trainer: LabelTrainer, base: Path, start_from: Path | None, folder: Path | None) -> None:
    """Give the trainer's preference items their log-likelihoods under the model before training.

    They are kept in `folder`, in a file of their model's, number format's and item's hashes, and computed once.
    """
    judged = (Pair, JudgedReply)
    batches = (*trainer.train_dataset, *trainer.eval_dataset)
    items = [item for batch in batches for item in batch if isinstance(item, judged)]
    if not items:
        return
    adapter = start_from and start_from / "adapter_model.safetensors"
    files = [path for path in (*sorted(base.glob("*.safetensors")), adapter) if path]
    named = [*map(sha256_file, files), str(trainer.args.bf16), str(trainer.args.fp16), versions(), code_sha256("train")]
    digest = hashlib.sha256(json.dumps(named).encode())
    for item in items:
        digest.update(json.dumps([item.id, *([row.input_ids, row.labels] for row in rows_of([item]))]).encode())
    kept = folder and folder / f"{digest.hexdigest()}.json"
    known = {name: tuple(values) for name, values in read_json(kept).items()} if kept and kept.is_file() else {}
    trainer.note_references(known)
    if kept and is_main_process():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, known)


def supervised_loss(measured: dict[str, float]) -> float:
    """Mean loss a trained token of the supervised rows, without them of all units."""
    return measured.get("eval_sft_loss", measured["eval_loss"])


def first_loss(trainer: LabelTrainer) -> float:
    """Validation loss before training; other kernels are allowed where a base has no deterministic ones."""
    try:
        return supervised_loss(trainer.validate())
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
    print(
        "train: this base has no deterministic kernels on a GPU: trained again, another run may give other bytes",
        flush=True,
    )
    torch.use_deterministic_algorithms(False)
    return supervised_loss(trainer.validate())


def run_steps(trainer: LabelTrainer, guard: RunGuard, checkpoints: Path) -> int:
    """Train to the end, from the newest checkpoint where there is one, and load the best weights where they are kept.

    Returns:
        Tokens that were trained on since this call, padding left out.
    """
    resume = newest_checkpoint(checkpoints)
    if is_main_process() and resume:
        print(f"train: resuming from {resume.name}", flush=True)
    elif is_main_process() and is_outdated(checkpoints):
        print("train: code or packages changed since this run was cut off: training starts anew", flush=True)
    state = TrainerState.load_from_json(str(resume / "trainer_state.json")) if resume else None
    if state is not None and is_over(guard.settings, state):
        # transformers would take one more step.
        load_adapter(trainer.model, resume / "adapter_model.safetensors")
        trainer.state = state
    else:
        with guard.stopping_on_interrupt():
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if best := guard.best_file(checkpoints, trainer.state):
        load_adapter(trainer.model, best)
    return trainer.state.num_input_tokens_seen - (state.num_input_tokens_seen if state else 0)


def save_adapter(model: Any, base_name: str, output: Path) -> None:
    """Write the adapter with peft; of several processes the main one does."""
    model.peft_config["default"].base_model_name_or_path = base_name
    if is_main_process():
        model.save_pretrained(unlinked(output), save_embedding_layers=False)
        sort_adapter_config(output)


def load_base(folder: Path, settings: TrainSettings, hardware: Hardware) -> PreTrainedModel:
    """Load the base in the number format that the hardware trains in, in four bits for QLoRA, or its share for fsdp.
    Raises UserError if it would not fit, or does not load."""
    check_memory(read_shape(folder), settings, hardware)
    if settings.method == "qlora":
        return load_quantised_base(folder, hardware, settings.gradient_checkpointing)
    width = torch.bfloat16 if hardware.precision == "bfloat16" else torch.float32
    return load_model(folder, width, **spreading(settings))


def attach_adapter(model: PreTrainedModel, settings: TrainSettings) -> Any:
    """Freeze the base and put LoRA layers on the modules that the settings name. Raises UserError if no module of the
    base has such a name."""
    lora = settings.lora
    layers = model.config.get_text_config().num_hidden_layers
    chosen = list(range(max(0, layers - lora.top_layers), layers)) if lora.top_layers else None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(model, lora.target_modules),
        layers_to_transform=chosen,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    model.config.use_cache = False
    adapted = get_peft_model(model, config)
    keep_adapter_whole(adapted)
    return adapted


def attach_trained(model: PreTrainedModel, adapter: Path) -> Any:
    """Put an adapter on the base as its own configuration says. Raises UserError if it does not fit."""
    model.config.use_cache = False
    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"the adapter of train.start_from does not fit the base ({reason}): adopt another") from None


def check_adapter(adapter: Path, base_name: str, settings: TrainSettings) -> None:
    """Refuse to continue an adapter on another base or with another scale than it was trained with. Raises UserError if
    its configuration names another base or scale, which its shapes do not show."""
    config, card = read_json(adapter / "adapter_config.json"), adapter / "base.json"
    named = read_json(card)["model"] if card.is_file() else config["base_model_name_or_path"]
    lora = settings.lora
    if named != base_name:
        raise UserError(f"train.start_from was trained on {named} and base.model is {base_name}: change one of them")
    for parameter, key in (("alpha", "lora_alpha"), ("rslora", "use_rslora")):
        had, wanted = config[key], getattr(lora, parameter)
        if had != wanted:
            raise UserError(
                f"the adapter of train.start_from was trained with train.lora.{parameter} = {had}, which is {wanted} "
                "now: set it back, or train a new adapter"
            )


def load_adapter(model: Any, file: Path) -> None:
    """Give a model's adapter the weights of another of the same shape. Raises UserError if the weights have other names
    or shapes."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}): restore it with `dvc checkout`") from None
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in own.items()}:
        raise UserError(f"the adapter {file.parent} does not fit: start from one of the same base.model and train.lora")
    set_peft_model_state_dict(model, weights)


def target_modules(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Names of the linear modules to adapt: `all-linear` (the head excepted), `attention`, or the names given."""
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    if wanted == "all-linear":
        return sorted(linear)
    chosen = sorted(linear & set(ATTENTION if wanted == "attention" else wanted))
    missing = set() if wanted == "attention" else set(wanted) - linear
    if not chosen or missing:
        raise UserError(
            f"train.lora.target_modules names {', '.join(sorted(missing)) or wanted}, which this base lacks: "
            f"it has {', '.join(sorted(linear))}"
        )
    return chosen


def training_arguments(settings: TrainSettings, hardware: Hardware, folder: Path, batches: int) -> TrainingArguments:
    """transformers' own arguments for these settings; `batches` micro-batches make one epoch."""
    steps_an_epoch = math.ceil(math.ceil(batches / process_count()) / settings.gradient_accumulation)
    total = settings.max_steps or math.ceil(steps_an_epoch * settings.epochs)
    validate_every = max(1, math.ceil(total / settings.validations))
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=settings.seed,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup_ratio * total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        neftune_noise_alpha=settings.neftune_alpha,
        use_cpu=hardware.device == "cpu",
        bf16=hardware.precision == "bfloat16",
        fp16=hardware.precision == "float16",
        # Packed rows come without the mask that tells padding from tokens, and without padding.
        include_num_input_tokens_seen="all" if settings.packing else "non_padding",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=validate_every,
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=hardware.device == "cuda",
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )
    # A process trains on one GPU: of all that it sees, transformers would make parts of one batch (DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def peak_memory_mb(hardware: Hardware) -> float:
    """Peak memory in MB: the GPU's allocation, or the process's resident set."""
    if hardware.device in ("cuda", "xpu"):
        return torch.accelerator.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
