"""Training: batches within their budget, the loss of the trained tokens only, the same bytes every time."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file, versions
from fine_tuning.common.settings import read_params
from fine_tuning.schema.prepared import PreparedRow, batch_by_tokens
from fine_tuning.training.checkpoints import checkpoint_key, newest_checkpoint
from fine_tuning.training.memory import group_memory
from fine_tuning.training.model_card import model_card
from fine_tuning.training.row_checks import check_only_assistants_train, check_rows
from fine_tuning.training.settings import TrainSettings
from tests.test_pipeline import closure

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SETTINGS = read_params("train", TrainSettings, ROOT / "params.yaml").model_copy(update={"precision": "float32"})


def make_rows(count: int, seed: int = 0) -> list[PreparedRow]:
    chance = random.Random(seed)
    rows = []
    for i in range(count):
        ids = [chance.randint(3, 511) for _ in range(chance.randint(8, 60))]
        prompt = len(ids) // 2
        rows.append(PreparedRow(f"{seed}-{i}", ids, [-100] * prompt + ids[prompt:]))
    return rows


def train(base: Path, output: Path, checkpoints: Path, **changes):
    from fine_tuning.training.lora_trainer import train_adapter

    settings = SETTINGS.model_copy(update={"threads": 1} | changes)
    return train_adapter(base, "tiny", make_rows(60), make_rows(8, seed=1), settings, output, checkpoints)


def test_batches_hold_every_row_once_and_stay_within_the_budget():
    rows = make_rows(200)
    batches = batch_by_tokens(rows, budget=128)
    assert sorted(row.id for batch in batches for row in batch) == sorted(row.id for row in rows)
    assert all(len(batch) * max(len(row.input_ids) for row in batch) <= 128 for batch in batches)
    padding = 1 - sum(len(row.input_ids) for row in rows) / sum(
        len(batch) * max(len(row.input_ids) for row in batch) for batch in batches
    )
    assert padding < 0.03


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    long = PreparedRow("long", [5] * 100, [5] * 100)
    assert [long] in batch_by_tokens([*make_rows(5), long], budget=64)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "split is empty"),
        ([PreparedRow("a", [1, 2, 3], [-100, -100, -100])], "no assistant token"),
        ([PreparedRow("a", [1, 2, 3], [-100, -100])], "more ids than labels"),
        ([PreparedRow("a", [1, 2, 3], [-100, 7, 3])], "foreign label"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(rows, words):
    with pytest.raises(UserError, match=words):
        check_rows(rows, "train")


@pytest.mark.end_to_end
def test_loading_peft_does_not_warn_of_a_kernel_that_nothing_here_uses():
    program = """
