"""Randomness as a function of what it is for: nothing to save, nothing that another draw can shift."""

import hashlib
import os

import torch


def run_seed() -> int:
    """The run's seed, as set by `lightning.seed_everything`; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive_seed(*purpose: int | str) -> int:
    """A 56-bit seed from the run's seed and what it is used for, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=7).digest(), "big")


def seeded_permutation(length: int, *purpose: int | str) -> list[int]:
    """A permutation of range(length) that depends on `purpose` alone."""
    generator = torch.Generator().manual_seed(derive_seed(*purpose))
    return torch.randperm(length, generator=generator).tolist()
