"""What a fit checks and says when everything is in place, before the first rollout."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from gvpo_kernels.inputs import choose_implementation
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.guard import Guard
from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.policy.head import Scoring
from gvpo_lightning.policy.head_check import attention_of, check_logprob_head
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.reference.kinds import ModelReference
from gvpo_lightning.rewards.run import Rewards
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


def check_start(
    policy: Any, scoring: Scoring, placement: Placement, *, reference: Reference, rewards: Rewards | None
) -> None:
    """Hold the fused loss against eager on a few tokens, where the training will run it; wait for the rewards."""
    if rewards is not None:
        rewards.wait_until_loaded()
    # gradients are elsewhere where the weights are sharded
    with placement.forward_context(), placement.callable(), torch.set_grad_enabled(not placement.is_sharded):
        error = check_logprob_head(policy, scoring)
        if isinstance(reference, ModelReference):
            with reference.applied(policy) as model:
                check_logprob_head(model, scoring)
        name = choose_implementation(scoring.implementation, next(policy.parameters()))
    rank_zero_info(
        f"The loss runs in the '{name}' implementation (loss_implementation={scoring.implementation!r}), "
        f"{error:.1g} from eager."
    )
    if scoring.padding_free and (attention := attention_of(policy)) in ("eager", "sdpa"):
        rank_zero_info(
            f"padding_free=True under '{attention}' attention makes a mask of all pairs of a micro-batch's tokens, "
            "which grows with the square of their number: use flash_attention_2, or keep micro-batches small "
            "(rollout.micro_batch_tokens)."
        )


def warn_of_settings(
    guard: Guard,
    source: PolicySource,
    precision: str,
    objective: Objective,
    temperature: float,
    generation: GenerationSettings | None,
    settings: RolloutSettings,
) -> None:
    """Say what takes the promise of the objective's optimum away; `generation`: how completions are sampled, if any."""
    if source.lora is not None and precision in ("bf16-true", "16-true"):
        guard.say(
            "adapter precision",
            f"trainer.precision={precision} has cast the adapter to 16 bits, in which small steps are "
            "lost: set model.loading.dtype=bfloat16 and trainer.precision=32-true.",
        )
    if settings.zero_variance == "drop":
        rank_zero_info(
            "rollout.zero_variance='drop' changes the objective: groups with equal rewards would pull the policy "
            "towards the reference."
        )
    if generation is None:
        return
    cuts = {"top_k": generation.top_k != 0, "top_p": generation.top_p < 1, "min_p": generation.min_p > 0}
    if objective.needs_sampler_logprobs:
        if any(cuts.values()) or generation.temperature != temperature:
            guard.say(
                "on policy",
                f"objective: {objective.settings.kind} takes completions to be the policy's at model.temperature="
                f"{temperature}, but they are sampled with temperature={generation.temperature}, top_k="
                f"{generation.top_k}, top_p={generation.top_p}, min_p={generation.min_p}: its gradient is biased. Set "
                "the temperatures equal, top_k=0, top_p=1.0 and min_p=0.0.",
            )
        return
    cuts["temperature"] = generation.temperature == 0
    named = " and ".join(f"{name}={getattr(generation, name)}" for name, is_cut in cuts.items() if is_cut)
    if named:
        is_gvpo = str(objective.settings) == "gvpo"
        what_then = "GVPO's optimum is then not unique" if is_gvpo else "that is not trained"
        guard.say(
            "sampler",
            f"Sampling with {named} never draws some of what the reference allows: {what_then}. Set temperature > "
            "0, top_k=0, top_p=1.0 and min_p=0.0 to draw all of it.",
        )