import logging, fine_tuning, peft
for words in ("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "another warning: %s"):
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning(words, "no")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stderr
    assert "another warning: no" in done.stderr


def test_a_trained_user_token_is_refused(tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    reply = len(tokenizer.encode(text[: text.index("Hi")], add_special_tokens=False))
    good = PreparedRow("good", ids, [-100] * reply + ids[reply:])
    check_only_assistants_train([good], tokenizer)
    user = len(tokenizer.encode("<|im_start|>user\n", add_special_tokens=False))
    bad = PreparedRow("bad", ids, [-100] * user + ids[user : user + 2] + [-100] * (len(ids) - user - 2))
    with pytest.raises(UserError, match="bad"):
        check_only_assistants_train([bad], tokenizer)


def test_the_loss_is_that_of_the_full_model_at_trained_positions(tiny_base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    # In several batches: a mean over batches would be another number.
    result = train(tiny_base, tmp_path / "adapter", tmp_path / "checkpoints", max_steps=1, batch_tokens=60)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    total, count = 0.0, 0
    for row in make_rows(8, seed=1):
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([row.input_ids])).logits[0, :-1].float(), -1)
        for position, label in enumerate(row.labels[1:]):
            if label != -100:
                total, count = total - scores[position, label].item(), count + 1
    assert result.validation_loss_before == pytest.approx(total / count, abs=1e-4)


def test_batches_for_two_micro_batches_have_even_numbers_of_rows():
    rows = [*make_rows(31), PreparedRow("long", [5] * 100, [5] * 100)]
    batches = batch_by_tokens(rows, 64, 2)
    assert sorted(row.id for batch in batches for row in batch) == sorted(row.id for row in rows)
    assert all(len(batch) % 2 == 0 for batch in batches)
    assert all(len(batch) == 2 or len(batch) * len(batch[-1].input_ids) <= 64 for batch in batches)


def test_two_micro_batches_give_the_gradient_of_the_whole_and_the_same_bytes_every_time(tiny_base, tmp_path):
    # An epoch of one batch: after one step the adapters are equal but for rounding.
    changes = {"batch_tokens": 8192, "max_steps": 1, "schedule": "constant", "optimizer": "sgd", "learning_rate": 1.0}
    results = {
        name: train(tiny_base, tmp_path / name, tmp_path / f"{name}-checkpoints", threads=threads, **changes)
        for name, threads in (("one", 1), ("two", 2), ("again", 2))
    }
    assert results["two"].history[0]["grad_norm"] == pytest.approx(results["one"].history[0]["grad_norm"], rel=1e-5)
    assert results["two"].validation_loss == pytest.approx(results["one"].validation_loss, abs=1e-6)
    assert abs(results["two"].validation_loss - results["two"].validation_loss_before) > 1e-5
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("two", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_lowers_the_loss_it_is_measured_by(tiny_base, tmp_path, method):
    rows = make_rows(30)
    from fine_tuning.training.lora_trainer import train_adapter

    settings = SETTINGS.model_copy(update={"method": method, "epochs": 20.0, "learning_rate": 1e-2, "threads": 1})
    result = train_adapter(tiny_base, "tiny", rows, rows, settings, tmp_path / "adapter", tmp_path / "checkpoints")
    assert result.validation_loss < result.validation_loss_before - 0.3
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == result.steps and min(losses) < result.train_loss < max(losses)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_half_a_checkpoint_is_never_loaded(tmp_path):
    for step, complete in ((5, True), (10, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"")
        if complete:
            (folder / "COMPLETE").touch()
    assert newest_checkpoint(tmp_path).name == "checkpoint-5"
    assert not (tmp_path / "checkpoint-10").exists()


def test_other_data_parameters_or_machines_do_not_share_checkpoints(monkeypatch):
    rows = make_rows(5)
    key = checkpoint_key(SETTINGS, rows, "base")
    assert key == checkpoint_key(SETTINGS, rows, "base")
    assert key != checkpoint_key(SETTINGS, rows[:4], "base")
    assert key != checkpoint_key(SETTINGS.model_copy(update={"seed": 7}), rows, "base")
    assert key != checkpoint_key(SETTINGS, rows, "other")
    split = [checkpoint_key(SETTINGS, rows[:count], "base", rows[count:]) for count in (3, 4, 5)]
    assert len({key, *split}) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert key != checkpoint_key(SETTINGS, rows, "base")


def test_other_code_or_packages_do_not_share_checkpoints(library, tmp_path, monkeypatch):
    keys = {checkpoint_key(SETTINGS, [], "base")}
    trainer = ROOT / "fine_tuning/training/lora_trainer.py"
    for number, module in enumerate([str(trainer.relative_to(ROOT)), *sorted(closure(trainer))], 2):
        with (library.parent / module).open("a") as file:
            file.write("# another version\n")
        keys.add(checkpoint_key(SETTINGS, [], "base"))
        assert len(keys) == number, module
    (tmp_path / "peft-99.dist-info").mkdir()
    (tmp_path / "peft-99.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert checkpoint_key(SETTINGS, [], "base") not in keys


def test_a_run_that_was_cut_off_starts_anew_and_says_so_when_the_loss_was_changed(tiny_base, library, tmp_path, capsys):
    from fine_tuning.training.lora_trainer import train_adapter

    settings = SETTINGS.model_copy(update={"threads": 1, "checkpoint_steps": 1, "max_steps": 5})
    rows, validation = make_rows(60), make_rows(8, seed=1)

    def train_until(step: int | None) -> str:
        def stop(values: dict[str, float]) -> None:
            if values["step"] == step:
                raise KeyboardInterrupt

        folder = tmp_path / "checkpoints" / checkpoint_key(settings, rows, "base")
        train_adapter(tiny_base, "tiny", rows, validation, settings, tmp_path / "adapter", folder, stop)
        return capsys.readouterr().out

    with pytest.raises(KeyboardInterrupt):
        train_until(3)
    with (library / "training/label_trainer.py").open("a") as file:
        file.write("# another loss\n")
    with pytest.raises(KeyboardInterrupt):
        train_until(4)
    said = capsys.readouterr().out
    assert "code or packages changed since this run was cut off: training starts anew" in said
    assert "resuming" not in said
    said = train_until(None)
    assert "resuming from checkpoint-3" in said and "anew" not in said


KILLED_RUN = """
import json, os, signal, sys
from pathlib import Path
from tests.test_training import train
from fine_tuning.training import lora_trainer
original = lora_trainer.RunGuard.on_step_end
def killing(self, args, state, control, **rest):
    if state.global_step == int(sys.argv[4]) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, args, state, control, **rest)
lora_trainer.RunGuard.on_step_end = killing
train(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), **json.loads(sys.argv[5]))
"""


def killed_run(base: Path, folder: Path, name: str, kill_at: int, changes: dict) -> int:
    """The exit status of a training in a child that kills itself when a step has ended; -1: never."""
    script = folder / "killed_run.py"
    script.write_text(KILLED_RUN)
    command = [str(script), str(base), str(folder / name), str(folder / f"ck-{name}"), str(kill_at)]
    program = launcher(changes["launch"]) if "launch" in changes else [sys.executable]
    # Another order of sets in every folder: no byte may depend on it.
    environment = ENVIRONMENT | {"PYTHONHASHSEED": str(len(name))}
    return subprocess.run([*program, *command, json.dumps(changes)], env=environment, capture_output=True).returncode


def launcher(name: str) -> list[str]:
    """`accelerate launch` with one of the project's own configurations, on the CPU of any machine."""
    program = str(Path(sys.executable).parent / "accelerate")
    configuration = str(ROOT / f"configs/accelerate/{name}.yaml")
    return ["env", "CUDA_VISIBLE_DEVICES=", program, "launch", "--config_file", configuration]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_steps": 3, "epochs": 2.0},
        # In the middle of a sum of batches and of the best measurement's grace; random numbers everywhere.
        {
            "checkpoint_steps": 2, "epochs": 4.0, "gradient_accumulation": 3, "early_stopping_patience": 2,
            "validations": 8, "learning_rate": 3e-2, "neftune_alpha": 5.0, "optimizer": "adamw_8bit",
        },
        {"checkpoint_steps": 3, "epochs": 2.0, "launch": "fsdp"},
    ],
    ids=["plain", "combined", "fsdp"],
)  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bytes(tiny_base, tmp_path, changes):
    assert killed_run(tiny_base, tmp_path, "whole", -1, changes) == 0
    assert killed_run(tiny_base, tmp_path, "cut", changes["checkpoint_steps"] + 1, changes) == (
        1 if "launch" in changes else -9
    )
    assert newest_checkpoint(tmp_path / "ck-cut") is not None
    assert not (tmp_path / "cut").exists()
    assert killed_run(tiny_base, tmp_path, "cut", -1, changes) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256_file(tmp_path / "whole" / name) == sha256_file(tmp_path / "cut" / name)


def test_a_run_that_is_killed_after_it_stopped_early_does_not_go_on(tiny_base, tmp_path):
    changes = {
        "early_stopping_patience": 1, "validations": 10, "epochs": 6.0, "learning_rate": 3e-2, "checkpoint_steps": 1,
    }  # fmt: skip
    first = train(tiny_base, tmp_path / "first", tmp_path / "ck", **changes)
    assert first.steps < 20
    # What a kill right before the end leaves: all but the adapter.
    again = train(tiny_base, tmp_path / "again", tmp_path / "ck", **changes)
    assert (again.steps, again.validation_loss) == (first.steps, first.validation_loss)
    weights = "adapter_model.safetensors"
    assert sha256_file(tmp_path / "first" / weights) == sha256_file(tmp_path / "again" / weights)


def test_of_the_best_adapters_only_those_are_kept_that_a_resumed_run_may_want(tiny_base, tmp_path):
    result = train(
        tiny_base, tmp_path / "a", tmp_path / "ck", early_stopping_patience=9, validations=99, epochs=2.0,
        checkpoint_steps=1, schedule="constant", optimizer="sgd", learning_rate=10.0,
    )  # fmt: skip
    steps = sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "ck").glob("best-*.safetensors"))
    losses = [(entry["step"], entry["eval_loss"]) for entry in result.history if "eval_loss" in entry]
    oldest = min(int(path.name.split("-")[1]) for path in (tmp_path / "ck").glob("checkpoint-*"))
    records = [step for step, loss in losses if all(loss < other for earlier, other in losses if earlier < step)]
    needed = max(step for step in records if step <= oldest)  # where a run from the oldest checkpoint stands
    assert steps == [step for step in records if step >= needed] and len(steps) < len(records)


