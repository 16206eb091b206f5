import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fusion.codec import write_logits
from fusion.contribution import ContributionError
from fusion.delta_file import check_delta, read_delta, rewrite_delta, write_delta
from fusion.tensor_file import TensorFile
from tests.fusion.factories import SHA, build

SHAPES: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (3,), "scale": ()}


def delta() -> dict[str, np.ndarray]:
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, np.float32),
        "scale": np.asarray(7, np.float32),
    }


def test_a_delta_comes_back_as_it_was_and_any_reader_of_safetensors_reads_it(
    tmp_path: Path,
) -> None:
    write_delta(tmp_path / "d", delta(), pivot_sha256=SHA, steps=7, tokens=70)
    header = check_delta(tmp_path / "d", pivot_sha256=SHA, shapes=SHAPES)
    again, arrays = read_delta(tmp_path / "d")
    assert header == again
    assert (header.steps, header.tokens) == (7, 70)
    assert arrays.keys() == delta().keys()
    for found in (arrays, load_file(tmp_path / "d")):
        for name, values in delta().items():
            assert found[name].shape == values.shape
            assert np.array_equal(found[name], values)
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("missing_tensor", {"b": None}),
        ("unknown_tensor", {"x": np.ones(3, np.float32)}),
        ("wrong_shape", {"b": np.ones(4, np.float32)}),
        ("wrong_shape", {"b": np.ones(3, np.float16)}),
        ("not_finite", {"b": np.full(3, np.nan, np.float32)}),
        ("not_finite", {"w": np.full((2, 3), np.inf, np.float32)}),
    ],
)
def test_a_delta_that_does_not_fit_the_pivot_is_refused(
    tmp_path: Path, code: str, change: dict[str, Any]
) -> None:
    arrays = {n: v for n, v in (delta() | change).items() if v is not None}
    write_delta(tmp_path / "d", arrays, pivot_sha256=SHA, steps=1, tokens=1)
    with pytest.raises(ContributionError) as caught:
        check_delta(tmp_path / "d", pivot_sha256=SHA, shapes=SHAPES)
    assert caught.value.code == code


def test_a_delta_from_another_pivot_and_a_logits_file_are_no_delta_of_this_round(
    tmp_path: Path,
) -> None:
    write_delta(tmp_path / "d", delta(), pivot_sha256="e" * 64, steps=1, tokens=1)
    write_logits(tmp_path / "c", build([[b"a"]], [b"", b"a"], top_k=1)[0])
    for name, code in (("d", "wrong_pivot"), ("c", "malformed")):
        with pytest.raises(ContributionError) as caught:
            check_delta(tmp_path / name, pivot_sha256=SHA, shapes=SHAPES)
        assert caught.value.code == code


def test_one_tensor_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory: no tensor is still held when the next one is read."""
    write_delta(tmp_path / "d", delta(), pivot_sha256=SHA, steps=1, tokens=1)
    whole, alive, most = TensorFile.rows, [0], [0]

    class Held(np.ndarray):
        def __del__(self) -> None:
            alive[0] -= self.base is not None and not isinstance(self.base, Held)

    def rows(self: Any, *args: Any) -> Any:
        found = whole(self, *args).view(Held)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return found

    monkeypatch.setattr(TensorFile, "rows", rows)
    check_delta(tmp_path / "d", pivot_sha256=SHA, shapes=SHAPES)
    assert most == [1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_as_a_contribution_error_or_is_finite_numbers(
    tmp_path: Path, data: st.DataObject
) -> None:
    write_delta(tmp_path / "d", delta(), pivot_sha256=SHA, steps=1, tokens=1)
    raw = bytearray((tmp_path / "d").read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "d").write_bytes(bytes(raw))
    with suppress(ContributionError):
        check_delta(tmp_path / "d", pivot_sha256=SHA, shapes=SHAPES)
        _, arrays = read_delta(tmp_path / "d")
        assert {name: values.shape for name, values in arrays.items()} == SHAPES
        assert all(np.isfinite(values).all() for values in arrays.values())


def test_a_rewritten_delta_has_the_same_values_and_no_order_of_its_own(tmp_path: Path) -> None:
    made = []
    for order in (list(SHAPES), list(reversed(SHAPES))):
        write_delta(
            tmp_path / "d", {n: delta()[n] for n in order}, pivot_sha256=SHA, steps=7, tokens=70
        )
        header = rewrite_delta(tmp_path / "d", tmp_path / "r", pivot_sha256=SHA, shapes=SHAPES)
        assert (header.steps, header.tokens) == (7, 70)
        made.append((tmp_path / "r").read_bytes())
    assert made[0] == made[1]
    for name, values in read_delta(tmp_path / "r")[1].items():
        assert np.array_equal(values, delta()[name])


def test_a_delta_that_would_be_refused_is_not_rewritten(tmp_path: Path) -> None:
    bad = delta() | {"w": np.full((2, 3), np.nan, np.float32)}
    write_delta(tmp_path / "d", bad, pivot_sha256=SHA, steps=1, tokens=1)
    with pytest.raises(ContributionError):
        rewrite_delta(tmp_path / "d", tmp_path / "r", pivot_sha256=SHA, shapes=SHAPES)
    assert os.listdir(tmp_path) == ["d"]
