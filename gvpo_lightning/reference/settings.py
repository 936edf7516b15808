"""Which reference a run has."""

from dataclasses import dataclass
from typing import Literal, get_args

ReferenceKind = Literal["frozen", "previous", "every_n_steps", "ema", "adapter_off", "cached"]


@dataclass(frozen=True)
class ReferenceSettings:
    """What the reference is.

    Attributes:
        kind: "frozen", the policy as its folder or hub id holds it, or a model object as the first fit found it;
            "previous", the policy at the start of each rollout;
            "every_n_steps", the policy as it was n or more updates ago; "ema", an average of the policies at the
            rollouts' starts; "adapter_off", a LoRA policy without its adapter; "cached", log-probs that the
            completions bring along.
        model: for "frozen" and "cached", a hub id or folder of another model than the policy's own start.
        every_n_steps: optimizer updates; the reference is renewed at the first rollout after as many.
        decay: in (0, 1); at each rollout's start, reference = decay * reference + (1 - decay) * policy.
    """

    kind: ReferenceKind = "frozen"
    model: str | None = None
    every_n_steps: int | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ReferenceKind):
            raise ValueError(f"reference must be one of {get_args(ReferenceKind)}, got {self.kind!r}.")
        for name, owners in (
            ("model", ("frozen", "cached")),
            ("every_n_steps", ("every_n_steps",)),
            ("decay", ("ema",)),
        ):
            if getattr(self, name) is not None and self.kind not in owners:
                raise ValueError(
                    f"reference.{name} belongs to the kinds {owners}, got {getattr(self, name)!r} with {self.kind!r}."
                )
        if self.kind == "every_n_steps" and not (self.every_n_steps and self.every_n_steps >= 1):
            raise ValueError(
                f"reference.every_n_steps must be at least 1, got {self.every_n_steps}: "
                "write reference: {kind: every_n_steps, every_n_steps: 64}."
            )
        if self.kind == "ema" and not (self.decay is not None and 0 < self.decay < 1):
            raise ValueError(
                f"reference.decay must be in (0, 1), got {self.decay}: write reference: {{kind: ema, decay: 0.9}}."
            )

    @classmethod
    def of(cls, given: "ReferenceKind | ReferenceSettings") -> "ReferenceSettings":
        """Settings, of a kind alone too."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]
