"""A round spec to start from: what a researcher would set first, each key with its reason.

What is not set stands there as a comment with its default, so that the file is the reference too.
"""

from collections.abc import Sequence
from typing import Final, Literal

Kind = Literal["logits", "weights", "pairs"]

_HEAD: Final = """\
# A round of cofuse. Check it before anybody is asked: cofuse round check FILE
# Every key there is, for an editor: cofuse schema round > round.schema.json
# yaml-language-server: $schema=round.schema.json
name: {name}
purpose: general         # participants' policies allow purposes by name
pivot: {pivot}           # the model to start from: cofuse pivot ls
participants: [{participants}]   # who is asked, by name; there is no "all"
"""
_LOGITS: Final = """
kind: logits             # each expert tells its log-probabilities on public text
method: unified          # one run learns from all; pairwise: one run an expert, then a merge
prompts: prompts.jsonl   # the public text, JSON lines of {"text": ...}
evals: evals.json        # held-out text and questions by domain; leave out to measure nothing
top_k: 16                # log-probabilities per position; policies limit it (k_max)
controls: [sft]          # the same text and steps without the experts, reported beside the pivot

# How the pivot learns from them; these are the defaults.
# loss: span_kl          # or p_kl, and as published: infifusion, infigfusion, uld, minced, gold
# apart: false           # true: short prompts, such as questions, are read each on its own
# routing: posterior     # whom to listen to, by position; or document, static, uniform
# distill_weight: 0.7    # share of the distillation loss; the rest is the text itself
# ship_share: 1.0        # below 1: only positions at which the expert beats the pivot most
# suspects: exclude      # who teaches what the text contradicts is left out; or report
# precision: fp32        # fp8: the pivot's linear layers in FP8 while it is fused
# grow: {steps: 200, lr: 0.001}   # participants train a copy of the pivot first, and ship its
"""
_WEIGHTS: Final = """
kind: weights            # each participant trains a copy of the pivot and ships what changed
method: merge
merge: task_arithmetic   # linear, ties, dare_ties, della, sce, model_stock, slerp, wudi, ...
evals: evals.json        # held-out text and questions by domain; leave out to measure nothing

# These are the defaults.
# outer:                 # diloco, fedavg, fedadam, ...: step over many rounds instead of one merge
# merge_weight:          # factor on the merged delta; the method's own when left out
# merge_density:         # share of a delta's entries kept, for merges that drop some
# rehearse: false        # copies read a public prompt set beside their text, and forget less
"""
_PAIRS: Final = """
kind: pairs              # each expert tells how likely it finds two answers, a number for each
method: preference       # the pivot learns which of the two to prefer
pairs: pairs.jsonl       # JSON lines of {"prompt": ..., "chosen": ..., "rejected": ...}
evals: evals.json        # held-out text and questions by domain; pairs held out are told anyway
controls: [dpo]          # the same pairs and steps without the experts, reported beside the pivot

# How the pivot learns from them; these are the defaults.
# preference:
#   held_out: 0.1        # share of the prompts whose pairs nobody learns from; they are measured
#   judge: given         # which answer is the better one: as the file says, or the experts
#   beta: 2.5            # how sharply a margin counts
#   fusion: max_margin   # the expert farthest from the pivot; or mean
#   length: pivot        # log-probabilities by token of the pivot; or own, none
# precision: fp32        # fp8: the pivot's linear layers in FP8 while it is fused
"""
_BODY: Final = {"logits": _LOGITS, "weights": _WEIGHTS, "pairs": _PAIRS}
_BATCH: Final = """\
  batch_size: 8          # sequences per step
  seq_len: 128           # tokens per sequence
"""
_TAIL: Final = """
training:                # {where}
  steps: 250
  lr: {lr:<18} # peak rate of AdamW
{batch}\
  # warmup_steps: 20
  # decay_share: 0.3     # last part of the steps, in which the rate decays

# quorum: {quorum}              # contributions that are enough at the end; default: everybody's
deadline_minutes: 60     # from submission to the end, fusing included
seed: 0
"""


def starting_spec(
    kind: Kind, *, name: str, pivot: str, participants: Sequence[str], quorum: int = 0
) -> str:
    """The text of a spec that `load_spec` reads.

    Args: quorum: the one that the comment shows; 0: all but one of the participants.
    """
    head = _HEAD.format(name=name, pivot=pivot, participants=", ".join(participants))
    where = "each participant's copy" if kind == "weights" else "the pivot, on the coordinator"
    shown = quorum or max(1, len(participants) - 1)
    batch = "  batch_size: 8          # pairs per step\n" if kind == "pairs" else _BATCH
    lr = "0.0001" if kind == "pairs" else "0.003"
    return head + _BODY[kind] + _TAIL.format(where=where, quorum=shown, batch=batch, lr=lr)
