"""GVPO's loss as functions of tensors; imports torch and triton and nothing of Lightning or transformers."""

from gvpo_kernels.fused_loss import FusedLoss, fused_gvpo_loss
from gvpo_kernels.group_loss import GroupLoss, group_loss
from gvpo_kernels.linear_logprob import linear_logprob
from gvpo_kernels.reference import (
    GroupStatistics,
    GVPOLoss,
    group_statistics,
    gvpo_loss,
    gvpo_loss_of_log_ratios,
    reward_statistics,
)

__all__ = [
    "FusedLoss",
    "GVPOLoss",
    "GroupLoss",
    "GroupStatistics",
    "fused_gvpo_loss",
    "group_loss",
    "group_statistics",
    "gvpo_loss",
    "gvpo_loss_of_log_ratios",
    "linear_logprob",
    "reward_statistics",
]
