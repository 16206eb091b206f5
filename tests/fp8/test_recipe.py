"""Laws of recipes: what they refuse, what they say, and what they claim about a model."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8.convert import convert_to_float8_training
from fp8.formats import E2M1, E5M2, E8M0
from fp8.recipe import (
    MXFP8,
    NVFP4,
    RECIPES,
    ROW,
    TENSOR,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    QuantSpec,
    Recipe,
    RowwiseScaling,
    recipe_named,
)

ALONE = {
    "block": BlockScaling(),
    "block fp32": BlockScaling(scale_format="fp32"),
    "block 32": BlockScaling(block=32),
    "rowwise": RowwiseScaling(),
    "rowwise p2": RowwiseScaling(scale_format="power_of_two"),
    "mxfp8": MXFP8(),
    "nvfp4": NVFP4(keep_last=0.0),
}
SHARED = {
    "current": CurrentScaling(),
    "current p2": CurrentScaling(scale_format="power_of_two"),
    "delayed": DelayedScaling(),
}
# Not causal either, but only an e4m3 scale at the edge of its range shows it: the outer scale is
# a power of two, and moves no code otherwise. tests/fp8/test_quantize.py has the witness.
NEARLY_ALONE = NVFP4(outer="tensor", keep_last=0.0)


def each(recipes: dict[str, Recipe]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", recipes.values(), ids=recipes.keys())


def logits_when(recipe: Recipe, make: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """A model's logits for some text, for the same with another end, and among other rows."""
    model = make().eval()
    convert_to_float8_training(model, recipe)
    ids = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))
    later, other = ids.clone(), ids.clone()
    later[:, 25:] = 7
    other[1:] = 9
    with torch.no_grad():
        texts = {"plain": ids, "later": later, "other": other, "turned": ids.flip(0)}
        return {name: model(text).logits for name, text in texts.items()}


@each(ALONE)
def test_a_model_that_is_said_to_be_causal_is(
    recipe: Recipe, tiny_model: Callable[..., nn.Module]
) -> None:
    assert recipe.row_independent
    logits = logits_when(recipe, tiny_model)
    assert torch.equal(logits["later"][:, :25], logits["plain"][:, :25])
    assert not torch.equal(logits["later"][:, 25:], logits["plain"][:, 25:])
    assert torch.equal(logits["other"][0], logits["plain"][0])
    assert torch.equal(logits["turned"].flip(0), logits["plain"])


@each(SHARED)
def test_a_model_that_is_not_said_to_be_causal_is_not(
    recipe: Recipe, tiny_model: Callable[..., nn.Module]
) -> None:
    assert not recipe.row_independent
    logits = logits_when(recipe, tiny_model)
    assert not torch.equal(logits["later"][:, :25], logits["plain"][:, :25])
    assert not torch.equal(logits["other"][0], logits["plain"][0])


def test_one_scale_for_all_tokens_is_never_said_to_be_causal() -> None:
    assert not NEARLY_ALONE.row_independent
    assert not dataclasses.replace(BlockScaling(), history=4).row_independent
    assert not dataclasses.replace(BlockScaling(), input=QuantSpec(block=(2, 128))).row_independent
    # What gradients and weights share between rows is no matter to the logits.
    assert dataclasses.replace(BlockScaling(), grad_output=NEARLY_ALONE.input).row_independent


def test_every_recipe_has_a_name_that_finds_it() -> None:
    for name in RECIPES:
        recipe = recipe_named(name)
        assert recipe.name == name
        assert recipe == RECIPES[name]()
        assert str(recipe).startswith(f"{name}: input E")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blok", r"recipe 'blok' is not known; did you mean block\? There are block, rowwise"),
        ("nvfp", r"did you mean nvfp4\?"),
        ("xyzzy", r"recipe 'xyzzy' is not known\. There are block"),
        ("", r"recipe '' is not known\. There are"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe_named(name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": (0, 128)}, r"block is \(0, 128\); wanted sizes of at least 1"),
        ({"block": (1, -4)}, r"block is \(1, -4\)"),
        ({"scale_format": "e8m0"}, "scale_format is 'e8m0'; wanted power_of_two, fp32 or e4m3"),
        ({"format": E8M0}, "format is E8M0, which has no sign: wanted E4M3, E5M2 or E2M1"),
        ({"outer": (1, 128)}, r"outer is \(1, 128\); wanted a row"),
        ({"scale_format": "e4m3", "block": (16, 16)}, "tiles with e4m3 scales need outer"),
    ],
)
def test_a_spec_without_meaning_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantSpec(**settings)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (BlockScaling, {"block": 0}, "block is"),
        (BlockScaling, {"gemm": "fp16"}, "gemm is 'fp16'; wanted one of bfloat16, float32"),
        (MXFP8, {"backend": "cuda"}, "backend is 'cuda'; wanted one of auto, emulated, scaled_mm"),
        (DelayedScaling, {"history": 0}, "history is 0; wanted at least 1 step"),
        (NVFP4, {"keep_last": 1.0}, "keep_last 1.0; wanted at least 0, and a share below 1"),
        (NVFP4, {"keep_last": -0.1}, "keep_last -0.1"),
    ],
)
def test_a_recipe_without_meaning_is_refused(
    make: Callable[..., Recipe], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_a_history_of_two_level_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="history needs one scale a block"):
        dataclasses.replace(NVFP4(), history=16)
    with pytest.raises(ValueError, match="history is -1"):
        dataclasses.replace(BlockScaling(), history=-1)


def test_a_recipe_is_data() -> None:
    for recipe in (*ALONE.values(), *SHARED.values()):
        for twin in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
            assert twin == recipe
            assert hash(twin) == hash(recipe)
            assert twin.input.format is recipe.input.format
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.name = "another"  # type: ignore[misc]


def test_its_line_tells_all_that_a_resumed_run_must_share() -> None:
    base = BlockScaling()
    said = {
        str(r)
        for r in (
            base,
            BlockScaling(block=64),
            BlockScaling(scale_format="fp32"),
            BlockScaling(gemm="float32"),
            dataclasses.replace(base, hadamard=True),
            dataclasses.replace(base, history=4),
            dataclasses.replace(base, grad_output=QuantSpec(format=E5M2)),
            dataclasses.replace(base, grad_output=QuantSpec(stochastic=True)),
            NVFP4(),
            NVFP4(outer="tensor"),
        )
    }
    assert len(said) == 10
    assert str(BlockScaling(backend="emulated")) == str(base)


@pytest.mark.parametrize(
    ("spec", "saves_rows"),
    [
        (QuantSpec(), True),
        (QuantSpec(block=(1, 32)), True),
        (QuantSpec(scale_format="fp32"), False),  # requantised they would lose accuracy
        (QuantSpec(block=ROW), False),
        (QuantSpec(block=TENSOR, scale_format="fp32"), True),
        (QuantSpec(block=(1, 32), format=E2M1), False),  # hardly any range to move in
        (QuantSpec(block=(1, 16), format=E2M1, scale_format="e4m3"), False),
    ],
    ids=str,
)
def test_rows_are_kept_for_backward_where_they_serve_columns(
    spec: QuantSpec, saves_rows: bool
) -> None:
    recipe = dataclasses.replace(BlockScaling(), input=spec)
    assert recipe.saves_rows == saves_rows
    assert not dataclasses.replace(recipe, hadamard=True).saves_rows
