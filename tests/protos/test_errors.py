"""Every refusal has an id, a status and a remedy."""

import grpc
import pytest

from protos.errors import CATALOGUE, CofuseError


@pytest.mark.parametrize("error_id", CATALOGUE)
def test_every_error_says_what_to_do(error_id: str) -> None:
    entry = CATALOGUE[error_id]
    assert entry.status is not grpc.StatusCode.OK
    assert entry.do
    assert not entry.do.endswith(".")
    assert entry.do in str(CofuseError(error_id, "found this, wanted that"))
