"""Which objective a run trains."""

from dataclasses import dataclass
from typing import Literal, get_args

ObjectiveKind = Literal["gvpo", "grpo", "dr_grpo", "policy_gradient", "dpo", "sft"]
CLIPPING = ("grpo", "dr_grpo", "policy_gradient")


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised; docs/objectives.md has the formulas.

    Attributes:
        kind: "gvpo"; or what it is compared with, on the same rollouts: "grpo", "dr_grpo", "policy_gradient" (a KL
            penalty in the reward and a leave-one-out baseline), "dpo" (all pairs of a group), "sft" (likelihood,
            weighted with the reward).
        clip: for "grpo", "dr_grpo" and "policy_gradient": ratios to the sampling-time policy count within 1 +- clip.
        variance_term, covariance_term: for "gvpo", False leaves that regulariser out: an ablation, which diverges.
        length_exponent: for "gvpo", implicit rewards are divided by the completion's tokens to this power.
    """

    kind: ObjectiveKind = "gvpo"
    clip: float = 0.2
    variance_term: bool = True
    covariance_term: bool = True
    length_exponent: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveKind):
            raise ValueError(f"objective must be one of {get_args(ObjectiveKind)}, got {self.kind!r}.")
        for name, default, owners in (
            ("clip", 0.2, CLIPPING),
            ("variance_term", True, ("gvpo",)),
            ("covariance_term", True, ("gvpo",)),
            ("length_exponent", 0.0, ("gvpo",)),
        ):
            if getattr(self, name) != default and self.kind not in owners:
                raise ValueError(
                    f"objective.{name} belongs to the kinds {owners}, got {getattr(self, name)!r} with {self.kind!r}: "
                    "leave it out."
                )
        if not self.clip > 0:
            raise ValueError(f"objective.clip must be > 0, got {self.clip}: 0.2 is usual.")
        if not abs(self.length_exponent) < float("inf"):
            raise ValueError(f"objective.length_exponent must be finite, got {self.length_exponent}.")
        if self.length_exponent and not (self.variance_term and self.covariance_term):
            raise ValueError(
                f"objective.length_exponent={self.length_exponent} needs both terms: it is defined for the whole loss "
                "only. Set variance_term and covariance_term back, or length_exponent to 0."
            )
