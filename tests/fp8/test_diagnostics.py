"""Laws of the diagnosis: its numbers are right, its warnings are due, and the model stays."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp8.convert import convert_to_float8_training, fuse_rms_norms
from fp8.diagnostics import Diagnosis, diagnose
from fp8.epoch import invalidate_weight_caches
from fp8.formats import E2M1
from fp8.linear import Float8Linear, float8_state
from fp8.measure import Row, Tally
from fp8.recipe import (
    NVFP4,
    RECIPES,
    TENSOR,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    QuantSpec,
    Recipe,
    RowwiseScaling,
)

ModelMaker = Callable[..., PreTrainedModel]
IDS = torch.arange(60).reshape(2, 30) % 256
TENSOR_WISE = QuantSpec(block=TENSOR, scale_format="fp32")
BLOCK_WISE = QuantSpec()


def _measured(x: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> Row:
    tally = Tally(spec)
    tally.add(x, amax)
    return tally.row("layer", "input")


def _gradient_like(seed: int = 0) -> Tensor:
    """Rows whose sizes spread over many decades, as gradients of tokens do."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(3 * torch.randn(512, 1, generator=generator))
    return size * 1e-5 * torch.randn(512, 512, generator=generator)


def _mlp(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def _square(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def test_tensor_wise_scales_lose_gradients_to_zero_that_block_wise_ones_keep() -> None:
    tensor, block = (_measured(_gradient_like(), spec) for spec in (TENSOR_WISE, BLOCK_WISE))
    assert tensor.underflow > 0.2
    assert block.underflow < 0.001
    assert tensor.nonfinite == block.nonfinite == 0


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_those_of_the_definition(name: str) -> None:
    from fp8.quantize import dequantize, quantize

    spec = RECIPES[name]().input
    x = _gradient_like()[:64, :200] * 1e3
    x[:, 7], x[3] = 0.0, 0.0
    back = dequantize(quantize(x, spec))
    row = _measured(x, spec)
    assert row.values == x.numel()
    assert row.amax == x.abs().max()
    lost = (x != 0) & (back == 0)
    assert row.underflow == pytest.approx(float(lost.sum() / (x != 0).sum()), rel=1e-6)
    noise = (x.double() - back.double()).square().sum()
    assert row.sqnr_db == pytest.approx(float(10 * torch.log10(x.double().square().sum() / noise)))
    wide = x.double()
    central = wide - wide.mean()
    wanted = central.pow(4).mean() / central.square().mean().square()
    assert row.kurtosis == pytest.approx(float(wanted), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(-100, 100), st.integers(0, 1000))
def test_a_power_of_two_moves_amax_and_scales_and_nothing_else(power: int, seed: int) -> None:
    x = torch.randn(33, 140, generator=torch.Generator().manual_seed(seed))
    a, b = _measured(x, BLOCK_WISE), _measured(x * 2.0**power, BLOCK_WISE)
    for number in ("amax", "scale_min", "scale_max"):
        assert getattr(b, number) == getattr(a, number) * 2.0**power
    for number in ("underflow", "saturation", "block_range"):
        assert getattr(b, number) == getattr(a, number)
    for number in ("sqnr_db", "kurtosis"):
        assert getattr(b, number) == pytest.approx(getattr(a, number), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "nvfp4"])
def test_scales_made_from_the_tensor_clip_nothing(name: str) -> None:
    recipe = RECIPES[name]()
    for spec in (recipe.input, recipe.weight, recipe.grad_output):
        assert _measured(_gradient_like(), spec).saturation == 0


def test_a_scale_from_the_past_clips_what_lies_beyond() -> None:
    x = torch.linspace(-1, 1, 1000).reshape(10, 100)
    row = _measured(x, TENSOR_WISE, torch.tensor(0.5))
    assert row.saturation == pytest.approx(0.5, abs=0.002)
    assert _measured(x, TENSOR_WISE, torch.tensor(1.0)).saturation == 0


def test_the_block_range_is_the_ratio_of_columns_and_not_of_values() -> None:
    x = torch.ones(256, 256)
    assert _measured(x, BLOCK_WISE).block_range == 1
    x[:, 5] = 2.0**-10
    x[0, 5] = 2.0**-8  # the column's largest counts
    assert _measured(x, BLOCK_WISE).block_range == 2**10
    x[:, 5] = 0.0  # columns of zeros lose nothing
    assert _measured(x, BLOCK_WISE).block_range == 1
    x[:, 128:] = 2.0**-20  # another block
    assert _measured(x, BLOCK_WISE).block_range == 1
    assert _measured(x, QuantSpec(block=(1, None))).block_range == 2**20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_counted_and_no_number_pretends(bad: float) -> None:
    x = torch.ones(4, 130)
    x[2, 129] = bad
    row = _measured(x, BLOCK_WISE)
    assert row.nonfinite == 1
    assert row.amax == 1.0
    assert all(math.isnan(getattr(row, n)) for n in ("sqnr_db", "underflow", "scale_min"))


@pytest.mark.parametrize("shape", [(0, 128), (3, 128)])
def test_nothing_and_zeros_are_lost_by_nobody(shape: tuple[int, int]) -> None:
    row = _measured(torch.zeros(shape), BLOCK_WISE)
    assert row.nonfinite == 0
    assert row.amax == 0
    assert row.values == shape[0] * shape[1]
    if row.values:
        assert (row.underflow, row.saturation, row.sqnr_db) == (0, 0, math.inf)


def test_two_calls_count_as_one_longer_one() -> None:
    x = _gradient_like()
    tally = Tally(BLOCK_WISE)
    for part in x.split(128):
        tally.add(part)
    halves, whole = tally.row("layer", "input"), _measured(x, BLOCK_WISE)
    for field in dataclasses.fields(Row):
        wanted = getattr(whole, field.name)
        found = getattr(halves, field.name)
        assert found == (pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gpt_neox"])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_each_layer_has_a_row_for_each_role(
    tiny_model: ModelMaker, architecture: str, converted: bool
) -> None:
    model = tiny_model(architecture)
    names = convert_to_float8_training(tiny_model(architecture)).converted
    if converted:
        convert_to_float8_training(model)
    found = diagnose(model, IDS)
    roles = ("input", "weight", "grad_output")
    assert [(r.layer, r.role) for r in found.rows] == [(n, r) for n in names for r in roles]
    assert found.tokens == IDS.numel()
    assert found.remarks == ()
    assert all(20 < row.sqnr_db < 50 for row in found.rows)
    assert found.warnings() == []
    for row in found.rows:
        layer = model.get_submodule(row.layer)
        assert row.role != "weight" or row.amax == layer.weight.abs().max()


def test_inputs_and_gradients_are_those_of_the_layers() -> None:
    model, batch = _mlp(), torch.randn(64, 128)
    hidden = model[1](model[0](batch))
    output = model[2](hidden).detach()
    rows = {(r.layer, r.role): r for r in diagnose(model, batch, _square).rows}
    assert rows["0", "input"].amax == batch.abs().max()
    assert rows["2", "input"].amax == hidden.abs().max()
    wanted = 2 * output / output.numel()
    assert rows["2", "grad_output"].amax == pytest.approx(float(wanted.abs().max()))
    assert rows["2", "grad_output"].values == output.numel()


def test_without_a_batch_there_are_weights_alone_and_it_says_so() -> None:
    found = diagnose(_mlp())
    assert {row.role for row in found.rows} == {"weight"}
    assert found.tokens == 0
    assert "weights only" in found.remarks[0]


@pytest.mark.parametrize("swiglu", ["float8", "recompute"])
def test_a_fused_block_is_measured_as_the_plain_one(tiny_model: ModelMaker, swiglu: Any) -> None:
    plain, fused = tiny_model(), tiny_model()
    convert_to_float8_training(plain)
    convert_to_float8_training(fused, swiglu=swiglu)
    assert fuse_rms_norms(fused)
    a, b = diagnose(plain, IDS), diagnose(fused, IDS)
    assert [(r.layer, r.role) for r in a.rows] == [(r.layer, r.role) for r in b.rows]
    for one, other in zip(a.rows, b.rows, strict=True):
        assert other.sqnr_db == pytest.approx(one.sqnr_db, abs=0.3)
        assert other.amax == pytest.approx(one.amax, rel=0.05)
    assert not any("forward" in vars(m) for m in fused.modules())


def _everything(model: nn.Module) -> dict[str, Any]:
    return {
        **{f"value {n}": t.clone() for n, t in model.state_dict().items()},
        **{f"buffer {n}": t.clone() for n, t in model.named_buffers()},
        **{
            f"grad {n}": None if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
        },
        **{f"flag {n}": p.requires_grad for n, p in model.named_parameters()},
        **{f"mode {n}": m.training for n, m in model.named_modules()},
        **{f"hooks {n}": len(m._forward_hooks) for n, m in model.named_modules()},
        **{f"keys {n}": sorted(vars(m)) for n, m in model.named_modules()},
        **{f"delayed {n}": t.clone() for n, t in float8_state(model).items()},
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recipe", [BlockScaling(), DelayedScaling(history=4), NVFP4()])
def test_a_diagnosis_changes_nothing(
    tiny_model: ModelMaker, recipe: Recipe, training: bool
) -> None:
    model = tiny_model().train(training)
    model.config.attention_dropout = 0.1
    convert_to_float8_training(model, recipe, swiglu="float8" if not recipe.history else "plain")
    model(IDS, labels=IDS).loss.backward()
    invalidate_weight_caches()  # a step is due, and with it the history's next page
    next(model.parameters()).requires_grad_(False)
    before = _everything(model)
    with torch.no_grad():
        found = diagnose(model, IDS)
    assert {row.role for row in found.rows} == {"input", "weight", "grad_output"}
    after = _everything(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


def test_a_diagnosis_that_fails_changes_nothing_either() -> None:
    model, batch = _mlp(), torch.randn(4, 128)
    convert_to_float8_training(model)
    before = _everything(model)

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        diagnose(model, batch, failing)
    after = _everything(model)
    assert all(
        torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k]
        for k, v in before.items()
    )


def test_delayed_scaling_is_measured_with_its_history() -> None:
    model = _mlp()
    convert_to_float8_training(model, DelayedScaling(history=4))
    batch = torch.randn(64, 128)
    for _ in range(2):
        _square(model, batch).backward()
        invalidate_weight_caches()
    assert diagnose(model, batch, _square).warnings() == []
    found = diagnose(model, 4 * batch, _square)
    clipped = {r.role: r.saturation for r in found.rows if r.layer == "0"}
    assert clipped["input"] > 0.1
    assert clipped["weight"] == 0
    assert any("clipped" in text and "BlockScaling()" in text for text in found.warnings())
    assert any("is off by more than 10 %" in text for text in found.warnings())


def test_gradients_that_vanish_are_warned_of_with_the_remedy_and_blocks_are_not() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    weights = _gradient_like()[:64, :1] * 1e5

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        total: Tensor = (weights * model(batch)).sum()  # tokens of very different weight
        return total

    batch = torch.randn(64, 128)
    tensor_wise = dataclasses.replace(CurrentScaling(), grad_output=TENSOR_WISE)
    warned = diagnose(model, batch, loss, tensor_wise).warnings()
    assert any(
        text.startswith("grad_output of ") and "to zero" in text and "use BlockScaling()" in text
        for text in warned
    )
    assert diagnose(model, batch, loss, BlockScaling()).warnings() == []


def test_columns_too_different_to_requantise_are_warned_of() -> None:
    model, batch = _mlp(), torch.randn(256, 128)
    batch[:, 3] *= 2e5
    (warning,) = [w for w in diagnose(model, batch, _square).warnings() if "columns" in w]
    assert "input columns of 0 differ" in warning
    assert "scale_format='fp32'" in warning
    for recipe in (BlockScaling(scale_format="fp32"), RowwiseScaling()):
        found = diagnose(model, batch, _square, recipe).warnings()
        assert not any("columns" in text for text in found)
    batch[:, 3] /= 1e3
    assert not any("columns" in text for text in diagnose(model, batch, _square).warnings())


@pytest.mark.parametrize("role", ["weight", "input"])
def test_what_is_not_finite_is_named_and_comes_first(role: str) -> None:
    model, batch = _mlp(), torch.randn(64, 128)
    with torch.no_grad():
        (model[0].weight if role == "weight" else batch)[3, 3] = math.inf
    found = diagnose(model, batch, _square)
    assert found.worst_first()[0].nonfinite
    assert any(text.startswith(f"{role} of 0 ") for text in found.warnings())
    assert "not finite" in found.table()[0]["amax"]


def test_four_bits_are_not_blamed_for_being_four() -> None:
    found = diagnose(
        _mlp(), torch.randn(64, 128), _square, dataclasses.replace(NVFP4(), keep_last=0.0)
    )
    assert {row.format for row in found.rows} == {E2M1.name}
    assert not any("SQNR" in text for text in found.warnings())
    lost = [text for text in found.warnings() if "to zero" in text]
    assert lost
    assert all("4 bits" in text for text in lost)


def test_every_recipe_can_be_tried_on_a_plain_model(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    sqnr = {}
    for name, make in RECIPES.items():
        found = diagnose(model, IDS, recipe=make())
        sqnr[name] = min(row.sqnr_db for row in found.rows)
        assert not any(isinstance(m, Float8Linear) for m in model.modules())
    assert sqnr["nvfp4"] < sqnr["current"] < sqnr["block"]
    assert sqnr["mxfp8"] > 25


@pytest.mark.parametrize("converted", [False, True])
def test_a_layer_in_two_places_is_measured_once_over_both(converted: bool) -> None:
    shared = nn.Linear(128, 128)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    if converted:
        convert_to_float8_training(model)
    rows = {(row.layer, row.role): row for row in diagnose(model, torch.ones(5, 128), _square).rows}
    assert set(rows) == {("0", role) for role in ("input", "weight", "grad_output")}
    assert rows["0", "input"].values == 2 * 5 * 128
    assert rows["0", "weight"].values == 128 * 128


def test_what_the_batch_does_not_reach_is_said() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    found = diagnose(Branches(), torch.randn(8, 128), _square)
    assert found.remarks == (
        "input of idle not measured: the batch did not reach it",
        "grad_output of idle not measured: the batch did not reach it",
    )
    frozen = Branches().requires_grad_(False)
    found = diagnose(frozen, torch.randn(8, 128), _square)
    assert "grad_output of used and 1 more not measured" in found.remarks[1]


def test_activation_checkpointing_counts_the_same_values(tiny_model: ModelMaker) -> None:
    plain, recomputed = tiny_model().train(), tiny_model().train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, recomputed):
        convert_to_float8_training(model)
    for one, other in zip(diagnose(plain, IDS).rows, diagnose(recomputed, IDS).rows, strict=True):
        assert (one.underflow, one.amax) == (other.underflow, other.amax)
        assert one.sqnr_db == pytest.approx(other.sqnr_db)


@pytest.mark.parametrize(
    ("batch", "loss_fn", "says"),
    [
        ([1, 2], None, "batch is a list"),
        ({"input_ids": IDS}, None, "gave no loss"),
        (IDS, lambda m, b: m(b).logits, "wanted a scalar"),
        (IDS, lambda m, b: 3.0, "gave float"),
    ],
)
def test_a_batch_without_a_loss_is_refused(
    tiny_model: ModelMaker, batch: Any, loss_fn: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        diagnose(tiny_model(), batch, loss_fn)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no FP8 layer and none that could become one"):
        diagnose(nn.Sequential(nn.Embedding(5, 5)))


@pytest.fixture
def found(tiny_model: ModelMaker) -> Diagnosis:
    return diagnose(tiny_model(), IDS)


def test_json_is_json_and_holds_every_row(found: Diagnosis) -> None:
    broken = dataclasses.replace(found.rows[0], sqnr_db=math.inf, kurtosis=math.nan)
    content = dataclasses.replace(found, rows=(broken, *found.rows[1:])).to_json()
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again["recipe"] == "block"
    assert again["tokens"] == IDS.numel()
    assert (again["rows"][0]["sqnr_db"], again["rows"][0]["kurtosis"]) == (None, None)
    for row, wanted in zip(again["rows"][1:], found.rows[1:], strict=True):
        assert row == dataclasses.asdict(wanted)


def test_the_table_is_worst_first_and_as_long_as_asked(found: Diagnosis) -> None:
    numbers = [float(row["SQNR dB"]) for row in found.table()]
    assert numbers == sorted(numbers)
    assert len(numbers) == len(found.rows)
    assert found.table(3) == found.table()[:3]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_drawn_of_whatever_was_measured(
    found: Diagnosis, tmp_path: Path, suffix: str
) -> None:
    clipped = dataclasses.replace(found.rows[4], saturation=0.2)
    broken = dataclasses.replace(
        found.rows[0], nonfinite=1, sqnr_db=math.nan, underflow=math.nan, saturation=math.nan
    )
    for at, rows in enumerate(
        [found.rows, (broken, *found.rows[1:], clipped), found.rows[1:2], diagnose(_mlp()).rows]
    ):
        path = tmp_path / f"{at}.{suffix}"
        dataclasses.replace(found, rows=rows).plot(path)
        head = path.read_bytes()
        assert head.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
        assert len(head) > 5_000


def test_a_plot_says_what_it_shows(found: Diagnosis, tmp_path: Path) -> None:
    found.plot(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in (
        "input: SQNR, dB",
        "grad_output: lost to zero, %",
        "no value is clipped",
        "block",
    ):
        assert f"<!-- {words}" in text or words in text
    assert "mlp.down_proj" in text