def test_an_unknown_module_is_named(tiny_base, tmp_path):
    lora = SETTINGS.lora.model_copy(update={"target_modules": ["q_proj", "w_pack"]})
    with pytest.raises(UserError, match="w_pack"):
        train(tiny_base, tmp_path / "adapter", tmp_path / "checkpoints", lora=lora)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoints(tiny_base, tmp_path):
    with pytest.raises(UserError, match="became nan"):
        train(
            tiny_base, tmp_path / "adapter", tmp_path / "ck", learning_rate=1e30, checkpoint_steps=1, max_grad_norm=1e30
        )
    assert newest_checkpoint(tmp_path / "ck") is not None
    assert not (tmp_path / "adapter").exists()


def test_weights_that_are_no_numbers_are_not_kept(tiny_base, tmp_path):
    # The last step's loss is measured before it is taken: only what comes after it tells.
    changes = {"learning_rate": 1e30, "max_grad_norm": 1e30, "schedule": "constant", "checkpoint_steps": 1}
    with pytest.raises(UserError, match="became nan at step 1"):
        train(tiny_base, tmp_path / "adapter", tmp_path / "ck", max_steps=1, **changes)
    assert newest_checkpoint(tmp_path / "ck") is None
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_whose_weights_are_no_numbers_is_not_marked_as_whole(tmp_path):
    import torch

    from fine_tuning.training.run_guard import RunGuard

    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = float("inf")
    (tmp_path / "checkpoint-3").mkdir()
    now = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3), None
    with pytest.raises(UserError, match="became nan at step 3"):
        RunGuard(SETTINGS, None).on_save(*now, model=model)
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_knows_the_optimizer_is_bounded_in_number(tiny_base, tmp_path):
    train(tiny_base, tmp_path / "adapter", tmp_path / "ck", checkpoint_steps=1)
    assert len(list((tmp_path / "ck").glob("checkpoint-*"))) == 2


