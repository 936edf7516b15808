"""GVPO's loss as functions of tensors; imports torch and triton and nothing of Lightning or transformers."""

from gvpo_kernels.group_loss import GroupLoss, group_loss
from gvpo_kernels.linear_logprob import linear_logprob
from gvpo_kernels.reference import (
    GroupStatistics,
    GVPOLoss,
    group_statistics,
    gvpo_loss,
)

__all__ = [
    "GVPOLoss",
    "GroupLoss",
    "GroupStatistics",
    "group_loss",
    "group_statistics",
    "gvpo_loss",
    "linear_logprob",
]
