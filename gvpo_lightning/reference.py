"""The reference, what the implicit reward is measured against: a frozen copy or the previous policy.

`frozen` (the default) keeps a second model. `previous` keeps none: it is the policy at the start of each
rollout, so its log-probs are taken from the policy itself, before the first update on that rollout.
"""

import copy
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.policy import completion_logprobs
from gvpo_lightning.rollout.generation import evaluating

ReferenceKind = Literal["frozen", "previous"]


def check_reference_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind of reference."""
    if kind not in get_args(ReferenceKind):
        raise ValueError(f"reference must be one of {get_args(ReferenceKind)}, got {kind!r}.")


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy that no optimizer touches, in evaluation mode."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


@torch.no_grad()
def score(model: PreTrainedModel, batch: CompletionBatch, *, temperature: float, batch_size: int) -> Tensor:
    """(S, T) float32 log-probs of the whole batch under the model, `batch_size` completions at a time."""
    token_logprobs = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=batch.rewards.device)
    with evaluating(model):
        for rows in torch.arange(len(batch), device=batch.rewards.device).split(batch_size):
            part = batch.select(rows)
            values, _ = completion_logprobs(model, part, temperature=temperature)
            token_logprobs[rows, : values.shape[1]] = values.float()
    return token_logprobs


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """A checksum of the weights' bits, exact and independent of the order of summation."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    checksum = 0
    for index, parameter in enumerate(model.parameters()):
        bits = parameter.detach().contiguous().view(integers[parameter.element_size()]).to(torch.int64)
        checksum = (checksum + (index + 1) * int((bits * bits + bits).sum())) % 2**63
    return f"{checksum:016x}"
