"""Why a coordinator does not start is told with one remedy, and with the right one."""

import pytest

from coordinator.parts import told
from coordinator.store_errors import StoreError
from protos.config import ConfigError


def test_a_database_says_itself_what_is_to_be_done() -> None:
    with pytest.raises(ConfigError) as refused, told("store"):
        raise StoreError("it is led by another coordinator. Stop it first")
    assert str(refused.value) == "store: it is led by another coordinator. Stop it first"


def test_what_the_system_refuses_is_corrected_in_the_configuration() -> None:
    says = r"^listen: in use; correct it in coordinator\.toml$"
    with pytest.raises(ConfigError, match=says), told("listen"):
        raise OSError("in use")
