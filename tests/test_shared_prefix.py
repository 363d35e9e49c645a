"""What all rows of a batch begin with is computed once, and nothing else changes: not a loss, not a gradient."""

import copy

import pytest
import torch

from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import PreparedRow, collate
from fine_tuning.training.acceleration.accelerate import AcceleratedTokenLosses
from fine_tuning.training.acceleration.patches import Patches
from fine_tuning.training.acceleration.shared_prefix import lay_out, share_prefixes
from fine_tuning.training.objectives.sft import SupervisedFineTuning
from fine_tuning.training.objectives.token_losses import TokenLosses
from tests.test_training import SETTINGS, make_rows, train

PROMPT = [3, 9, 27, 81]


def rows_after(prefix: list[int], *rests: list[int], untrained: int = 1) -> list[PreparedRow]:
    """Rows that begin alike; of each rest the first `untrained` tokens are prompt."""
    return [
        PreparedRow(str(i), prefix + rest, [NOT_TRAINED] * (len(prefix) + untrained) + rest[untrained:])
        for i, rest in enumerate(rests)
    ]


def test_the_common_beginning_stands_once_and_every_rest_goes_on_from_it():
    laid_out = lay_out(collate(rows_after(PROMPT, [5, 6, 7], [8, 9]), 0))
    assert laid_out["segments"] == [(4, 2, 3)]
    assert laid_out["input_ids"].tolist() == [[3, 9, 27, 81, 5, 6, 7, 8, 9, 0]]
    assert laid_out["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]]
    assert laid_out["labels"].tolist() == [[-100] * 5 + [6, 7] + [-100, 9, -100]]


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        (rows_after(PROMPT, [5, 6], [8, 9]), 4),
        (rows_after(PROMPT, [5, 6], [5, 9]), 4),  # the next token is predicted from the last of the prefix
        (rows_after(PROMPT, [5, 6, 7], [5, 6, 9], untrained=2), 5),
        (rows_after(PROMPT, [5, 6], [8, 9], untrained=0), 3),  # what is trained needs a predecessor of its own
        (rows_after(PROMPT, [5, 6]), 0),
        (rows_after([], [5, 6], [8, 9]), 0),
        ([*rows_after(PROMPT, [5, 6]), PreparedRow("short", [3, 9], [-100, 9])], 0),
    ],
)
def test_a_prefix_ends_before_anything_that_is_trained(rows, prefix):
    assert lay_out(collate(rows, 0))["segments"][0][0] == prefix


@pytest.mark.parametrize("prefix", [PROMPT, []])
def test_losses_and_gradients_are_those_of_the_padded_batch(tiny_base, prefix):
    from fine_tuning.runtime.base_model import load_model

    assert shares_with_the_same_gradients(load_model(tiny_base, torch.float32), prefix)


@pytest.mark.parametrize(
    ("family", "changes", "shares"),
    [
        ("Qwen2", {}, True),  # biases
        ("Qwen3", {}, True),  # norms of queries and keys
        ("Gemma3Text", {}, True),  # windows longer than the rows
        ("Mistral", {"sliding_window": 4}, False),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, False),  # attention to nothing
    ],
)
def test_bases_of_other_families_share_where_that_changes_nothing(family, changes, shares):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, **changes,
    )  # fmt: skip
    assert shares_with_the_same_gradients(transformers.AutoModelForCausalLM.from_config(config), PROMPT) is shares


@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),  # a cap
        ("Bloom", {"hidden_size": 64, "n_head": 4}),  # what stands in one row is one text
        ("FalconH1", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 64,
                      "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}),  # a state runs through the row
        ("Gemma3Text", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                        "use_bidirectional_attention": True}),
    ],
)  # fmt: skip
def test_bases_that_could_not_share_unnoticed_are_left_as_they_are(family, changes, width):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=512, num_hidden_layers=2, intermediate_size=96, attn_implementation="eager", **changes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(width)
    before = model.config._attn_implementation
    assert not share_prefixes(model, 64, Patches())
    assert model.config._attn_implementation == before


