import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fp8.checkpoint import Position, checkpoints, load, opened, save
from fp8.checkpoint_files import CheckpointError
from fp8.convert import convert_to_float8_training
from fp8.linear import float8_state
from fp8.recipe import NVFP4, BlockScaling, CurrentScaling, DelayedScaling, Recipe, RowwiseScaling
from fp8.resume import Resume
from fp8.train import (
    Progress,
    TrainConfig,
    TrainResult,
    learning_rate,
    make_optimizer,
    packed_batches,
    train,
)

CONFIG = TrainConfig(steps=20, lr=1e-3, warmup_steps=3, decay_steps=5, checkpoint_every=7)
STREAM = np.random.default_rng(0).integers(0, 64, 900)
BATCH_AT = packed_batches(STREAM, batch_size=3, seq_len=24, seed=1)
Run = Callable[..., TrainResult]


class Small(nn.Module):
    """A byte model with a linear layer to convert, and a matrix large enough for 8-bit moments."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(64, 96, dtype=dtype)
        self.body = nn.Linear(96, 96, dtype=dtype)
        self.norm = nn.LayerNorm(96, dtype=dtype)
        self.lm_head = nn.Linear(96, 64, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.norm(self.body(self.embed(ids))))
        return out


def small(recipe: Recipe | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Small(dtype)
    if recipe is not None:
        assert convert_to_float8_training(model, recipe).converted == ("body",)
    return model


def loss_fn(model: nn.Module, batch_BT1: Tensor) -> Tensor:
    logits = model(batch_BT1[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch_BT1[:, 1:].flatten())


def stops_after(asked: int) -> Callable[[], bool]:
    answers = iter([False] * asked)
    return lambda: next(answers, True)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Train a small model with checkpoints in `tmp_path`."""

    def trained(config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
        model = options.pop("model", None) or small()
        return train(model, BATCH_AT, loss_fn, config, checkpoint_dir=tmp_path, **options)

    return trained


def straight(config: TrainConfig = CONFIG, model: nn.Module | None = None) -> TrainResult:
    return train(model or small(), BATCH_AT, loss_fn, config)


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    found, wanted = one.state_dict(), other.state_dict()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- what a checkpoint holds comes back, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "float8_adamw"])
def test_either_optimizer_goes_on_bit_for_bit(
    run: Run, tmp_path: Path, optimizer: Any, dtype: torch.dtype
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    models = [small(BlockScaling(), dtype) for _ in range(3)]
    wanted = straight(config, models[0])
    run(config, model=models[1], should_stop=stops_after(10))
    saved = load_file(tmp_path / "step-10" / "optimizer.safetensors")
    dtypes = {tensor.dtype for tensor in saved.values()}
    assert (torch.uint8 in dtypes) == (optimizer == "float8_adamw")
    assert run(config, model=models[2]) == wanted
    assert same_bits(models[2], models[0])


def test_every_tensor_of_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="float8_adamw")
    model = small()
    optimizer = make_optimizer(model, config)
    for step in range(3):
        loss_fn(model, BATCH_AT(step)).backward()
        optimizer.step()
    told = {"step": 3}
    path = save(tmp_path, model, optimizer, Position(3, [1.0, math.nan, 2.0], 1, 0), told)
    other = small()
    fresh = make_optimizer(other, config)
    at = load(opened(path), other, fresh)
    assert (at.step, at.losses[::2], at.skipped_steps) == (3, [1.0, 2.0], 1)
    assert math.isnan(at.losses[1])
    assert opened(path).config == told
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        for key, wanted in optimizer.state[p].items():
            found = fresh.state[q][key]
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_delayed_scaling_remembers_across_a_resume(run: Run, tmp_path: Path) -> None:
    recipe = DelayedScaling(history=4)
    models = [small(recipe) for _ in range(3)]
    wanted = straight(model=models[0])
    run(model=models[1], should_stop=stops_after(10))
    file = tmp_path / "step-10" / "fp8.safetensors"
    assert load_file(file).keys() == float8_state(models[1]).keys()
    assert run(model=models[2]) == wanted
    assert same_bits(models[2], models[0])
    assert all(
        torch.equal(float8_state(models[2])[name], value)
        for name, value in float8_state(models[0]).items()
    )


def test_a_recipe_that_remembers_nothing_writes_nothing(run: Run, tmp_path: Path) -> None:
    run(model=small(BlockScaling()))
    assert names(tmp_path / "step-20") == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


