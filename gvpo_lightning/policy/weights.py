"""Weights: their names without what wrappers have put into them, and a checksum of their bits."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# what FSDP1, activation checkpointing and torch.compile put into the names of parameters
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def policy_name(key: str) -> str | None:
    """The name within the policy of a Lightning module's parameter or buffer; None for what is not the policy's."""
    first, _, rest = unwrapped_name(key).partition(".")
    return rest if first == "policy" and rest else None


def unwrapped_name(key: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


@torch.no_grad()
def fingerprint(weights: Iterable[Tensor]) -> str:
    """A checksum of the weights' bits, exact and independent of the order of summation within one of them."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    checksum = 0
    for index, weight in enumerate(weights):
        flat = weight.detach().contiguous().view(integers[weight.element_size()]).flatten()
        for part in flat.split(2**20):  # as 64-bit numbers a whole weight would be many times its size
            bits = part.to(torch.int64)
            checksum = (checksum + (index + 1) * int((bits * bits + bits).sum())) % 2**63
    return f"{checksum:016x}"


def frozen_fingerprint(policy: Any) -> str:
    """Of the weights beneath an adapter, as they are when first asked for: they never change."""
    found: str | None = getattr(policy, "frozen_fingerprint", None)
    if found is None:
        found = policy.frozen_fingerprint = fingerprint(p for p in policy.parameters() if not p.requires_grad)
    return found


def check_fingerprint(found: str | None, expected: str | None) -> None:
    """Raise ValueError where the reference at hand is not the one that a checkpoint was trained against.

    `expected` is None where the checkpoint was saved before any training.
    """
    if expected is not None and found != expected:
        raise ValueError(
            "The reference is not the one that this checkpoint was trained against (fingerprint "
            f"{found}, expected {expected}): its files, its dtype or `reference` have changed."
        )
