"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) on PyTorch Lightning."""

from gvpo_lightning.data import PromptDataModule
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.objectives import gvpo_loss
from gvpo_lightning.rollout.generation import GenerationSettings
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.sampling import RolloutSettings

__all__ = [
    "GVPOModule",
    "GenerationSettings",
    "PromptDataModule",
    "RolloutLoader",
    "RolloutSettings",
    "gvpo_loss",
]
