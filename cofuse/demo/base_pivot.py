"""Makes pivot-0: `python -m cofuse.demo.base_pivot JOB.json`, a process of its own.

The consortium's public start: a small model with its own tokenizer, pre-trained on public text of
other specialties.
"""

import json
import sys
from pathlib import Path

import torch

from fp8.convert import convert_to_float8_training
from fp8.recipe import BlockScaling
from fp8.train import Progress, TrainConfig, causal_lm_loss, packed_batches, train
from fusion.models import ModelSpec, build_model, encode_documents, save_model, train_tokenizer
from protos.process import die_with_parent
from protos.public_sets import read_prompts


def main(argv: list[str]) -> int:
    """Train and save the model of a job file: general, prompts, model, training, seed, out."""
    die_with_parent()
    torch.set_num_threads(1)
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    general, public = (read_prompts(Path(job[name])) for name in ("general", "prompts"))
    # The tokenizer may know the public text's spelling; the weights have not seen it.
    tokenizer = train_tokenizer([*general, *public], job["model"]["vocab_size"])
    model = build_model(ModelSpec(**{**job["model"], "vocab_size": len(tokenizer)}), job["seed"])
    convert_to_float8_training(model, BlockScaling())
    training = dict(job["training"])
    batches = packed_batches(
        encode_documents(tokenizer, general),
        batch_size=training.pop("batch_size"),
        seq_len=training.pop("seq_len"),
        seed=job["seed"],
    )

    def tell(progress: Progress) -> None:
        body = {"step": progress.step, "steps": progress.steps, "loss": progress.loss}
        sys.stdout.write(json.dumps({"kind": "train", **body}) + "\n")
        sys.stdout.flush()

    result = train(
        model, batches, causal_lm_loss, TrainConfig(seed=job["seed"], **training), on_progress=tell
    )
    save_model(model, tokenizer, Path(job["out"]))
    sys.stdout.write(json.dumps({"kind": "trained", "losses": result.losses}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
