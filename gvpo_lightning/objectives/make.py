"""The objective of a run's settings."""

from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.objectives.dpo import DPO
from gvpo_lightning.objectives.grpo import GRPO
from gvpo_lightning.objectives.gvpo import GVPO, AblatedGVPO, LengthScaledGVPO
from gvpo_lightning.objectives.policy_gradient import PolicyGradient
from gvpo_lightning.objectives.settings import CLIPPING, ObjectiveSettings
from gvpo_lightning.objectives.sft import SFT


def make_objective(settings: ObjectiveSettings, beta: float, max_completion_tokens: int) -> Objective:
    """The objective of these settings.

    Raises:
        ValueError: a beta that it can't be trained with.
    """
    can_be_zero = settings.kind in (*CLIPPING, "sft")
    if not (beta > 0 or (beta == 0 and can_be_zero)):
        raise ValueError(f"beta must be > 0{' or 0, without a pull,' if can_be_zero else ''}, got {beta}.")
    kinds: dict[str, type[Objective]] = {
        "gvpo": GVPO,
        "grpo": GRPO,
        "dr_grpo": GRPO,
        "policy_gradient": PolicyGradient,
        "dpo": DPO,
        "sft": SFT,
    }
    kind = kinds[settings.kind]
    if not settings.is_whole:
        kind = AblatedGVPO
    elif settings.length_exponent:
        kind = LengthScaledGVPO
    return kind(settings, beta, max_completion_tokens)
