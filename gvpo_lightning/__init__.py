"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) on PyTorch Lightning.

The public names are imported when they are first used: whoever needs the policy or the batch alone is not asked
for `datasets` and `jsonargparse`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo_lightning.datamodule import PromptDataModule
    from gvpo_lightning.module import GVPOModule
    from gvpo_lightning.objectives.gvpo import gvpo_loss
    from gvpo_lightning.objectives.settings import ObjectiveSettings
    from gvpo_lightning.policy.loading import LoadingSettings
    from gvpo_lightning.reference.settings import ReferenceSettings
    from gvpo_lightning.rewards.settings import RewardSettings
    from gvpo_lightning.rollout.loader import RolloutLoader
    from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
    from gvpo_lightning.sources.settings import (
        DemonstrationSettings,
        FileSettings,
        ReplaySettings,
        SourceSettings,
    )

__all__ = [
    "DemonstrationSettings",
    "FileSettings",
    "GVPOModule",
    "GenerationSettings",
    "LoadingSettings",
    "ObjectiveSettings",
    "PromptDataModule",
    "ReferenceSettings",
    "ReplaySettings",
    "RewardSettings",
    "RolloutLoader",
    "RolloutSettings",
    "SourceSettings",
    "gvpo_loss",
]

_HOMES = {
    "DemonstrationSettings": "sources.settings",
    "FileSettings": "sources.settings",
    "ReferenceSettings": "reference.settings",
    "ReplaySettings": "sources.settings",
    "RewardSettings": "rewards.settings",
    "SourceSettings": "sources.settings",
    "GVPOModule": "module",
    "LoadingSettings": "policy.loading",
    "ObjectiveSettings": "objectives.settings",
    "GenerationSettings": "rollout.settings",
    "PromptDataModule": "datamodule",
    "RolloutLoader": "rollout.loader",
    "RolloutSettings": "rollout.settings",
    "gvpo_loss": "objectives.gvpo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
