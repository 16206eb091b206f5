"""A count of everything that may have changed weights without counting up their versions.

torch's fused optimizers and FSDP2 change weights behind a parameter's version, and a cache that
trusts the version alone would go on with the weights of before.
"""

import itertools
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_count = itertools.count(1)
_epoch = 0


def weight_epoch() -> int:
    """Return a number that changes with every optimizer step of this process."""
    return _epoch


def invalidate_weight_caches() -> None:
    """Have every layer quantise its weight anew; after writing weights in an unusual way."""
    global _epoch
    _epoch = next(_count)


def _after_step(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    invalidate_weight_caches()


register_optimizer_step_post_hook(_after_step)
