from itertools import pairwise

import numpy as np
import pytest

from fusion.alternatives import LEAST, ending_factors

EOS = 0
QUESTION = [[5, 6, 1, 2], [5, 6, 3, 4], [5, 6, 3, 7]]
"""Three endings of one beginning; two of them go on alike for a token."""


def laid(texts: list[list[int]]) -> np.ndarray:
    return np.array([EOS, *(token for text in texts for token in [*text, EOS])])


def factors(
    texts: list[list[int]], numbers: list[int], told: dict[tuple[int, int], float]
) -> list[list[float]]:
    """Factors by document; told: (document, token) -> the mixture's probability; else a half."""
    stream = laid(texts)
    ids = stream[1:, None].astype(np.int32)
    probs = np.full((len(ids), 1), 0.5, np.float32)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)])
    for (document, token), prob in told.items():
        probs[starts[document] + token] = prob
    weight = np.ones(len(ids), np.float32)
    found = ending_factors(stream, numbers, ids, probs, weight)
    return [found[a:b].tolist() for a, b in pairwise(starts)]


def test_up_to_where_alternatives_part_and_outside_of_them_nothing_changes() -> None:
    found = factors([*QUESTION, [5, 6, 8]], [0, 0, 0, -1], {(0, 2): 0.9})
    assert all(one[:3] == [1, 1, 1] for one in found)
    assert found[3] == [1, 1, 1, 1]


def test_an_ending_counts_by_what_the_experts_believe_and_all_together_count_as_before() -> None:
    found = factors(QUESTION, [0, 0, 0], {(0, 2): 0.9, (1, 2): 0.06, (2, 2): 0.04})
    assert [one[3] for one in found] == pytest.approx([2.7, 0.18, 0.12])
    assert [one[3] for one in found] == [one[4] for one in found]
    even = factors(QUESTION, [4, 4, 4], {})
    assert even == [pytest.approx([1.0] * 5)] * 3


def test_belief_is_of_the_whole_ending_not_of_where_it_begins() -> None:
    found = factors(QUESTION[:2], [0, 0], {(0, 2): 0.8, (1, 2): 0.2, (0, 3): 0.1})
    assert [one[3] for one in found] == pytest.approx([2 * 0.08 / 0.18, 2 * 0.1 / 0.18])


def test_questions_are_weighed_apart() -> None:
    texts = [*QUESTION[:2], [9, 1], [9, 2]]
    found = factors(texts, [0, 0, 1, 1], {(0, 2): 0.99, (1, 2): 0.01})
    assert found[2] == found[3] == pytest.approx([1, 1, 1])


def test_an_ending_that_nobody_names_is_unlikely_and_one_that_nobody_compared_is_no_evidence() -> (
    None
):
    stream = laid([[5, 1], [5, 2]])
    ids, probs = stream[1:, None].astype(np.int32), np.ones((6, 1), np.float32)
    ids[4] = -1
    named = ending_factors(stream, [0, 0], ids, probs, np.ones(6, np.float32))
    assert named[[2, 5]].tolist() == pytest.approx([2 / (1 + LEAST), 2 * LEAST / (1 + LEAST)])
    compared = np.array([1, 1, 1, 1, 0, 1], np.float32)
    assert ending_factors(stream, [0, 0], ids, probs, compared)[[2, 5]].tolist() == [1, 1]


def test_alternatives_of_another_prompt_set_are_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers for 3 prompts"):
        factors(QUESTION, [0, 0], {})