# -- of another recipe


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (BlockScaling(), None, r"name block \(now None\)"),
        (None, BlockScaling(), r"name None \(now block\)"),
        (BlockScaling(), RowwiseScaling(), r"name block \(now rowwise\)"),
        (
            BlockScaling(),
            BlockScaling(scale_format="fp32"),
            "scale_format.*power_of_two.*now.*fp32",
        ),
        (DelayedScaling(history=3), CurrentScaling(), "delayed.*current"),
        (BlockScaling(), NVFP4(keep_last=0.0), "block.*nvfp4"),
    ],
)
def test_another_recipe_is_refused_unless_it_is_allowed(
    run: Run, before: Recipe | None, after: Recipe | None, says: str
) -> None:
    run(model=small(before))
    longer, model = replace(CONFIG, steps=22), small(after)
    with pytest.raises(CheckpointError, match=f"first is body: .*{says}.*other_recipe=True"):
        run(longer, model=model)
    assert same_bits(model, small())
    allowed = run(longer, model=model, resume_with=Resume(other_recipe=True))
    assert len(allowed.losses) == 22
    assert run(replace(CONFIG, steps=23), model=small(after)).finished  # it is the recipe now


def test_where_a_gemm_runs_and_what_it_rounds_to_may_change(run: Run) -> None:
    run(model=small(BlockScaling(gemm="float32")), should_stop=stops_after(9))
    assert run(model=small(BlockScaling(gemm="bfloat16", backend="emulated"))).finished


# -- damaged, or of another program


