"""Log-probs of recorded completions under a model, without gradient."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.data.batch import CompletionBatch, dropped_completion
from gvpo_lightning.distributed.ranks import rank_share
from gvpo_lightning.policy.head import Scoring, completion_logprobs


def score(
    model: PreTrainedModel, batch: CompletionBatch, scoring: Scoring, *, batch_size: int, num_parts: int | None = None
) -> Tensor:
    """(S, T) float32 log-probs of the whole batch under the model, `batch_size` completions at a time.

    Args:
        num_parts: forward passes to make, of equal sizes; ranks that share one model must make the same number.
    """
    num_parts = math.ceil(len(batch) / batch_size) if num_parts is None else num_parts
    # evaluation's inference tensors must not stay in what a sharded model has gathered: training would fail on them
    token_logprobs = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=batch.rewards.device)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        for number in range(num_parts):
            rows = torch.tensor(rank_share(len(batch), number, num_parts), dtype=torch.int64)
            part = batch.select(rows) if len(rows) else dropped_completion()
            values, _ = completion_logprobs(model, part.to(model.device), scoring)
            token_logprobs[rows, : values.shape[1]] = values[: len(rows)].to(token_logprobs)
    return token_logprobs


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside (gradient checkpointing would switch the key-value cache off), then as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
