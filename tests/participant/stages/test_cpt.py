import json
from pathlib import Path

import pytest

from fusion.models import ModelSpec, build_model, load_model, save_model, train_tokenizer
from participant.config import ModelConfig, TrainingConfig
from participant.corpus import CorpusError
from participant.stages.cpt import Expert, adapt_pivot
from protos.spec import TrainingSpec

TEXT = "the quick brown fox jumps over the lazy dog, and she sells sea shells.\n"


def test_a_local_run_with_a_larger_proximal_mu_ends_nearer_the_pivot(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 260)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, tmp_path / "pivot")
    (tmp_path / "corpus").write_text(json.dumps({"text": TEXT * 20}))
    before = dict(load_model(tmp_path / "pivot")[0].named_parameters())

    def moved(mu: float, steps: int) -> float:
        training = TrainingSpec(
            steps=steps, lr=1e-2, warmup_steps=1, batch_size=2, seq_len=16, proximal_mu=mu
        )
        model, _, result = adapt_pivot(
            tmp_path / "pivot",
            tmp_path / "corpus",
            training,
            0,
            checkpoint_dir=tmp_path / f"checkpoint-{mu}",
            on_progress=lambda _: None,
            should_stop=lambda: False,
        )
        assert result.finished
        parameters = model.named_parameters()
        return float(sum((p - before[n]).detach().square().sum() for n, p in parameters))

    free, held = moved(0.0, 6), moved(30.0, 6)
    assert held < free / 2
    # Resumed from its checkpoint, it is still held to the pivot, not to where it had got.
    assert moved(30.0, 12) < free / 2


def test_a_corpus_of_less_than_a_window_is_told_of_in_words(tmp_path: Path) -> None:
    corpus = tmp_path / "notes.jsonl"
    corpus.write_text('{"text": "Mitral stenosis."}\n', encoding="utf-8")
    model = ModelConfig(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300)
    expert = Expert(tmp_path / "expert", corpus, model)
    with pytest.raises(CorpusError, match=r"too small.* wanted at least 129; add text or lower"):
        expert.pretrain(TrainingConfig(steps=1), on_progress=lambda _: None, should_stop=bool)
