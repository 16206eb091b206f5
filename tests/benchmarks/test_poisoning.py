import json
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.poison_attacks import ATTACKS
from benchmarks.poisoning import POISONER, main
from fusion.codec import check_logits, write_logits
from fusion.contribution import LogitContribution
from tests.fusion.test_suspicion import sincere


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_coordinators_check_passes_every_attack(attack: str, tmp_path: Path) -> None:
    """So that what stops it is the judgement, and not the codec."""
    honest = sincere(0, documents=6)
    poison = ATTACKS[attack](honest)
    assert (poison.topk_ids != honest.topk_ids).any() or (
        poison.topk_logprobs != honest.topk_logprobs
    ).any()
    texts = texts_of(honest)
    write_logits(tmp_path / "c", poison)
    check_logits(tmp_path / "c", prompts=texts, prompt_set_sha256="a" * 64, top_k=6)


def texts_of(honest: LogitContribution) -> list[str]:
    """The documents that a contribution was made of."""
    texts = []
    for start, stop in pairwise(honest.doc_offsets.tolist()):
        ids = honest.token_ids[start:stop]
        spelled = b"".join(
            honest.vocab_bytes[honest.vocab_offsets[i] : honest.vocab_offsets[i + 1]].tobytes()
            for i in ids
        )
        texts.append(spelled.decode())
    return texts


@pytest.mark.slow
def test_a_poisoner_is_named_and_the_pivot_is_as_good_as_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--attacks", "shuffle,trigger", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(worse <= 2 for worse in found["poisoning"].values())
    assert found["named"] == {"shuffle": [POISONER], "trigger": [POISONER], "honest": []}
