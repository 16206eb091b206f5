"""The mapping onto Transformer Engine, against a stand-in: the engine itself needs a GPU."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8.backends import transformer_engine as te
from fp8.backends.transformer_engine import TransformerEngine, recipe_refusal
from fp8.linear import Float8Linear
from fp8.recipe import (
    MXFP8,
    NVFP4,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Recipe,
    RowwiseScaling,
)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MAPPED = [
    BlockScaling(),
    BlockScaling(scale_format="fp32"),
    CurrentScaling(),
    DelayedScaling(history=16),
    MXFP8(),
    NVFP4(outer="tensor"),
]


class Said(SimpleNamespace):
    """A recipe of the engine: its name and what it was told."""


class TheirLinear(nn.Module):
    """What te.Linear is to us: parameters, and some state of its own."""

    def __init__(
        self, k: int, n: int, *, bias: bool, params_dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(n, device=device)) if bias else None
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.device == x.device
        assert x.shape[0] % 128 == 0
        self.seen.append(tuple(x.shape))
        return nn.functional.linear(x, self.weight, self.bias)

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError(state)


class StandIn:
    """Two modules of the engine, and the recipes that were entered."""

    def __init__(self, missing: str = "") -> None:
        self.entered: list[Said] = []

        @contextmanager
        def autocast(*, enabled: bool, recipe: Said) -> Iterator[None]:
            assert enabled
            self.entered.append(recipe)
            yield

        checks = {
            f"is_{name}_available": _answer(name != missing, f"no {name}")
            for name in ("fp8", "fp8_block_scaling", "mxfp8", "nvfp4")
        }
        self.torch = SimpleNamespace(Linear=TheirLinear, autocast=autocast, **checks)
        names = [
            "Float8BlockScaling",
            "Float8CurrentScaling",
            "DelayedScaling",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
            "QParams",
        ]
        self.recipe = SimpleNamespace(
            Format=SimpleNamespace(HYBRID="HYBRID", E4M3="E4M3"),
            **{name: _recorder(name) for name in names},
        )


def _answer(available: bool, reason: str) -> Any:
    def check(*, return_reason: bool) -> tuple[bool, str]:
        assert return_reason
        return available, reason

    return check


def _recorder(name: str) -> Any:
    return lambda **said: Said(name=name, **said)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(te, "_engine", lambda: made)
    return made


def layer_of(recipe: Recipe, *, bias: bool = True) -> Float8Linear:
    layer = Float8Linear.from_float(nn.Linear(256, 128, bias=bias), recipe)
    layer.backend = TransformerEngine()
    return layer


def test_recipes_are_said_in_the_engines_words(engine: StandIn) -> None:
    for recipe in MAPPED:
        layer_of(recipe)(torch.ones(4, 256))
    block, block_fp32, current, delayed, mxfp8, nvfp4 = engine.entered
    names = [said.name for said in engine.entered]
    assert names[0] == names[1] == "Float8BlockScaling"
    assert [q.power_2_scale for q in _scales(block)] == [True] * 3
    assert [q.power_2_scale for q in _scales(block_fp32)] == [False] * 3
    assert (current.name, current.fp8_format) == ("Float8CurrentScaling", "HYBRID")
    assert [q.power_2_scale for q in _scales(current)] == [False] * 3
    assert (delayed.name, delayed.amax_history_len) == ("DelayedScaling", 16)
    assert (delayed.fp8_format, delayed.amax_compute_algo) == ("HYBRID", "max")
    assert (mxfp8.name, mxfp8.fp8_format) == ("MXFP8BlockScaling", "E4M3")
    assert nvfp4.name == "NVFP4BlockScaling"
    assert not nvfp4.disable_rht
    assert not nvfp4.disable_stochastic_rounding
    assert not nvfp4.disable_2d_quantization


def _scales(said: Said) -> list[Any]:
    return [said.fp8_quant_fwd_inp, said.fp8_quant_fwd_weight, said.fp8_quant_bwd_grad]


def test_what_nvfp4_leaves_out_the_engine_leaves_out(engine: StandIn) -> None:
    recipe = NVFP4(outer="tensor", hadamard=False, stochastic_rounding=False)
    layer_of(recipe)(torch.ones(4, 256))
    (said,) = engine.entered
    assert said.disable_rht
    assert said.disable_stochastic_rounding


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("bias", [True, False])
def test_the_engines_layer_has_our_parameters_and_leaves_no_trace(bias: bool) -> None:
    layer = layer_of(BlockScaling(), bias=bias)
    x = torch.randn(3, 5, 256).requires_grad_()
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    names = {"weight", "bias"} if bias else {"weight"}
    assert set(layer.state_dict()) == names
    assert dict(layer.named_parameters()).keys() == names
    assert list(layer.children()) == []


@pytest.mark.usefixtures("engine")
def test_the_engines_layer_is_made_once_and_follows_our_parameters() -> None:
    layer = layer_of(BlockScaling())
    layer(torch.ones(130, 256))
    engine_backend = layer.backend
    assert isinstance(engine_backend, TransformerEngine)
    (twin,) = engine_backend._layers.values()
    layer.weight = nn.Parameter(torch.zeros(128, 256))
    layer.eval()
    assert torch.equal(layer(torch.ones(2, 256))[0], layer.bias)
    assert twin.seen == [(256, 256), (128, 256)]  # tokens filled up to 128
    assert twin.weight is layer.weight
    assert not twin.training


@pytest.mark.usefixtures("engine")
def test_copies_and_pickles_hold_no_layer_of_the_engine() -> None:
    layer = layer_of(BlockScaling())
    layer(torch.ones(2, 256))
    twin = copy.deepcopy(layer)
    assert twin.weight is not layer.weight
    assert torch.equal(twin(torch.ones(2, 256)), layer(torch.ones(2, 256)))
    again = pickle.loads(pickle.dumps(layer))
    assert again.backend.name == "transformer_engine"
    assert len(again.backend._layers) == 0


@pytest.mark.usefixtures("engine")
def test_bf16_inputs_meet_fp32_weights() -> None:
    layer = layer_of(BlockScaling())
    assert layer(torch.ones(4, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("recipe", MAPPED, ids=lambda r: r.name)
def test_mapped_recipes_are_taken_on_a_gpu_that_can(recipe: Recipe) -> None:
    assert TransformerEngine().refusal(recipe, 256, 128, GPU) is None


@pytest.mark.parametrize(
    ("missing", "recipe"),
    [
        ("fp8", CurrentScaling()),
        ("fp8_block_scaling", BlockScaling()),
        ("mxfp8", MXFP8()),
        ("nvfp4", NVFP4(outer="tensor")),
    ],
    ids=str,
)
def test_the_engine_is_asked_what_the_gpu_can(
    missing: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(te, "_engine", lambda: StandIn(missing))
    why_not = TransformerEngine().refusal(recipe, 256, 128, GPU)
    assert why_not == f"Transformer Engine says: no {missing}"


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (RowwiseScaling(), "no recipe like rowwise"),
        (BlockScaling(gemm="float32"), "gemm is float32"),
        (BlockScaling(block=64), "1 x 128"),
        (NVFP4(), "outer='tensor'"),
        (DelayedScaling(scale_format="power_of_two"), "fp32"),
    ],
    ids=str,
)
def test_recipes_the_engine_does_not_have_are_refused(recipe: Recipe, word: str) -> None:
    assert word in (recipe_refusal(recipe) or "")


@pytest.mark.usefixtures("engine")
def test_sizes_the_engine_does_not_take_are_refused() -> None:
    backend = TransformerEngine()
    assert "128" in (backend.refusal(BlockScaling(), 192, 128, GPU) or "")
    assert "16" in (backend.refusal(CurrentScaling(), 128, 40, GPU) or "")
    assert "CUDA" in (backend.refusal(CurrentScaling(), 128, 128, CPU) or "")


def test_an_old_engine_is_refused(monkeypatch: pytest.MonkeyPatch, engine: StandIn) -> None:
    del engine.torch.is_nvfp4_available
    assert "upgrade" in (TransformerEngine().refusal(NVFP4(outer="tensor"), 128, 128, GPU) or "")
    del engine.torch.autocast
    entered = []

    @contextmanager
    def fp8_autocast(*, enabled: bool, fp8_recipe: Said) -> Iterator[None]:
        entered.append((enabled, fp8_recipe.name))
        yield

    monkeypatch.setattr(engine.torch, "fp8_autocast", fp8_autocast, raising=False)
    layer_of(BlockScaling())(torch.ones(2, 256))
    assert entered == [(True, "Float8BlockScaling")]


@pytest.mark.slow
def test_absent_and_broken_engines_are_refused_with_the_reason(tmp_path: Path) -> None:
    refuse = (
        "import torch; from fp8.backends.transformer_engine import TransformerEngine;"
        "from fp8.recipe import BlockScaling;"
        "print(TransformerEngine().refusal(BlockScaling(), 128, 128, torch.device('cuda')))"
    )
    assert "not installed" in _run(refuse, tmp_path)
    (tmp_path / "transformer_engine").mkdir()
    broken = "raise RuntimeError('found no core')"  # as the wheel without its core does
    (tmp_path / "transformer_engine" / "__init__.py").write_text(broken)
    assert "cannot be imported: found no core" in _run(refuse, tmp_path)


@pytest.mark.slow
def test_the_engine_is_never_imported_without_cuda(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys, torch; from torch import nn; import fp8.convert, fp8.linear;"
        "from fp8.backends.select import available;"
        "from fp8.recipe import RECIPES;"
        "[available(make(), torch.device('cpu')) for make in RECIPES.values()];"
        "model = nn.Sequential(nn.Linear(128, 128));"
        "fp8.convert.convert_to_float8_training(model);"
        "model(torch.ones(2, 128)).sum().backward();"
        "print('transformer_engine' in sys.modules)"
    )
    assert _run(code, tmp_path).strip() == "False"


def _run(code: str, folder: Path) -> str:
    paths = f"import sys; sys.path[:0] = [{str(Path.cwd())!r}, {str(folder)!r}];"
    done = subprocess.run(
        [sys.executable, "-c", paths + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_of_the_layer_decides_at_every_call(engine: StandIn) -> None:
    layer = layer_of(CurrentScaling())
    layer(torch.ones(2, 256))
    layer.recipe = replace(CurrentScaling(scale_format="power_of_two"))
    layer(torch.ones(2, 256))
    first, second = engine.entered
    assert [q.power_2_scale for q in _scales(first)] == [False] * 3
    assert [q.power_2_scale for q in _scales(second)] == [True] * 3