def test_packed_rows_do_not_see_their_neighbours(tiny_base, tmp_path):
    plain = train(tiny_base, tmp_path / "plain", tmp_path / "ck1", max_steps=1)
    packed = train(tiny_base, tmp_path / "packed", tmp_path / "ck2", max_steps=1, packing=True)
    assert packed.validation_loss_before == pytest.approx(plain.validation_loss_before, abs=1e-5)


def test_early_stopping_keeps_the_best_adapter(tiny_base, tmp_path):
    # At such a learning rate the loss on foreign rows falls first and rises soon.
    result = train(
        tiny_base, tmp_path / "a", tmp_path / "ck", early_stopping_patience=2, validations=40, epochs=30.0,
        learning_rate=3e-2,
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 3
    assert result.validation_loss == pytest.approx(min(losses), abs=1e-6)


def test_an_adapter_can_be_gone_on_from(tiny_base, tmp_path):
    from fine_tuning.training.lora_trainer import train_adapter

    first = train(tiny_base, tmp_path / "first", tmp_path / "ck1", learning_rate=1e-2)
    settings = SETTINGS.model_copy(update={"threads": 1, "max_steps": 1})
    second = train_adapter(
        tiny_base, "tiny", make_rows(60), make_rows(8, seed=1), settings, tmp_path / "second", tmp_path / "ck2",
        start_from=tmp_path / "first",
    )  # fmt: skip
    assert second.validation_loss_before == pytest.approx(first.validation_loss, abs=1e-5)
    with pytest.raises(UserError, match="was trained on tiny and"):
        train_adapter(
            tiny_base, "another", make_rows(60), make_rows(8, seed=1), settings, tmp_path / "x", tmp_path / "ck4",
            start_from=tmp_path / "first",
        )  # fmt: skip
    refusals = {
        "does not fit": {"rank": 4},
        "with train.lora.alpha = 16.0, which is 32.0": {"alpha": 32.0},
        "with train.lora.rslora = False": {"rslora": True},
    }
    for words, changes in refusals.items():
        other = settings.model_copy(update={"lora": settings.lora.model_copy(update=changes)})
        with pytest.raises(UserError, match=words):
            train_adapter(
                tiny_base, "tiny", make_rows(60), make_rows(8, seed=1), other, tmp_path / "third", tmp_path / "ck3",
                start_from=tmp_path / "first",
            )  # fmt: skip


INTERRUPTED_RUN = """
import json, os, signal, sys
from pathlib import Path
from tests.test_training import train
from fine_tuning.training import lora_trainer
original = lora_trainer.RunGuard.on_log
def interrupting(self, args, state, control, **rest):
    if state.global_step == 4 and not (Path(sys.argv[3]) / "interrupted").exists():
        (Path(sys.argv[3]) / "interrupted").touch()
        os.kill(os.getppid() if "RANK" in os.environ else os.getpid(), signal.SIGINT)
    return original(self, args, state, control, **rest)
lora_trainer.RunGuard.on_log = interrupting
train(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), epochs=4.0, **json.loads(sys.argv[4]))
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize("launch", ["single", "ddp"])
def test_ctrl_c_saves_a_checkpoint_from_which_the_next_run_goes_on(tiny_base, tmp_path, launch):
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED_RUN)
    program = [sys.executable] if launch == "single" else launcher(launch)
    changes = json.dumps({"launch": launch})

    def run(name: str) -> subprocess.CompletedProcess:
        words = [str(tiny_base), str(tmp_path / name), str(tmp_path / f"ck-{name}"), changes]
        return subprocess.run([*program, str(script), *words], env=ENVIRONMENT, capture_output=True, text=True)

    (tmp_path / "ck-cut").mkdir()
    done = run("cut")
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    assert newest_checkpoint(tmp_path / "ck-cut").name in ("checkpoint-4", "checkpoint-5")
    assert not (tmp_path / "cut").exists()
    assert "resuming from checkpoint" in run("cut").stdout
    weights = "adapter_model.safetensors"
    if launch == "single":
        train(tiny_base, tmp_path / "whole", tmp_path / "ck-whole", epochs=4.0)
        assert sha256_file(tmp_path / "whole" / weights) == sha256_file(tmp_path / "cut" / weights)
    assert (tmp_path / "cut" / weights).is_file()


PARALLEL_RUN = """
import json, sys
from pathlib import Path
from tests.test_training import train
from fine_tuning.runtime.hardware import is_main_process
base, output, checkpoints, answer = map(Path, sys.argv[1:5])
result = train(base, output, checkpoints, learning_rate=3e-3, epochs=8.0, batch_tokens=300, launch=sys.argv[5])
if is_main_process():
    losses = [result.train_loss, result.validation_loss]
    norms = [entry["grad_norm"] for entry in result.history if "grad_norm" in entry]
    answer.write_text(json.dumps([result.steps, *losses, result.base_weights.held_mb, norms]))
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize(("launch", "share"), [("ddp", 1.0), ("fsdp", 0.5)])
def test_two_processes_train_what_one_trains(tiny_base, tmp_path, launch, share):
    script = tmp_path / "run.py"
    script.write_text(PARALLEL_RUN)
    words = [str(tiny_base), str(tmp_path / "two"), str(tmp_path / "ck2"), str(tmp_path / "result.json"), launch]
    done = subprocess.run(
        [*launcher(launch), str(script), *words], env=ENVIRONMENT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps, train_loss, validation_loss, held, norms = json.loads((tmp_path / "result.json").read_text())
    # Two processes take two batches a step, as one does that accumulates over two; eight batches come out even.
    one = train(
        tiny_base, tmp_path / "one", tmp_path / "ck1", learning_rate=3e-3, epochs=8.0, batch_tokens=300,
        gradient_accumulation=2,
    )  # fmt: skip
    assert steps == one.steps
    assert train_loss == pytest.approx(one.train_loss, abs=3e-3)
    assert validation_loss == pytest.approx(one.validation_loss, abs=3e-3)
    # AdamW steps alike whatever the scale of the gradients: their lengths have to be the same too.
    ours = [entry["grad_norm"] for entry in one.history if "grad_norm" in entry]
    assert norms[0] == pytest.approx(ours[0], rel=1e-4)
    assert norms == pytest.approx(ours, rel=0.05)
    assert held == pytest.approx(share * one.base_weights.held_mb, rel=0.01)
    losses = [entry["loss"] for entry in one.history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.08
    # The adapter is whole: one process can go on from it.
    import torch
    from safetensors.torch import load_file

    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert {name: value.shape for name, value in weights[0].items()} == {
        name: value.shape for name, value in weights[1].items()
    }
    assert all(torch.isfinite(value).all() for value in weights[1].values())


@pytest.mark.parametrize("changes", [{"method": "qlora"}, {"lora": SETTINGS.lora.model_copy(update={"dora": True})}])
def test_what_cannot_be_spread_is_refused_before_anything_is_loaded(tmp_path, changes):
    with pytest.raises(UserError, match=r"set train\.launch to ddp or single"):
        train(tmp_path / "no base", tmp_path / "adapter", tmp_path / "ck", launch="fsdp", **changes)


# --- bitsandbytes and memory, before anything is loaded --------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "instead"),
    [({"method": "qlora"}, "train.method to lora"), ({"optimizer": "lion_8bit"}, "train.optimizer to adamw")],
)
def test_bitsandbytes_that_is_missing_is_one_line(tmp_path, monkeypatch, changes, instead):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"does not load here .*{instead}"):
        train(tmp_path / "no base", tmp_path / "adapter", tmp_path / "ck", **changes)


@pytest.mark.parametrize(
    ("changes", "module", "name"),
    [({"method": "qlora"}, "functional", "quantize_4bit"), ({"optimizer": "adamw_8bit"}, "optim", "AdamW8bit")],
)
def test_hardware_that_bitsandbytes_refuses_is_one_line(tmp_path, monkeypatch, changes, module, name):
    import bitsandbytes

    def refuse(*_, **__):
        raise NotImplementedError("no kernel for this device\nand more")

    monkeypatch.setattr(getattr(bitsandbytes, module), name, refuse)
    with pytest.raises(UserError, match=r"bitsandbytes refuses .*\(no kernel for this device\): set train"):
        train(tmp_path / "no base", tmp_path / "adapter", tmp_path / "ck", **changes)


@pytest.mark.parametrize(("method", "way"), [("lora", "set train.method to qlora"), ("qlora", "train.batch_tokens")])
def test_too_little_memory_is_told_before_the_base_is_loaded(tiny_base, tmp_path, monkeypatch, method, way):
    from fine_tuning.training import lora_trainer, memory, qlora_trainer

    def load(*_, **__):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(lora_trainer, "load_model", load)
    monkeypatch.setattr(qlora_trainer, "load_model", load)
    monkeypatch.setattr(memory, "free_memory", lambda device: 400_000_000)
    with pytest.raises(UserError, match=f"needs about 0.5 GB and 0.4 GB are free: .*{way}"):
        train(tiny_base, tmp_path / "adapter", tmp_path / "ck", method=method)


def test_the_limit_of_a_container_or_job_counts_as_memory(tmp_path):
    job = tmp_path / "job/step"
    job.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    for folder, limit, used in ((job, "max", 10), (job.parent, "1000", 600)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 50\n")
    assert group_memory(tmp_path, own) == 1000 - 600 + 50
    (job.parent / "memory.max").write_text("max\n")
    assert group_memory(tmp_path, own) is None
    assert group_memory(tmp_path, tmp_path / "none") is None


def test_qlora_reports_what_it_saves(tiny_base, tmp_path):
    plain = train(tiny_base, tmp_path / "a", tmp_path / "ck1", max_steps=1).base_weights
    packed = train(tiny_base, tmp_path / "b", tmp_path / "ck2", max_steps=1, method="qlora").base_weights
    assert plain.held_mb == plain.lora_mb == pytest.approx(packed.lora_mb, rel=0.01)
    assert packed.held_mb < 0.5 * packed.lora_mb


# --- what goes with an adapter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_model_card_says_where_the_adapter_comes_from(method):
    from huggingface_hub import ModelCard

    base = {"model": "/models/my base: large", "license": "Licence: MIT", "revision": "abc", "sha256": "0f"}
    metrics = {"validation_loss": 1.25, "validation_perplexity": 3.5}
    card = ModelCard(model_card(base, {"method": method, "lora.rank": 8}, metrics, {"train": "d1", "test": "d2"}))
    described, text = card.data, card.text
    assert described.base_model == base["model"] and described.datasets == ["data/prepared"]
    assert (described.license, described.license_name) == ("other", "licence-mit")
    (measured,) = described.eval_results
    assert (measured.dataset_split, measured.metric_type, measured.metric_value) == ("validation", "perplexity", 3.5)
    assert method in described.tags
    for fact in ("| lora.rank | 8 |", "| validation_loss | 1.2500 |", "| train | `d1` |", "| test | `d2` |", "`0f`"):
        assert fact in text
    assert ("in four bits" in text) == (method == "qlora")


def test_a_library_that_is_not_installed_is_recorded_as_such(monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert versions()["bitsandbytes"] == "none"
    assert versions()["torch"] == real("torch")


def test_two_trainings_with_the_same_checkpoints_do_not_run_at_once(tmp_path, capsys):
    from threading import Event, Thread

    from fine_tuning.training.checkpoints import alone_with

    inside, finish, order = Event(), Event(), []

    def first() -> None:
        with alone_with(tmp_path / "checkpoints" / "key"):
            inside.set()
            finish.wait(30)
            order.append("first")

    thread = Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with alone_with(tmp_path / "checkpoints" / "other"):  # another training does not wait
        order.append("other")
    assert "under way" not in capsys.readouterr().out
    Thread(target=lambda: (finish.wait(0.5), finish.set())).start()
    with alone_with(tmp_path / "checkpoints" / "key"):
        order.append("second")
    thread.join()
    assert order == ["other", "first", "second"]
    assert "the same training is under way in another process" in capsys.readouterr().out


def test_a_wrong_parameter_that_may_have_several_forms_names_them_all():
    from fine_tuning.common.settings import parse_settings

    values = SETTINGS.model_dump()
    values["lora"]["target_modules"] = "attention2"
    with pytest.raises(UserError) as caught:
        parse_settings("train", values, TrainSettings, "params.yaml")
    assert str(caught.value) == (
        "params.yaml: parameter train.lora.target_modules = 'attention2' should be 'all-linear' or 'attention', "
        "or a valid list"
    )


def test_a_run_that_made_things_worse_says_so(tiny_base, tmp_path):
    from fine_tuning.training.run_report import summary

    result = train(tiny_base, tmp_path / "a", tmp_path / "ca", max_steps=1)
    better, worse = (dataclasses.replace(result, validation_loss=loss) for loss in (0.5, 10.8))
    assert "the validation loss rose: lower train.learning_rate" in summary(SETTINGS, worse)
    assert "rose" not in summary(SETTINGS, better) and "in this process" not in summary(SETTINGS, better)
    assert "in this process, of several" in summary(SETTINGS.model_copy(update={"launch": "ddp"}), better)


# --- against torch alone, and every parameter ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threads": 2},
        {"gradient_accumulation": 9, "batch_tokens": 100},
        {"gradient_accumulation": 9, "batch_tokens": 100, "threads": 2},
        {"packing": True},
        {"max_grad_norm": 1e-3},
    ],
    ids=str,
)
def test_one_step_goes_against_the_gradient_of_the_mean_over_all_trained_tokens(tiny_base, tmp_path, changes):
    """SGD from a fresh adapter, whose B is zero: afterwards B is the learning rate times the negative gradient."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from fine_tuning.training.lora_trainer import train_adapter

    rows = make_rows(9, seed=3)
    rows[0] = PreparedRow(
        "long", rows[0].input_ids * 3, rows[0].labels * 3
    )  # batches of unlike numbers of trained tokens
    step = {
        "threads": 1, "batch_tokens": 8192, "max_steps": 1, "schedule": "constant", "warmup_ratio": 0.0,
        "optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9,
    }  # fmt: skip
    settings = SETTINGS.model_copy(update=step | changes)
    result = train_adapter(tiny_base, str(tiny_base), rows, rows[:2], settings, tmp_path / "adapter", tmp_path / "ck")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    ups = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    for weight in ups.values():
        weight.data.zero_()
    total, count = 0.0, 0
    for row in rows:
        scores = torch.log_softmax(model(torch.tensor([row.input_ids])).logits[0, :-1].double(), -1)
        for position, label in enumerate(row.labels[1:]):
            if label != -100:
                total, count = total - scores[position, label], count + 1
    (total / count).backward()
    assert (result.steps, result.trained_tokens, result.tokens) == (1, count, sum(len(row.input_ids) for row in rows))
    assert result.train_loss == pytest.approx(float(total / count), abs=1e-4)
    norm = float(torch.sqrt(sum((weight.grad**2).sum() for weight in ups.values())))
    shrunk = min(1.0, settings.max_grad_norm / norm)
    assert len(ups) == 14  # seven modules of each layer
    for name, weight in ups.items():
        found = saved[name.replace(".default", "")]
        torch.testing.assert_close(found, -0.5 * shrunk * weight.grad, rtol=2e-3, atol=1e-6 * shrunk)


def test_the_first_token_of_a_packed_row_is_predicted_by_nobody():
    from fine_tuning.training.objectives.token_losses import collate_packed

    packed = collate_packed([PreparedRow("a", [5, 6, 7], [-100, 6, 7]), PreparedRow("b", [8, 9], [8, 9])])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["labels"].tolist() == [[-100, 6, 7, -100, 9]]


@pytest.mark.parametrize(("processes", "steps", "warmup", "every"), [(1, 20, 4, 5), (2, 10, 2, 3)])
def test_warm_up_and_validations_are_shares_of_the_optimisers_steps(
    tmp_path, monkeypatch, processes, steps, warmup, every
):
    """40 batches in sums of 4, twice: 20 steps of one process, 10 of two. Every 5th or 3rd makes 4 measurements."""
    from fine_tuning.runtime.hardware import Hardware
    from fine_tuning.training.lora_trainer import training_arguments

    monkeypatch.setattr("fine_tuning.training.lora_trainer.process_count", lambda: processes)
    changes = {"gradient_accumulation": 4, "epochs": 2.0, "warmup_ratio": 0.2, "validations": 4}
    cpu = Hardware("cpu", "float32", 1, "a CPU")
    settings = SETTINGS.model_copy(update=changes)
    arguments = training_arguments(settings, cpu, tmp_path, batches=40)
    assert (arguments.warmup_steps, arguments.eval_steps) == (warmup, every) and -(-steps // every) == 4
    capped = training_arguments(settings.model_copy(update={"max_steps": 10}), cpu, tmp_path, batches=40)
    assert (capped.max_steps, capped.warmup_steps, capped.eval_steps) == (10, 2, 3)


CHANGES = [
    {"seed": 1}, {"epochs": 1.0}, {"learning_rate": 3e-3}, {"schedule": "constant"}, {"warmup_ratio": 0.5},
    {"weight_decay": 0.5}, {"max_grad_norm": 1e-4}, {"optimizer": "sgd"}, {"batch_tokens": 100}, {"packing": True},
    {"gradient_accumulation": 2}, {"neftune_alpha": 5.0}, {"method": "qlora"}, {"max_steps": 1},
    *({"lora": SETTINGS.lora.model_copy(update=change)} for change in (
        {"rank": 4}, {"alpha": 32.0}, {"dropout": 0.5}, {"target_modules": "attention"}, {"top_layers": 1},
        {"rslora": True}, {"dora": True},
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def short(tiny_base, tmp_path_factory):
    """Two epochs on eight rows with changed settings: the adapter's folder."""
    from fine_tuning.training.lora_trainer import train_adapter

    def run(changes: dict) -> Path:
        folder = tmp_path_factory.mktemp("short")
        settings = SETTINGS.model_copy(
            update={"threads": 1, "batch_tokens": 200, "epochs": 2.0, "validations": 1} | changes
        )
        rows = make_rows(8)
        train_adapter(tiny_base, "tiny", rows, rows[:2], settings, folder / "adapter", folder / "ck")
        return folder / "adapter"

    return run


@pytest.fixture(scope="module")
def unchanged(short):
    return sha256_file(short({}) / "adapter_model.safetensors")


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: str(next(iter(changes.items())))[:60])
def test_every_parameter_that_shapes_an_adapter_changes_it(short, unchanged, changes):
    from safetensors.torch import load_file

    adapter = short(changes)
    assert sha256_file(adapter / "adapter_model.safetensors") != unchanged
    lora = changes.get("lora", SETTINGS.lora)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (lora.rank, lora.alpha, lora.dropout)
    assert (config["use_rslora"], config["use_dora"]) == (lora.rslora, lora.dora)
    adapted = {
        name.split(".layers.")[1].split(".lora_")[0] for name in load_file(adapter / "adapter_model.safetensors")
    }
    assert {name.split(".")[0] for name in adapted} == ({"1"} if lora.top_layers else {"0", "1"})
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    wanted = attention if lora.target_modules == "attention" else attention | {"gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[2] for name in adapted} == wanted
