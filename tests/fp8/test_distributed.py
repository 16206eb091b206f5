"""Two ranks give what one gives. This file is also the program that torchrun starts."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fp8.batches import packed_batches, packed_documents
from fp8.checkpoint import checkpoints
from fp8.checkpoint_files import CheckpointError
from fp8.convert import convert_to_float8_training
from fp8.distributed import Ranks, call_inside, full_state_dict, join, layers, shard
from fp8.documents import Documents
from fp8.losses import causal_lm_loss
from fp8.recipe import BlockScaling, DelayedScaling, Recipe
from fp8.train import TrainConfig, TrainResult, train

BLOCK = BlockScaling(gemm="float32")
ROOT = Path(__file__).parents[2]
# lr is large and warm-up short: weights of one step before would show in the losses at once.
CONFIG = TrainConfig(steps=8, lr=2e-3, warmup_steps=2, decay_steps=2, checkpoint_every=100)
TEXT = np.frombuffer(b"the heart has four chambers, and the lung has lobes; " * 80, np.uint8)
# A rank's tokens, and an accumulated piece's, are a multiple of 128: in a layer's weight gradient
# the tiles along the tokens, and so the codes, are then those of the whole batch.
BATCH_AT = packed_batches(TEXT, batch_size=4, seq_len=64, seed=1)
EIGHT_AT = packed_batches(TEXT, batch_size=8, seq_len=64, seed=1)


def tiny(*, tied: bool = False, recipe: Recipe | None = BLOCK) -> PreTrainedModel:
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=160,
            vocab_size=256,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
    )
    if recipe is not None:
        convert_to_float8_training(model, recipe)
    return model


def uneven_documents() -> Callable[[int], dict[str, Tensor]]:
    """Rows of very different numbers of documents, and so of labels that count."""
    ends = np.cumsum([0, *[2] * 300, *[200] * 6, *[3] * 200])
    documents = Documents(TEXT[: ends[-1]], ends.astype(np.uint64))
    return packed_documents(documents, batch_size=4, seq_len=64, seed=0)


def chunked_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return causal_lm_loss(model, batch, chunk_from_vocab=1, chunk_tokens=128)


def loss_and_rows(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    return causal_lm_loss(model, batch), {"first_id": float(batch[:, 0].float().mean())}


def loss_that_breaks_on_the_last_rows(model: nn.Module, batch: Tensor) -> Tensor:
    """Of the piece that holds the last row of step 3 the embedding's gradient is not finite."""
    loss = causal_lm_loss(model, batch)
    if torch.equal(batch[-1], BATCH_AT(3)[-1]):  # the root's slope at 0 is infinite
        return loss + (model.get_input_embeddings()(batch).mean() * 0).abs().sqrt()
    return loss


RUNS: dict[str, Callable[[], TrainResult]] = {
    "not converted": lambda: train(tiny(recipe=None), BATCH_AT, causal_lm_loss, CONFIG),
    "plain": lambda: train(tiny(), BATCH_AT, causal_lm_loss, CONFIG),
    "tied": lambda: train(tiny(tied=True), BATCH_AT, causal_lm_loss, CONFIG),
    "chunked": lambda: train(tiny(), BATCH_AT, chunked_loss, CONFIG),
    "chunked-tied": lambda: train(tiny(tied=True), BATCH_AT, chunked_loss, CONFIG),
    "documents": lambda: train(tiny(), uneven_documents(), causal_lm_loss, CONFIG),
    "accumulated": lambda: train(
        tiny(), EIGHT_AT, causal_lm_loss, replace(CONFIG, accumulate=2, grad_clip=0.1)
    ),
    "float8-adamw": lambda: train(
        tiny(), BATCH_AT, causal_lm_loss, replace(CONFIG, optimizer="float8_adamw")
    ),
}


# -- what the two ranks do


