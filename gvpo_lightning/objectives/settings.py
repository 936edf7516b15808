"""Which objective a run trains."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

ObjectiveKind = Literal["gvpo", "grpo", "dr_grpo", "policy_gradient", "dpo", "sft"]
CLIPPING = ("grpo", "dr_grpo", "policy_gradient")
# which kinds have a setting, and what it is unless it is set
OWNERS: dict[str, tuple[tuple[str, ...], Any]] = {
    "clip": (CLIPPING, 0.2),
    "variance_term": (("gvpo",), True),
    "covariance_term": (("gvpo",), True),
    "length_exponent": (("gvpo",), 0.0),
}


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised; docs/objectives.md has the formulas. Settings of other kinds are None, and can't be set.

    Attributes:
        kind: "gvpo"; or what it is compared with, on the same rollouts: "grpo", "dr_grpo", "policy_gradient" (a KL
            penalty in the reward and a leave-one-out baseline), "dpo" (all pairs of a group), "sft" (likelihood,
            weighted with the reward).
        clip: for "grpo", "dr_grpo" and "policy_gradient": ratios to the sampling-time policy count within 1 +- clip;
            default: 0.2.
        variance_term, covariance_term: for "gvpo", False leaves that regulariser out, for ablations: without the first
            the loss has no minimum, without the second one that forgets the reference. Default: True.
        length_exponent: for "gvpo", implicit rewards are divided by the completion's tokens to this power; default: 0.
    """

    kind: ObjectiveKind = "gvpo"
    clip: float | None = None
    variance_term: bool | None = None
    covariance_term: bool | None = None
    length_exponent: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveKind):
            raise ValueError(
                f"objective must be one of {get_args(ObjectiveKind)}, got {self.kind!r}; RLOO is 'policy_gradient'."
            )
        for name, (owners, default) in OWNERS.items():
            value = getattr(self, name)
            if value is None and self.kind in owners:
                object.__setattr__(self, name, default)  # frozen
            elif value is not None and self.kind not in owners:
                raise ValueError(_not_its_own(name, value, owners, self.kind))
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"objective.clip must be > 0, got {self.clip}: 0.2 is usual.")
        if self.length_exponent is None:
            return
        if not abs(self.length_exponent) < float("inf"):
            raise ValueError(f"objective.length_exponent must be finite, got {self.length_exponent}.")
        if self.length_exponent and not self.is_whole:
            raise ValueError(
                f"objective.length_exponent={self.length_exponent} needs both terms: it is defined for the whole loss "
                "only. Set variance_term and covariance_term back, or length_exponent to 0."
            )

    @classmethod
    def of(cls, given: "ObjectiveKind | ObjectiveSettings") -> "ObjectiveSettings":
        """Settings, of a kind alone too."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The kind, and what is set otherwise than usual."""
        changed = [
            f"{name}: {getattr(self, name)}"
            for name, (owners, default) in OWNERS.items()
            if self.kind in owners and getattr(self, name) != default
        ]
        return f"{self.kind} ({', '.join(changed)})" if changed else self.kind

    @property
    def is_whole(self) -> bool:
        """Whether no term of GVPO is left out; True of the others, which don't have them."""
        return self.variance_term is not False and self.covariance_term is not False

    @property
    def is_gvpo(self) -> bool:
        """Whether it is GVPO itself: with both terms, and implicit rewards as they are."""
        return self.kind == "gvpo" and self.is_whole and not self.length_exponent


def _not_its_own(name: str, value: Any, owners: tuple[str, ...], kind: str) -> str:
    other = owners[0]
    return (
        f"objective.{name} belongs to the kinds {owners}, got {value!r} with {kind!r}: leave it out, or name the "
        "kind in the same way, since one that was set by its name alone does not stay beside settings: "
        f"--model.objective.kind {other} --model.objective.{name} {value}, or "
        f"objective: {{kind: {other}, {name}: {value}}}."
    )