def test_a_model_with_shorter_chunks_of_attention_is_left_as_it_is(tiny_base):
    from fine_tuning.runtime.base_model import load_model

    model = load_model(tiny_base, torch.float32)
    model.config.attention_chunk_size = 16
    assert not share_prefixes(model, 17, Patches())
    assert share_prefixes(model, 16, Patches())


def shares_with_the_same_gradients(base, prefix: list[int]) -> bool:
    """Whether a base's rows share their prefix; the quick form has the loss and gradients of the plain one anyway."""
    from fine_tuning.training.acceleration.fused import fuse
    from fine_tuning.training.lora_trainer import attach_adapter

    plain = attach_adapter(base, SETTINGS)
    torch.manual_seed(1)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    quick, patches = copy.deepcopy(plain), Patches()
    fuse(quick, patches)
    shares = share_prefixes(quick, 64, patches)
    rows = rows_after(prefix, [5, 6, 7, 11, 12], [8, 9], [5, 6, 7], [5, 13, 4, 4])
    objective = SupervisedFineTuning(TokenLosses(0))
    inputs = objective.collate(rows)
    assert objective.count(inputs) == sum(len(row.input_ids) - len(prefix) - 1 for row in rows)
    found = []
    for model, its in (
        (plain, objective),
        (
            quick,
            SupervisedFineTuning(AcceleratedTokenLosses(quick, TokenLosses(0), 512, shares, set(), False, patches)),
        ),
    ):
        loss = its.loss(model.train(), inputs)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-4)
    return shares


def test_in_bfloat16_the_loss_is_as_near_to_the_exact_one_as_that_of_the_padded_batch(tiny_base):
    from fine_tuning.runtime.base_model import load_model

    rows = rows_after(PROMPT, [5, 6, 7, 11, 12], [8, 9], [5, 6, 7], [5, 13, 4, 4])
    exact = summed_loss(load_model(tiny_base, torch.float32), rows, shared=False)
    padded = summed_loss(load_model(tiny_base, torch.bfloat16), rows, shared=False)
    model = load_model(tiny_base, torch.bfloat16)
    assert share_prefixes(model, 64, Patches())
    assert abs(summed_loss(model, rows, shared=True) - exact) < max(2 * abs(padded - exact), 0.01 * exact)


def summed_loss(model, rows: list[PreparedRow], shared: bool) -> float:
    inputs = collate(rows, 0)
    inputs = lay_out(inputs) if shared else inputs
    labels, _ = inputs.pop("labels"), inputs.pop("row_of", None)
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    )


def test_a_model_with_shorter_windows_of_attention_is_left_as_it_is(tiny_base):
    from fine_tuning.runtime.base_model import load_model

    model = load_model(tiny_base, torch.float32)
    before = model.config._attn_implementation
    model.config.sliding_window = 16
    assert not share_prefixes(model, 17, Patches())
    assert model.config._attn_implementation == before
    assert share_prefixes(model, 16, Patches())


def test_a_model_that_the_shared_form_gives_other_logits_is_left_as_it_is(tiny_base):
    from fine_tuning.runtime.base_model import load_model

    model = load_model(tiny_base, torch.float32)
    before = model.config._attn_implementation
    # An attention of the model's own kind, which knows nothing of prefixes.
    for layer in model.model.layers:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, attend=attend, **named: attend(*args, **{**named, "segments": None})
    assert not share_prefixes(model, 64, Patches())
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("threads", [1, 2])
def test_training_with_a_system_prompt_gives_the_same_bytes_every_time(tiny_base, tmp_path, monkeypatch, threads):
    rows = [PreparedRow(row.id, PROMPT + row.input_ids, [NOT_TRAINED] * 4 + row.labels) for row in make_rows(60)]
    monkeypatch.setattr("tests.test_training.make_rows", lambda count, seed=0: rows[:count])
    for name in ("first", "again"):
        train(tiny_base, tmp_path / name, tmp_path / f"{name}-checkpoints", threads=threads)
    first, again = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "again"))
    assert first == again
