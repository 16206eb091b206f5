"""Numbers in as few bits as they need: ids of a vocabulary, and log-probabilities in a byte.

A log-probability is -code/16 nats, so codes 0..254 are off by at most 1/32 nat, and 255 says "at
most -15.94", below one in eight million. Shapes: R = rows, K = ids of a row.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

STEPS_PER_NAT: Final = 16
LAST_CODE: Final = 255
MAX_ERROR: Final = 0.5 / STEPS_PER_NAT
"""Nats by which a log-probability above the last code's is off at most."""


def bits_for(vocab_size: int) -> int:
    """Return ceil(log2 vocab_size): what one id takes; at least 1."""
    return max(1, (vocab_size - 1).bit_length())


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of one row of packed ids; a row starts on a byte of its own."""
    return -(-columns * bits // 8)


def pack(ids_RK: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Write ids of `bits` bits (1..32) one after the other, lowest bit first, zeros to the end.

    Returns: [R, row_bytes(K, bits)].
    Raises: ValueError when an id does not fit.
    """
    rows, columns = ids_RK.shape
    if ids_RK.size and not (ids_RK.min() >= 0 and int(ids_RK.max()) >> bits == 0):
        raise ValueError(
            f"ids {ids_RK.min()}..{ids_RK.max()} do not fit {bits} bits; pack ids of one vocabulary"
        )
    octets = np.ascontiguousarray(ids_RK, dtype="<u4").view(np.uint8).reshape(rows, columns, 4)
    flat = np.unpackbits(octets, axis=-1, count=bits, bitorder="little")
    return np.packbits(flat.reshape(rows, columns * bits), axis=-1, bitorder="little")


def unpack(packed: NDArray[np.uint8], columns: int, bits: int) -> NDArray[np.int32]:
    """Undo pack. Returns: [R, columns]."""
    rows = len(packed)
    flat = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
    octets = np.packbits(flat.reshape(rows, columns, bits), axis=-1, bitorder="little")
    whole = np.zeros((rows, columns, 4), np.uint8)
    whole[:, :, : octets.shape[-1]] = octets
    return whole.view("<u4")[:, :, 0].astype(np.int32)


def spare_bits(packed: NDArray[np.uint8], columns: int, bits: int) -> bool:
    """Tell whether a bit is set behind some row's last id, where pack writes zeros."""
    used = columns * bits % 8
    return bool(used) and bool((packed[:, -1] >> used).any())


def encode_logprobs(logprobs: NDArray[Any]) -> NDArray[np.uint8]:
    """Round log-probabilities to sixteenths of a nat, one byte each."""
    codes = np.clip(np.rint(logprobs * -STEPS_PER_NAT), 0, LAST_CODE)
    return np.asarray(codes, dtype=np.uint8)


def decode_logprobs(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Undo encode_logprobs."""
    return codes.astype(np.float32) * np.float32(-1 / STEPS_PER_NAT)
