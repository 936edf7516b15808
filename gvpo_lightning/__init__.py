"""GVPO (Group Variance Policy Optimization, arXiv 2504.19599) on PyTorch Lightning.

The public names are imported when they are first used: whoever needs the policy or the batch alone is not asked
for `datasets` and `jsonargparse`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo_lightning.datamodule import PromptDataModule as PromptDataModule
    from gvpo_lightning.module import GVPOModule as GVPOModule
    from gvpo_lightning.objectives.gvpo import gvpo_loss as gvpo_loss
    from gvpo_lightning.objectives.settings import ObjectiveSettings as ObjectiveSettings
    from gvpo_lightning.policy.loading import LoadingSettings as LoadingSettings
    from gvpo_lightning.reference.settings import ReferenceSettings as ReferenceSettings
    from gvpo_lightning.rewards.settings import RewardSettings as RewardSettings
    from gvpo_lightning.rollout.loader import RolloutLoader as RolloutLoader
    from gvpo_lightning.rollout.settings import GenerationSettings as GenerationSettings
    from gvpo_lightning.rollout.settings import RolloutSettings as RolloutSettings
    from gvpo_lightning.sources.settings import DemonstrationSettings as DemonstrationSettings
    from gvpo_lightning.sources.settings import FileSettings as FileSettings
    from gvpo_lightning.sources.settings import ReplaySettings as ReplaySettings
    from gvpo_lightning.sources.settings import SourceSettings as SourceSettings

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
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
