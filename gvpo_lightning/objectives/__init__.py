"""Objectives: a loss as a function, and how a run trains with it."""

from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.objectives.baselines import DPO, GRPO, SFT, PolicyGradient
from gvpo_lightning.objectives.gvpo import GVPO, AblatedGVPO, LengthScaledGVPO, gvpo_loss
from gvpo_lightning.objectives.settings import CLIPPING, ObjectiveSettings

__all__ = ["gvpo_loss", "make_objective"]


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
