"""The bounds hold for every field of a message, by its descriptor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.bounds import MAX_INTEGER, MAX_ITEMS, MAX_JSON_CHARS, MAX_TEXT_CHARS, check_bounds
from protos.errors import CofuseError
from protos.v1 import research_pb2, transfer_pb2


@given(st.text(max_size=2 * MAX_TEXT_CHARS))
def test_a_text_passes_if_it_is_short_and_printable(text: str) -> None:
    request = research_pb2.RoundRequest(round_id=text.encode("utf-8", "replace").decode())
    fine = len(request.round_id) <= MAX_TEXT_CHARS and request.round_id.isprintable()
    if fine:
        check_bounds(request)
    else:
        with pytest.raises(CofuseError, match="round_id: found") as caught:
            check_bounds(request)
        assert caught.value.says.isprintable()
        assert len(caught.value.says) < 200


def test_json_may_be_long_and_have_lines_but_no_other_controls() -> None:
    check_bounds(research_pb2.SubmitRoundRequest(spec_json="{\r\n\t}" + " " * 1000))
    for bad in (" " * (MAX_JSON_CHARS + 1), "{\x00}", "{\x1b}"):
        with pytest.raises(CofuseError, match="spec_json: found"):
            check_bounds(research_pb2.SubmitRoundRequest(spec_json=bad))


@pytest.mark.parametrize(
    ("message", "place"),
    [
        (research_pb2.WatchRoundRequest(after_seq=MAX_INTEGER + 1), "after_seq"),
        (
            transfer_pb2.PutRequest(header=transfer_pb2.PutHeader(kind=99)),  # type: ignore[arg-type]
            "header.kind",
        ),
        (
            research_pb2.Pivot(files=[research_pb2.PivotFile(), research_pb2.PivotFile(name="\n")]),
            "files[1].name",
        ),
        (
            research_pb2.Pivot(files=[research_pb2.PivotFile()] * (MAX_ITEMS + 1)),
            "files",
        ),
    ],
)
def test_the_refusal_names_the_field(message: object, place: str) -> None:
    with pytest.raises(CofuseError) as caught:
        check_bounds(message)  # type: ignore[arg-type]
    assert caught.value.error_id == "bad_request"
    assert caught.value.says.startswith(f"{place}: found ")


def test_the_largest_of_everything_passes() -> None:
    check_bounds(research_pb2.WatchRoundRequest(round_id="x" * 256, after_seq=MAX_INTEGER))
    check_bounds(research_pb2.Pivot(files=[research_pb2.PivotFile()] * MAX_ITEMS))
    check_bounds(transfer_pb2.PutRequest(chunk=transfer_pb2.Chunk(data=bytes(4 * 2**20))))