def stops_after(asked: int) -> Callable[[], bool]:
    answers = iter([False] * asked)
    return lambda: next(answers, True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join()
    found: dict[str, Any] = {"size": ranks.size, "gathered": ranks.gather(ranks.rank)}
    for name, run in RUNS.items():
        found[name] = run().losses
    model = tiny()
    train(model, BATCH_AT, causal_lm_loss, CONFIG)
    if whole := full_state_dict(model):
        save_file({name: tensor.clone() for name, tensor in whole.items()}, folder / "whole.st")
    found["kept"] = ranks.gather(len(whole))
    found["progress"] = ranks.gather(seen_progress())
    found["skipped"] = ranks.gather(skip_one(folder / "skipped"))
    used = tiny()  # its layers have quantised their weights before others are loaded
    shard(used, ranks)
    with torch.no_grad():
        causal_lm_loss(used, BATCH_AT(0))
    found["resumed from one"] = train(
        used, BATCH_AT, causal_lm_loss, CONFIG, checkpoint_dir=folder / "one"
    ).losses
    # Only the last rank is asked to stop: both must. And both evaluate the model meanwhile.
    watched, stop = tiny(), stops_after(4 if ranks.rank == ranks.size - 1 else 100)

    def evaluate_and_ask() -> bool:
        with torch.no_grad():
            causal_lm_loss(watched, BATCH_AT(0))
        return stop()

    half = train(
        watched,
        BATCH_AT,
        causal_lm_loss,
        CONFIG,
        checkpoint_dir=folder / "two",
        should_stop=evaluate_and_ask,
    )
    found["stopped"] = ranks.gather([half.step, half.finished])
    eight_bits = replace(CONFIG, optimizer="float8_adamw")
    delayed = DelayedScaling(history=4, gemm="float32")
    found["8-bit moments, resumed"] = resumed_halfway(folder / "float8", eight_bits)
    found["delayed, resumed"] = resumed_halfway(folder / "delayed", CONFIG, delayed)
    found["delayed"] = train(tiny(recipe=delayed), BATCH_AT, causal_lm_loss, CONFIG).losses
    if ranks.first:
        (folder / "found.json").write_text(json.dumps(found))


def seen_progress() -> list[float]:
    seen: list[float] = []
    config = replace(CONFIG, steps=2, decay_steps=0, accumulate=2)
    train(
        tiny(),
        EIGHT_AT,
        loss_and_rows,
        config,
        on_progress=lambda p: seen.extend([p.metrics["first_id"], p.metrics["grad_norm"]]),
    )
    return seen


def skip_one(folder: Path) -> list[Any]:
    """The step that breaks is the last one before a checkpoint."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for asked in (4, 100):
            result = train(
                tiny(),
                BATCH_AT,
                loss_that_breaks_on_the_last_rows,
                CONFIG,
                checkpoint_dir=folder,
                should_stop=stops_after(asked),
            )
    messages = [str(w.message) for w in caught if "skipped" in str(w.message)]
    return [result.losses, result.skipped_steps, messages]


def resumed_halfway(folder: Path, config: TrainConfig, recipe: Recipe = BLOCK) -> list[float]:
    for asked in (4, 100):
        result = train(
            tiny(recipe=recipe),
            BATCH_AT,
            causal_lm_loss,
            config,
            checkpoint_dir=folder,
            should_stop=stops_after(asked),
        )
    return result.losses


# -- what must be true of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left; they went on from a checkpoint of one, which is made first."""
    folder = tmp_path_factory.mktemp("ranks")
    train(
        tiny(),
        BATCH_AT,
        causal_lm_loss,
        CONFIG,
        checkpoint_dir=folder / "one",
        should_stop=stops_after(4),
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "found.json").read_text()))


def equal(losses: list[float], wanted: list[float]) -> bool:
    """Other sums in fp32 end on another E4M3 code now and then: 1e-4. A stale weight is 1e-2."""
    return losses == pytest.approx(wanted, rel=1e-4, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RUNS if n != "float8-adamw"])
def test_two_ranks_lose_what_one_loses(found: dict[str, Any], name: str) -> None:
    alone = RUNS[name]().losses
    assert alone[-1] < 0.9 * alone[0]
    assert equal(found[name], alone)
    assert name != "not converted" or found[name] == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_eight_bit_moments_learn_on_two_ranks_too(found: dict[str, Any]) -> None:
    """Their groups are counted within a shard, so the codes are not quite those of one rank."""
    alone = RUNS["float8-adamw"]().losses
    assert found["float8-adamw"] == pytest.approx(alone, rel=2e-3)
    assert equal(found["float8-adamw"][:3], alone[:3])