def tampered(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change a file and its sha256 too: only its content tells."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    state = json.loads((path.parent / "state.json").read_text())
    state["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model", lambda t: t.pop("body.weight"), r"another model.*body\.weight"),
        ("model", lambda t: t.update(extra=torch.ones(1)), "another model.*extra"),
        ("optimizer", lambda t: t.pop("body.weight.exp_avg"), "has exp_avg of shape none"),
        ("optimizer", lambda t: t.pop("body.weight.step"), "has step of shape none"),
        (
            "optimizer",
            lambda t: t.update({"gone.weight.exp_avg": torch.ones(1)}),
            r"another model.*gone\.weight",
        ),
        (
            "optimizer",
            lambda t: t.update({"body.bias.exp_avg": torch.ones(3)}),
            r"has exp_avg of shape \[3\]; wanted \[96\]",
        ),
        ("fp8", lambda t: t.pop("body.amax_past"), r"another model.*body\.amax_past"),
    ],
)
def test_missing_and_strange_tensors_are_named_and_nothing_is_touched(
    run: Run, tmp_path: Path, file: str, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    recipe = DelayedScaling(history=3)
    run(model=small(recipe))
    tampered(tmp_path / "step-20" / f"{file}.safetensors", change)
    model = small(recipe)
    with pytest.raises(CheckpointError, match=says):
        run(replace(CONFIG, steps=21), model=model)
    assert same_bits(model, small())


def test_a_damaged_history_is_damage(run: Run, tmp_path: Path) -> None:
    run(model=small(DelayedScaling(history=3)))
    path = tmp_path / "step-20" / "fp8.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"fp8\.safetensors cannot be used"):
        run(model=small(DelayedScaling(history=3)))


def test_the_first_format_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    run()
    path = tmp_path / "step-20" / "state.json"
    state = json.loads(path.read_text())
    del state["ranks"]
    path.write_text(json.dumps(state | {"format": 1}))
    with pytest.raises(CheckpointError, match="format 1, of an older cofuse; finish that run"):
        run()


@pytest.mark.parametrize(
    "change", [{"optimizer": "float8_adamw"}, {"lr": 1.0}, {"min_lr_ratio": 0.2}], ids=str
)
def test_settings_that_change_the_run_are_refused(run: Run, change: dict[str, Any]) -> None:
    run()
    with pytest.raises(CheckpointError, match=next(iter(change))):
        run(replace(CONFIG, **change))


def test_settings_that_change_no_result_are_free(run: Run) -> None:
    run(should_stop=stops_after(9))
    free = replace(CONFIG, checkpoint_every=3, keep_stable=False, accumulate=3)
    assert run(free).losses == pytest.approx(straight().losses, rel=1e-4)


# -- the stable checkpoint, and decaying anew


def test_the_checkpoint_before_the_decay_is_kept(run: Run, tmp_path: Path) -> None:
    run()
    assert names(tmp_path) == ["stable-15", "step-20"]
    assert checkpoints(tmp_path, "stable") == [tmp_path / "stable-15"]
    model = small()
    straight(replace(CONFIG, steps=15, decay_steps=0), model)
    found = load_file(tmp_path / "stable-15" / "model.safetensors")
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
    run(replace(CONFIG, steps=40, decay_steps=8))
    assert names(tmp_path) == ["stable-32", "step-40"]


@pytest.mark.parametrize(
    "change", [{"keep_stable": False}, {"decay_steps": 0}, {"decay_steps": 20}], ids=str
)
def test_nothing_is_kept_when_there_is_nothing_to_keep(
    run: Run, tmp_path: Path, change: dict[str, Any]
) -> None:
    run(replace(CONFIG, **change))
    assert names(tmp_path) == ["step-20"]


@pytest.mark.parametrize("stop", [16, 18, 21, 27, 31])
def test_a_decay_begun_anew_from_the_stable_checkpoint_is_as_if_it_were_the_first(
    run: Run, tmp_path: Path, stop: int
) -> None:
    """Wherever the second run is stopped, the same call takes it up again."""
    run()
    other = replace(CONFIG, steps=33, decay_steps=9)
    anew = Resume(start="stable")
    half = run(other, resume_with=anew, should_stop=stops_after(stop - 15))
    assert half.step == stop
    model, wanted, seen = small(), small(), list[int]()
    whole = run(other, model=model, resume_with=anew, on_progress=lambda p: seen.append(p.step))
    assert whole == straight(other, wanted)
    assert seen == list(range(stop + 1, 34))
    assert same_bits(model, wanted)
    assert names(tmp_path) == ["stable-24", "step-33"]


def test_a_run_that_never_decayed_has_no_need_of_a_stable_checkpoint(run: Run) -> None:
    run(should_stop=stops_after(9))
    other = replace(CONFIG, steps=12, decay_steps=2)
    assert run(other, resume_with=Resume(start="stable")) == straight(other)


def test_without_a_stable_checkpoint_it_says_so(run: Run) -> None:
    run(replace(CONFIG, keep_stable=False))
    with pytest.raises(CheckpointError, match=r"no stable checkpoint.*keep_stable=False"):
        run(replace(CONFIG, steps=30), resume_with=Resume(start="stable"))


def test_in_mid_decay_another_schedule_needs_a_word(run: Run) -> None:
    half = run(should_stop=stops_after(17))
    longer = replace(CONFIG, steps=30)
    with pytest.raises(CheckpointError, match=r"step 15 of 20.*start='stable'.*override_schedule"):
        run(longer)
    assert run(CONFIG, should_stop=lambda: True) == half  # the same schedule needs none
    seen: list[Progress] = []
    run(longer, resume_with=Resume(override_schedule=True), on_progress=seen.append)
    assert [p.lr for p in seen] == [learning_rate(step, longer) for step in range(17, 30)]


def test_the_schedule_can_be_overridden_as_a_whole(run: Run) -> None:
    run()
    other = replace(CONFIG, steps=26, lr=5e-4, min_lr_ratio=0.5, warmup_steps=0)
    seen: list[Progress] = []
    override = Resume(override_schedule=True)
    run(other, resume_with=override, on_progress=seen.append)
    assert [p.lr for p in seen] == [learning_rate(step, other) for step in range(20, 26)]
    with pytest.raises(CheckpointError, match="seed"):
        run(replace(other, steps=30, seed=3), resume_with=override)


def test_when_the_newest_is_deleted_the_stable_one_is_taken_up(run: Run, tmp_path: Path) -> None:
    run()
    for file in (tmp_path / "step-20").iterdir():
        file.unlink()
    (tmp_path / "step-20").rmdir()
    seen: list[int] = []
    assert run(on_progress=lambda p: seen.append(p.step)) == straight()
    assert seen == list(range(16, 21))


def test_a_branch_that_was_left_is_not_taken_for_the_newest(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two removals must not bring back the run that decayed before."""

    class Killed(BaseException):
        pass

    def killed_after_the_rename(paths: list[Path]) -> None:
        if paths == [tmp_path]:
            raise Killed

    run(replace(CONFIG, steps=40, decay_steps=25, checkpoint_every=100))
    assert names(tmp_path) == ["stable-15", "step-40"]
    other = replace(CONFIG, steps=33, decay_steps=9, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("fp8.checkpoint.flush", killed_after_the_rename)
        with pytest.raises(Killed):
            run(other, resume_with=Resume(start="stable"))
    assert names(tmp_path) == ["stable-15", "step-16"]
    assert run(other) == straight(other)
