"""What a round asks of a model, and the file that answers just that and tells nothing else.

The file is written anew from the values that were read of the work's draft. What the values do not
decide (order, names, spaces, digests that somebody claims) is chosen or checked here. What leaves
is that file sealed: the fusion worker opens it, and whoever carries or stores it does not.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors import safe_open

from fusion.byte_tables import byte_table, encode, hash_tokenizer
from fusion.codec import LogitFile, check_asked, rewrite_logits
from fusion.contribution import ContributionError
from fusion.delta_file import rewrite_delta
from fusion.pair_file import PreferenceError, PreferencePair
from fusion.pair_scores import rewrite_scores
from fusion.pair_tokens import answer_tokens
from participant.budget import Question
from participant.pivots import WEIGHTS
from participant.policy import kind_of
from participant.sealer import Sealer
from protos.chunks import sha256_of
from protos.messages import Assignment
from protos.spec import RoundSpec
from trust.statements import Release

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN: Final = ".plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A round's question, once the public files that it is about are here."""

    question: Question
    texts: Sequence[str] = ()
    """The prompt set's documents; of pairs, each prompt with each of its answers."""
    pairs: Sequence[PreferencePair] = ()
    """Of a pairs round."""
    pivot: Path | None = None
    """Folder of the round's pivot (weights)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What the work made: a file in the outbox, and the folder of the model that it tells of."""

    path: Path
    model: Path


def question_of(
    assignment: Assignment,
    model: Path,
    texts: Sequence[str],
    pairs: Sequence[PreferencePair] = (),
) -> Question:
    """Say what a round asks.

    Args: model: folder of the model whose tokenizer reads the texts: the expert, or the pivot of
        which a copy is to be trained.
    """
    spec, kind = assignment.spec, kind_of(assignment.spec)
    asked = _to_be_trained(assignment) if spec.trains_locally else sha256_of(model / WEIGHTS)
    if kind == "weights":
        return Question(round_id=assignment.round_id, kind=kind, model=asked)
    assert assignment.public_set is not None
    tokenizer, vocab_size = _words_of(model)
    if kind == "pairs":
        positions = sum(map(sum, answer_tokens(tokenizer, pairs)))
    else:
        table = byte_table(tokenizer, vocab_size)
        positions = sum(len(encode(tokenizer, table, text)) + 1 for text in texts)  # 1: its eos
    return Question(
        round_id=assignment.round_id,
        kind=kind,
        model=asked,
        prompt_set=assignment.public_set.sha256,
        form=_form(spec),
        positions=positions,
    )


def seal(
    assignment: Assignment,
    asked: Asked,
    draft: Draft,
    out: Path,
    sealer: Sealer,
    *,
    scratch: Path,
    policy: str = "",
    inspect: Callable[[Path], None] = lambda _plain: None,
) -> None:
    """Write what may leave, if the draft is what was asked for; else nothing is left at `out`.

    Args: scratch: a folder that the courier cannot read; what is about to be sealed lies there in
        the clear. policy: sha256 of the one that allows it. inspect: has the last look at the file
        that is about to be sealed, and raises when it must not be.
    Raises: ContributionError, SealError, OSError; what inspect raises.
    """
    write = _WRITE[assignment.spec.kind]
    plain = scratch / f"{out.stem}{PLAIN}"
    try:
        write(assignment, asked, draft, plain)
        inspect(plain)
        sealer.seal(release_of(assignment, asked, plain, sealer.participant, policy), plain, out)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    finally:
        plain.unlink(missing_ok=True)


def release_of(
    assignment: Assignment, asked: Asked, plain: Path, participant: str, policy: str
) -> Release:
    """What is signed of a file: what it answers, for whom, and by which policy; not yet the key."""
    question = asked.question
    return Release(
        sha256=sha256_of(plain),
        round_id=assignment.round_id,
        participant=participant,
        kind=question.kind,
        size_bytes=plain.stat().st_size,
        submitted_by=assignment.submitted_by,
        model=question.model,
        prompt_set=question.prompt_set,
        positions=question.positions,
        policy_sha256=policy,
        key="0" * 64,
    )


def _write_delta(assignment: Assignment, asked: Asked, draft: Draft, out: Path) -> None:
    assert asked.pivot is not None
    with safe_open(asked.pivot / WEIGHTS, framework="numpy") as file:
        names = list(file.keys())  # the file object itself has no order that it promises
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    header = rewrite_delta(draft.path, out, pivot_sha256=assignment.pivot_sha256, shapes=shapes)
    training = assignment.spec.training
    tokens = training.steps * training.batch_size * training.seq_len
    _same("steps and tokens", (header.steps, header.tokens), (training.steps, tokens))


def _write_logits(assignment: Assignment, asked: Asked, draft: Draft, out: Path) -> None:
    spec = assignment.spec
    assert assignment.prompts is not None
    header = rewrite_logits(
        draft.path,
        out,
        prompts=asked.texts,
        prompt_set_sha256=assignment.prompts.sha256,
        top_k=spec.top_k,
    )
    check_asked(
        header,
        sampler=spec.sampler,
        draws=spec.draws,
        share=spec.ship_share,
        pivot_sha256=assignment.pivot_sha256,
    )
    tokenizer, vocab_size = _words_of(draft.model)
    pieces = byte_table(tokenizer, vocab_size).pieces
    vocabulary, _ = LogitFile(draft.path, asked.texts).vocabulary
    _same("positions", header.positions, asked.question.positions)
    _same("model_sha256", header.model_sha256, sha256_of(draft.model / WEIGHTS))
    _same("tokenizer_sha256", header.tokenizer_sha256, hash_tokenizer(tokenizer))
    _same("the vocabulary", vocabulary.tobytes(), b"".join(pieces))


def _write_pairs(assignment: Assignment, asked: Asked, draft: Draft, out: Path) -> None:
    tokenizer, _ = _words_of(draft.model)
    try:
        rewrite_scores(
            draft.path,
            out,
            asked.pairs,
            model_sha256=sha256_of(draft.model / WEIGHTS),
            tokens=answer_tokens(tokenizer, asked.pairs),
        )
    except PreferenceError as error:
        raise ContributionError("malformed", str(error)) from error


_WRITE: Final = {"logits": _write_logits, "weights": _write_delta, "pairs": _write_pairs}


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ContributionError(
            "malformed", f"{what} of the draft are not those of what was asked: make it again"
        )


def _words_of(model: Path) -> "tuple[PreTrainedTokenizerFast, int]":
    """A model's tokenizer, and the size of the vocabulary that its logits have."""
    from transformers import PreTrainedTokenizerFast  # here: a guard attends without it

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, local_files_only=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return tokenizer, int(config["vocab_size"])


def _to_be_trained(assignment: Assignment) -> str:
    """Name a copy of the pivot before it is there: by the pivot and by how it is to be trained."""
    spec = assignment.spec
    how = (spec.grow or spec.training).model_dump_json()
    said = [assignment.pivot_sha256, how, spec.seed, spec.rehearse and spec.prompts]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _form(spec: RoundSpec) -> str:
    """How the answer is cut. ship_share chooses rows, and changes nothing in them."""
    if spec.kind == "pairs":
        return spec.kind
    drawn = f" {spec.draws} {spec.seed}" if spec.sampler == "samples" else ""
    return f"{spec.sampler} {spec.top_k}{drawn}"