@pytest.mark.slow
def test_ranks_know_of_each_other(found: dict[str, Any]) -> None:
    assert (found["size"], found["gathered"]) == (2, [0, 1])
    metrics, nothing = found["progress"]
    assert nothing == []  # progress is told on the first rank, and of the whole batch
    assert metrics == pytest.approx(seen_progress(), rel=1e-4)
    assert metrics[::2] == [float(EIGHT_AT(step)[:, 0].float().mean()) for step in range(2)]


@pytest.mark.slow
def test_the_whole_model_is_gathered_on_the_first_rank(folder: Path, found: dict[str, Any]) -> None:
    model = tiny()
    train(model, BATCH_AT, causal_lm_loss, CONFIG)
    wanted, whole = model.state_dict(), load_file(folder / "whole.st")
    assert found["kept"] == [len(wanted), 0]
    assert whole.keys() == wanted.keys()
    assert all(torch.allclose(whole[k], wanted[k], rtol=1e-3, atol=1e-5) for k in wanted)


@pytest.mark.slow
def test_a_step_that_breaks_on_one_rank_is_skipped_by_all(found: dict[str, Any]) -> None:
    with pytest.warns(RuntimeWarning, match="step 3 is skipped"):
        alone = train(tiny(), BATCH_AT, loss_that_breaks_on_the_last_rows, CONFIG)
    (losses, skipped, messages), other = found["skipped"]
    assert (losses, skipped) == (other[0], other[1])
    assert skipped == alone.skipped_steps == 1
    assert len(messages) == 1
    assert messages[0].startswith("step 3 is skipped: loss 4.8")
    assert messages[0].endswith("the gradient of model.embed_tokens.weight")
    assert other[2] == []
    assert equal(losses, alone.losses)


@pytest.mark.slow
def test_a_checkpoint_moves_between_one_rank_and_two(folder: Path, found: dict[str, Any]) -> None:
    straight = RUNS["plain"]().losses
    assert equal(found["resumed from one"], straight)
    assert found["stopped"] == [[4, False], [4, False]]
    assert checkpoints(folder / "two") == [folder / "two" / "step-4"]
    again = train(tiny(), BATCH_AT, causal_lm_loss, CONFIG, checkpoint_dir=folder / "two")
    assert equal(again.losses, straight)


@pytest.mark.slow
def test_what_a_rank_keeps_for_itself_is_resumed_too(folder: Path, found: dict[str, Any]) -> None:
    assert found["8-bit moments, resumed"] == found["float8-adamw"]
    # Each rank has a history of its own, and a checkpoint the largest of them.
    assert found["delayed, resumed"] == pytest.approx(found["delayed"], rel=1e-3)
    assert found["delayed, resumed"][:4] == found["delayed"][:4]
    config = replace(CONFIG, optimizer="float8_adamw", steps=9)
    with pytest.raises(CheckpointError, match=r"2 ranks, and this run has 1.*nproc-per-node 2"):
        train(tiny(), BATCH_AT, causal_lm_loss, config, checkpoint_dir=folder / "float8")


# -- with one process


def test_one_process_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() == Ranks()
    monkeypatch.setenv("WORLD_SIZE", "2")  # some schedulers set it; torchrun sets RANK as well
    monkeypatch.delenv("RANK", raising=False)
    ranks, model = join(), tiny()
    assert ranks == Ranks()
    shard(model, ranks)
    assert type(model) is LlamaForCausalLM
    assert call_inside(model, lambda m, x: (m, x), 3) == (model, 3)
    assert [ranks.any(True), ranks.any(False)] == [True, False]
    assert ranks.gather("here") == ["here"]
    assert float(ranks.sum(torch.ones(()))) == 1
    assert full_state_dict(model).keys() == model.state_dict().keys()


def test_a_model_is_sharded_by_its_decoder_layers() -> None:
    model = tiny()
    assert layers(model) == list(model.model.layers)
    plain = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2))
    assert layers(plain) == list(plain[0])
    assert layers(nn.Linear(2, 2)) == []


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device; load its weights"):
        shard(model, Ranks(0, 2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
