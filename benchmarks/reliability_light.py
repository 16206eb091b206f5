"""A participant without a model: certificate, beats and engine are real, its logits are dice.

What it does when it is summoned is what the daemon and its SuperNode do, but in a thread: a
thousand of them fit into one process.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.reliability_visit import Visit
from fusion.codec import write_logits
from fusion.contribution import CODEC_VERSION, LogitContribution, LogitHeader
from participant.client import Client
from participant.sealer import RELEASE_KEY, Sealer
from protos.chunks import sha256_of
from protos.messages import Assignment, Report
from protos.public_sets import read_prompts
from protos.tls import TlsFiles
from trust.seal_keys import RECIPIENT_FILE
from trust.statements import Release

POLL_S: Final = 1.0
EOS: Final = 256
"""The vocabulary is the 256 bytes and one empty eos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Name, folder and PEM files of one participant."""

    name: str
    home: Path

    @property
    def tls(self) -> TlsFiles:
        """Its certificate and key, and the authority's."""
        return TlsFiles(
            ca=self.home / "ca.pem",
            certificate=self.home / "certificate.pem",
            key=self.home / "key.pem",
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """A promise that the coordinator gave."""

    round_id: str
    participant: str
    sha256: str


def serve(
    identity: Identity,
    coordinator: str,
    engine: str,
    *,
    working: Callable[[Sequence[str]], None],
    taken: Callable[[Taken], None],
    dismissed: threading.Event,
) -> int:
    """Answer what the engine brings until dismissed.

    Args: working: told which rounds are in hand, for the next beat. taken: told every receipt.
    Returns: how many calls of the engine had to be repeated.
    """
    with Visit(engine, identity.tls) as visit:
        while not dismissed.is_set():
            given = visit.take()
            if given is None:
                dismissed.wait(POLL_S)
                continue
            message, payload = given
            assignment = Assignment.model_validate_json(payload)
            working([assignment.round_id])
            receipt = contribute(identity, coordinator, assignment)
            taken(receipt)
            report = Report(
                round_id=assignment.round_id,
                attempt=assignment.attempt,
                status="committed",
                sha256=receipt.sha256,
                architecture="llama",
                vocabulary=EOS + 1,
            )
            visit.answer(message, report.model_dump_json())
            working([])
    return visit.retries


def contribute(identity: Identity, coordinator: str, assignment: Assignment) -> Taken:
    """Make a contribution, ship it, and have it counted."""
    assert assignment.prompts is not None
    with _client(coordinator, identity.tls) as client:
        prompts = client.fetch(assignment.prompts, identity.home / assignment.round_id)
        path = prompts.with_name("logits.sealed")
        if not path.exists():
            plain = prompts.with_name("logits.safetensors")
            write_logits(plain, dice(read_prompts(prompts), assignment, identity.name))
            _seal(identity, assignment, plain, path)
        digest = sha256_of(path)
        client.put(path, digest)
        receipt = client.commit(assignment.round_id, digest, path.stat().st_size)
    return Taken(receipt.round_id, receipt.participant, receipt.sha256)


def _seal(identity: Identity, assignment: Assignment, plain: Path, out: Path) -> None:
    """Sign and seal as a guard does; `out` appears whole."""
    home, model = identity.home, hashlib.sha256(identity.name.encode()).hexdigest()
    release = Release(
        sha256=sha256_of(plain),
        round_id=assignment.round_id,
        participant=identity.name,
        kind="logits",
        size_bytes=plain.stat().st_size,
        submitted_by=assignment.submitted_by,
        model=model,
        prompt_set="",
        positions=0,
        policy_sha256="",
        key="0" * 64,
    )
    draft = out.with_suffix(".draft")
    sealer = Sealer.at(identity.name, home / RECIPIENT_FILE, home / RELEASE_KEY)
    sealer.seal(release, plain, draft)
    draft.rename(out)


@contextmanager
def _client(coordinator: str, tls: TlsFiles) -> Iterator[Client]:
    client = Client(coordinator, tls)
    try:
        yield client
    finally:
        client.close()


def dice(texts: Sequence[str], assignment: Assignment, name: str) -> LogitContribution:
    """A valid contribution to a round of whole top-K rows: bytes as tokens, chances by dice.

    P = positions, V = vocabulary.
    """
    assert assignment.prompts is not None
    documents = [text.encode() for text in texts]
    ids = np.asarray([one for text in documents for one in (*text, EOS)], np.int32)
    lengths = [len(text) + 1 for text in documents]
    ends = np.concatenate([[*range(1, n), n - 1] for n in lengths]).astype(np.int32)
    seed = hashlib.sha256(name.encode())
    generator = np.random.default_rng(int(seed.hexdigest()[:8], 16))
    raw_PV = generator.normal(size=(len(ids), EOS + 1))
    logprobs_PV = raw_PV - np.log(np.exp(raw_PV).sum(-1, keepdims=True))
    order_PV = np.argsort(-logprobs_PV, axis=-1)
    kept = order_PV[:, : assignment.spec.top_k]
    rest = np.take_along_axis(logprobs_PV, order_PV[:, assignment.spec.top_k :], -1)
    pieces = [1] * EOS + [0]
    return LogitContribution(
        header=LogitHeader(
            codec_version=CODEC_VERSION,
            prompt_set_sha256=assignment.prompts.sha256,
            tokenizer_sha256="0" * 64,
            model_sha256=seed.hexdigest(),
            pivot_sha256="",
            sampler="top_k",
            draws=0,
            vocab_size=EOS + 1,
            top_k=assignment.spec.top_k,
            documents=len(documents),
            positions=len(ids),
            shipped=len(ids),
            eos_id=EOS,
            prefix_bytes=0,
        ),
        doc_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=ids,
        byte_ends=ends,
        own_logprob=logprobs_PV[np.arange(len(ids)), ids].astype(np.float32),
        topk_ids=kept.astype(np.int32),
        topk_logprobs=np.take_along_axis(logprobs_PV, kept, -1).astype(np.float32),
        tail_logprob=np.log(np.exp(rest).sum(-1)).astype(np.float32),
        vocab_bytes=np.arange(EOS, dtype=np.uint8),
        vocab_offsets=np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64),
    )
