"""What a fit checks and says when everything is in place, before the first rollout."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info

from gvpo_kernels.inputs import choose_implementation
from gvpo_lightning.distributed.gather import callable_outside_steps
from gvpo_lightning.distributed.sharding import is_sharded
from gvpo_lightning.policy.head_check import attention_of, check_logprob_head
from gvpo_lightning.reference.model import ModelReference

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule


def check_start(module: "GVPOModule") -> None:
    """Hold the fused loss against eager on a few tokens, where the training will run it; wait for the rewards."""
    if module.rewards is not None:
        module.rewards.wait_until_loaded()
    with (
        module.trainer.precision_plugin.forward_context(),
        callable_outside_steps(module),
        torch.set_grad_enabled(not is_sharded(module.trainer.strategy)),  # gradients are elsewhere then
    ):
        error = check_logprob_head(module.policy, module.loss_implementation, padding_free=module.padding_free)
        if isinstance(module.reference, ModelReference):
            with module.reference.applied(module.policy) as model:
                check_logprob_head(model, module.loss_implementation, padding_free=module.padding_free)
        name = choose_implementation(module.loss_implementation, next(module.policy.parameters()))
    rank_zero_info(
        f"The loss runs in the '{name}' implementation (loss_implementation={module.loss_implementation!r}), "
        f"{error:.1g} from eager."
    )
    if module.padding_free and (attention := attention_of(module.policy)) in ("eager", "sdpa"):
        rank_zero_info(
            f"padding_free=True under '{attention}' attention makes a mask of all pairs of a micro-batch's tokens, "
            "which grows with the square of their number: use flash_attention_2, or keep micro-batches small "
            "(rollout.micro_batch_tokens)."
        )
    if module.objective.needs_sampler_logprobs:
        module.guard.on_policy(module.generation, module.temperature, module.objective_settings.kind)
    elif module.sources.settings.generates:
        module.guard.sampler(module.generation, str(module.objective_settings))
    if module.lora is not None and str(module.trainer.precision) in ("bf16-true", "16-true"):
        module.guard.say(
            "adapter precision",
            f"trainer.precision={module.trainer.precision} has cast the adapter to 16 bits, in which small steps are "
            "lost: set model.loading.dtype=bfloat16 and trainer.precision=32-true.",
        )
    if module.rollout_settings.zero_variance == "drop":
        rank_zero_info(
            "rollout.zero_variance='drop' changes the objective: groups with equal rewards would pull the policy "
            "towards the reference."
        )
