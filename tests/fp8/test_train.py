import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8.batches import IGNORED, count_tokens, packed_documents, part_of
from fp8.checkpoint import checkpoints
from fp8.checkpoint_files import CheckpointError
from fp8.convert import convert_to_float8_training
from fp8.distributed import Ranks
from fp8.documents import Documents
from fp8.train import (
    Progress,
    TrainConfig,
    TrainingDivergedError,
    causal_lm_loss,
    learning_rate,
    make_optimizer,
    packed_batches,
    pieces_of,
    train,
)
from fp8.train import accumulate as accumulated

CONFIG = TrainConfig(steps=20, lr=1e-3, warmup_steps=5, decay_steps=5, checkpoint_every=7)
STREAM = np.random.default_rng(0).integers(0, 256, 900)
BATCH_AT = packed_batches(STREAM, batch_size=3, seq_len=24, seed=1)
ModelMaker = Callable[..., nn.Module]


class Killed(BaseException):
    """Stands for the process ending anywhere: nothing after it runs."""


def killed_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return on_progress


def stops_after(asked: int) -> Callable[[], bool]:
    answers = iter([False] * asked)
    return lambda: next(answers, True)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    found, wanted = one.state_dict(), other.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


class Line(nn.Module):
    """A model without transformers: logits of the next byte from the byte before it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(256, 8)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 256)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.drop(self.embed(ids)))) * self.scale
        return out


def line_loss(model: nn.Module, batch_BT1: Tensor) -> Tensor:
    logits = model(batch_BT1[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch_BT1[:, 1:].flatten())


# -- resuming


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stop", [10, 14])
def test_a_stopped_run_ends_bit_for_bit_like_a_straight_one(
    tiny_model: ModelMaker, tmp_path: Path, tied: bool, fp8: bool, stop: int
) -> None:
    models = [tiny_model(tied=tied) for _ in range(3)]
    if fp8:
        for model in models:
            convert_to_float8_training(model)
    straight = train(models[0], BATCH_AT, causal_lm_loss, CONFIG)
    half = train(
        models[1],
        BATCH_AT,
        causal_lm_loss,
        CONFIG,
        checkpoint_dir=tmp_path,
        should_stop=stops_after(stop),
    )
    assert (half.step, half.finished, half.losses) == (stop, False, straight.losses[:stop])
    whole = train(models[2], BATCH_AT, causal_lm_loss, CONFIG, checkpoint_dir=tmp_path)
    assert whole == straight
    assert (whole.step, whole.finished, len(whole.losses)) == (20, True, 20)
    assert same_weights(models[2], models[0])


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    straight, broken, resumed = (tiny_model() for _ in range(3))
    wanted = train(straight, BATCH_AT, causal_lm_loss, CONFIG)
    with pytest.raises(Killed):
        train(
            broken,
            BATCH_AT,
            causal_lm_loss,
            CONFIG,
            checkpoint_dir=tmp_path,
            on_progress=killed_at(12),
        )
    seen: list[int] = []
    result = train(
        resumed,
        BATCH_AT,
        causal_lm_loss,
        CONFIG,
        checkpoint_dir=tmp_path,
        on_progress=lambda p: seen.append(p.step),
    )
    assert seen == list(range(8, 21))
    assert result == wanted
    assert same_weights(resumed, straight)


def train_until_killed(folder: Path) -> None:
    """Run in another process: a checkpoint at every step, for ever."""
    torch.set_num_threads(1)
    train(Line(), BATCH_AT, line_loss, ENDLESS, checkpoint_dir=folder)


ENDLESS = replace(CONFIG, steps=1_000_000, checkpoint_every=1)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += "import test_train; test_train.train_until_killed(pathlib.Path(sys.argv[1]))"
    folders = [tmp_path / str(kill) for kill in range(2)]
    children = [subprocess.Popen([sys.executable, "-c", script, str(f)]) for f in folders]
    wanted = train(Line(), BATCH_AT, line_loss, replace(ENDLESS, steps=40, decay_steps=0)).losses
    for kill, (folder, child) in enumerate(zip(folders, children, strict=True)):
        while not checkpoints(folder):
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(0.011 * kill)
        child.kill()
        child.wait()
        at = train(
            Line(), BATCH_AT, line_loss, ENDLESS, checkpoint_dir=folder, should_stop=lambda: True
        )
        assert at.step > 0
        assert at.losses[:40] == wanted[: at.step]


def test_of_two_checkpoints_the_newer_one_counts(tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=run, should_stop=stops_after(9))
    (run / "step-9").rename(aside)
    wanted = train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=run)
    aside.rename(run / "step-9")  # as if killed after the rename, before the removal
    assert [p.name for p in checkpoints(run)] == ["step-9", "step-20"]
    assert train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=run) == wanted


def test_training_is_continual(tmp_path: Path) -> None:
    model = Line()
    first = train(model, BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    longer = replace(CONFIG, steps=30, decay_steps=2, checkpoint_every=100)
    second = train(Line(), BATCH_AT, line_loss, longer, checkpoint_dir=tmp_path)
    assert second.losses[:20] == first.losses
    assert (second.step, len(second.losses)) == (30, 30)
    done = train(model, BATCH_AT, line_loss, longer, checkpoint_dir=tmp_path)
    assert done == second
    assert [p.name for p in checkpoints(tmp_path)] == ["step-30"]


def test_dropout_draws_the_same_after_a_resume_and_leaves_the_callers_generator_alone(
    tmp_path: Path,
) -> None:
    wanted = train(Line(0.5), BATCH_AT, line_loss, CONFIG).losses
    train(
        Line(0.5),
        BATCH_AT,
        line_loss,
        CONFIG,
        checkpoint_dir=tmp_path,
        should_stop=stops_after(9),
    )
    model = Line(0.5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert train(model, BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path).losses == wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert train(Line(0.5), BATCH_AT, line_loss, replace(CONFIG, seed=1)).losses != wanted
    still = replace(CONFIG, lr=1e-12)  # one batch, weights that do not move: only dropout differs
    drawn = train(Line(0.5), lambda _step: BATCH_AT(0), line_loss, still).losses
    assert len(set(drawn)) == 20


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-3}, {"betas": (0.9, 0.99)}, {"seed": 5}, {"warmup_steps": 1}, {"grad_clip": 9.0}],
    ids=lambda change: next(iter(change)),
)
def test_another_config_is_refused_with_the_setting_named(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        train(Line(), BATCH_AT, line_loss, replace(CONFIG, **change), checkpoint_dir=tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    other = Line()
    other.head = nn.Linear(8, 300)
    before = other.embed.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"another model.*head\.bias"):
        train(other, BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    assert torch.equal(other.embed.weight, before)


# -- damaged checkpoints


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9 if path.suffix == ".safetensors" else 2] ^= 0x80
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_the_model_is_left_alone(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    path = tmp_path / "step-20" / name
    damage(path)
    model = Line()
    with pytest.raises(CheckpointError) as error:
        train(model, BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    assert str(path) in str(error.value)
    assert "delete" in str(error.value)
    assert same_weights(model, Line())
    shutil.rmtree(path.parent)  # what the message says
    assert train(model, BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path).finished


def test_a_state_file_with_missing_fields_is_damaged(tmp_path: Path) -> None:
    train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    (tmp_path / "step-20" / "state.json").write_text(json.dumps({"format": 1, "step": 3}))
    with pytest.raises(CheckpointError, match="sha256"):
        train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)


def test_drafts_and_strangers_in_the_folder_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "draft-90").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-99").write_text("a file")
    assert train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path).step == 20
    assert [p.name for p in checkpoints(tmp_path)] == ["step-20"]
    assert not list(tmp_path.glob("draft-*"))


# -- steps that are not finite


def spoiled_at(bad: set[int]) -> Callable[[int], Tensor]:
    """Batches of which some are [1, 1]: the loss below makes NaN of them."""
    return lambda step: torch.zeros(1, 1, dtype=torch.int64) if step in bad else BATCH_AT(step)


def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(tmp_path: Path) -> None:
    model = Line()
    with pytest.warns(RuntimeWarning, match="step 4 is skipped"):
        result = train(model, spoiled_at({4}), line_loss, CONFIG, checkpoint_dir=tmp_path)
    assert result.skipped_steps == 1
    assert [math.isnan(loss) for loss in result.losses] == [step == 4 for step in range(20)]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    again = train(Line(), BATCH_AT, line_loss, CONFIG, checkpoint_dir=tmp_path)
    assert again.skipped_steps == 1
    assert math.isnan(again.losses[4])


def test_an_infinite_loss_is_skipped_too() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return line_loss(model, batch) * math.inf

    with pytest.warns(RuntimeWarning, match="loss inf"):
        result = train(Line(), BATCH_AT, loss, replace(CONFIG, steps=1))
    assert math.isnan(result.losses[0])


def test_a_skipped_step_moves_nothing() -> None:
    one, other = Line(), Line()
    train(one, BATCH_AT, line_loss, replace(CONFIG, steps=3, decay_steps=0))
    with pytest.warns(RuntimeWarning):
        train(other, spoiled_at({3}), line_loss, replace(CONFIG, steps=4, decay_steps=0))
    assert same_weights(one, other)


def test_the_warning_names_the_layer_whose_output_broke() -> None:
    model = Line()
    with torch.no_grad():
        model.norm.weight[2] = math.inf
    with pytest.warns(RuntimeWarning, match="first not finite: the output of norm"):
        train(model, BATCH_AT, line_loss, replace(CONFIG, steps=1))


def test_the_warning_names_the_gradient_that_broke() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        x = model.embed(batch).mean() * 0.0  # type: ignore[operator]
        return x.abs().sqrt() + line_loss(model, batch)  # the root's slope at 0 is infinite

    with pytest.warns(RuntimeWarning, match=r"the gradient of embed\.weight"):
        train(Line(), BATCH_AT, loss, replace(CONFIG, steps=1))


def test_ten_in_a_row_are_divergence_and_nine_are_not(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        nine = train(Line(), spoiled_at(set(range(3, 12))), line_loss, CONFIG)
        assert nine.skipped_steps == 9
        with pytest.raises(TrainingDivergedError, match="lower lr"):
            train(Line(), spoiled_at(set(range(3, 13))), line_loss, CONFIG)


def test_within_autocast_each_step_reads_the_weights_that_the_last_one_left() -> None:
    trained = []
    for keeps in (True, False):
        model = Line()

        def read_first(step: int, model: nn.Module = model) -> Tensor:
            with torch.no_grad():  # as a rollout does
                line_loss(model, BATCH_AT(step))
            return BATCH_AT(step)

        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            losses = train(model, read_first, line_loss, CONFIG).losses
            losses.append(float(line_loss(model, BATCH_AT(0))))
        trained.append((losses, model))
    assert trained[0][0] == trained[1][0]
    assert same_weights(trained[0][1], trained[1][1])


# -- schedule, optimizer, progress


def test_the_schedule_is_warm_up_stable_decay() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=10, decay_steps=20)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:80] == [2.0] * 70
    assert all(later < sooner for sooner, later in pairwise(rates[79:]))
    assert rates[89] == pytest.approx(2.0 * 0.55)
    assert rates[99] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("warmup", "decay", "wanted"), [(0, 0, [1.0] * 4), (0, 4, None), (9, 0, None)]
)
def test_schedules_without_a_part_are_fine(
    warmup: int, decay: int, wanted: list[float] | None
) -> None:
    config = TrainConfig(steps=4, lr=1.0, warmup_steps=warmup, decay_steps=decay)
    rates = [learning_rate(step, config) for step in range(4)]
    assert all(0 < rate <= 1 for rate in rates)
    assert wanted is None or rates == wanted


def test_only_matrices_are_decayed_and_tied_weights_once(tiny_model: ModelMaker) -> None:
    model = tiny_model(tied=True)
    decayed, kept = make_optimizer(model, CONFIG).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="requires_grad"):
        make_optimizer(model.requires_grad_(False), CONFIG)


def test_it_is_adamw_as_the_book_says() -> None:
    ours, theirs = Line(), Line()
    config = replace(CONFIG, grad_clip=math.inf, weight_decay=0.0)
    train(ours, BATCH_AT, line_loss, config)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), betas=(0.9, 0.95), weight_decay=0.0, foreach=False
    )
    for step in range(20):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        line_loss(theirs, BATCH_AT(step)).backward()
        optimizer.step()
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped() -> None:
    def grad_norm(grad_clip: float) -> float:
        model = Line()
        train(model, BATCH_AT, line_loss, replace(CONFIG, steps=1, grad_clip=grad_clip))
        grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return float(torch.stack(grads).norm())

    assert grad_norm(0.01) == pytest.approx(0.01, rel=1e-3)
    assert grad_norm(math.inf) > 0.1


def test_progress_tells_of_every_step_and_of_the_losss_own_numbers() -> None:
    seen: list[Progress] = []

    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        value = line_loss(model, batch)
        return value, {"bits": value.item() / math.log(2)}

    result = train(Line(), BATCH_AT, loss, CONFIG, on_progress=seen.append)
    assert [p.step for p in seen] == list(range(1, 21))
    assert [p.loss for p in seen] == result.losses
    assert [p.lr for p in seen] == [learning_rate(step, CONFIG) for step in range(20)]
    assert all(p.tokens_per_s > 0 and p.steps == 20 for p in seen)
    assert all(p.metrics["bits"] == pytest.approx(p.loss / math.log(2)) for p in seen)
    assert all(p.metrics["grad_norm"] > 0 for p in seen)


def test_training_learns_and_gives_the_model_back_in_its_mode() -> None:
    text = np.frombuffer(b"the heart has four chambers; " * 40, dtype=np.uint8)
    batch_at = packed_batches(text, batch_size=4, seq_len=32, seed=0)
    model = Line().eval()
    losses = train(model, batch_at, line_loss, replace(CONFIG, steps=150, lr=3e-2)).losses
    assert losses[-1] < losses[0] / 3
    assert not model.training


# -- gradient accumulation


def document_batches() -> Callable[[int], dict[str, Tensor]]:
    """Batches whose first rows predict half as many tokens as their last ones."""
    lengths = [*[2] * 60, *[90] * 4, *[3] * 40]
    documents = [STREAM[i * 7 : i * 7 + n].tolist() for i, n in enumerate(lengths)]
    batch_at = packed_documents(Documents.of(documents), batch_size=6, seq_len=24, seed=0)

    def sorted_at(step: int) -> dict[str, Tensor]:
        batch = batch_at(step)
        order = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).argsort()
        return {name: value[order] for name, value in batch.items()}

    return sorted_at


@pytest.mark.parametrize("accumulate", [2, 3, 4, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["stream", "documents"])
def test_pieces_train_as_the_whole_batch_does(
    tiny_model: ModelMaker, packed: bool, accumulate: int
) -> None:
    stream = packed_batches(STREAM, batch_size=6, seq_len=24, seed=1)
    batch_at = document_batches() if packed else stream
    config = replace(CONFIG, steps=6, decay_steps=0, grad_clip=0.3)
    whole, cut = tiny_model(), tiny_model()
    wanted = train(whole, batch_at, causal_lm_loss, config)
    found = train(cut, batch_at, causal_lm_loss, replace(config, accumulate=accumulate))
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6)
    for p, q in zip(cut.parameters(), whole.parameters(), strict=True):
        # Adam divides by the gradient's size: where that is tiny, rounding decides its sign.
        assert float((p - q).detach().abs().mean()) < 2e-6


def test_no_piece_weighs_more_than_its_tokens(tiny_model: ModelMaker) -> None:
    """The gradient itself, and not what Adam makes of it; and the metrics."""
    batch = document_batches()(0)

    def counted(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return causal_lm_loss(model, batch), {"mean": float(count_tokens(batch))}

    def gradient(accumulate: int) -> tuple[Tensor, dict[str, float], list[float]]:
        model = tiny_model()
        pieces = pieces_of(batch, accumulate, Ranks())
        loss, metrics = accumulated(model, pieces, counted, Ranks())
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([loss.reshape(1), *grads]), metrics, [share for _, share in pieces]

    wanted, _, alone = gradient(1)
    found, metrics, shares = gradient(3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    tokens = [count_tokens(part_of(batch, i, 3)) for i in range(3)]
    assert alone == [1.0]
    assert max(tokens) > 1.3 * min(tokens)
    assert shares == [n / sum(tokens) for n in tokens]
    assert metrics["mean"] == pytest.approx(sum(n * n for n in tokens) / sum(tokens))


def test_one_broken_piece_skips_the_step() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return line_loss(model, batch) * (math.nan if len(batch) == 1 else 1)

    with pytest.warns(RuntimeWarning, match="step 0 is skipped"):
        result = train(Line(), BATCH_AT, loss, replace(CONFIG, steps=1, accumulate=2))
    assert result.skipped_steps == 1


def test_batches_that_cannot_be_cut_or_weighed_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 4 pieces"):
        train(Line(), BATCH_AT, line_loss, replace(CONFIG, accumulate=4))
    with pytest.raises(ValueError, match="no tokens to weigh"):
        train(Line(), lambda _: torch.zeros(4, 1), line_loss, replace(CONFIG, accumulate=4))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_eight_bit_moments_learn_as_fast(tiny_model: ModelMaker, accumulate: int) -> None:
    text = np.frombuffer(b"the heart has four chambers; " * 40, dtype=np.uint8)
    batch_at = packed_batches(text, batch_size=6, seq_len=32, seed=0)
    config = replace(CONFIG, steps=40, lr=3e-3, accumulate=accumulate)
    wanted = train(tiny_model(), batch_at, causal_lm_loss, config).losses
    eight_bits = replace(config, optimizer="float8_adamw")
    found = train(tiny_model(), batch_at, causal_lm_loss, eight_bits).losses
    assert found[-1] < 0.3 * found[0]
    assert sum(found) == pytest.approx(sum(wanted), rel=0.02)
    assert found != wanted


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd"},
        {"accumulate": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"steps": -1},
        {"grad_clip": 0.0},
        {"betas": (0.9, 1.0)},
        {"checkpoint_every": 0},
        {"min_lr_ratio": 1.5},
        {"warmup_steps": -1},
        {"decay_steps": -1},
        {"weight_decay": -0.1},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_config_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(CONFIG, **change)
