"""What a checkpoint holds besides Lightning's own state: where the run is, and what it is measured against.

Only tensors, numbers, strings, lists and dicts, so that it loads with weights_only=True.
"""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gvpo_lightning.reference import fingerprint
from gvpo_lightning.rollout.sampling import Rollout

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule

COUNTERS = ("microstep", "num_completion_tokens", "skipped_updates", "consecutive_skips")


def gvpo_state(module: "GVPOModule") -> dict[str, Any]:
    """The module's counters, its rollout if that is half trained, and what identifies the reference."""
    unfinished = module.rollout if module.microstep % module.micro_batches_per_rollout else None
    rollouts: list[Any] = [None if unfinished is None else unfinished.state_dict()]
    if module.world_size > 1:
        mine, rollouts = rollouts[0], [None] * module.world_size
        dist.all_gather_object(rollouts, mine)
    state: dict[str, Any] = {name: getattr(module, name) for name in COUNTERS}
    state |= {"seconds": dict(module.seconds), "rollouts": rollouts}
    if module.reference_model is not None:
        state["reference_fingerprint"] = fingerprint(module.reference_model)
        if not isinstance(module.policy_source, str):  # it can't be loaded again from where it came
            state["reference_state"] = module.reference_model.state_dict()
    return state


def load_gvpo_state(module: "GVPOModule", state: dict[str, Any]) -> None:
    """Take up what `gvpo_state` left.

    Raises:
        ValueError: the reference is not the one of the checkpoint, or the checkpoint was saved within a
            rollout by another number of ranks.
    """
    for name in COUNTERS:
        setattr(module, name, state[name])
    module.seconds.update(state["seconds"])
    if module.reference_model is None:  # not training, or the reference is the policy itself
        return
    if "reference_state" in state:
        module.reference_model.load_state_dict(state["reference_state"])
    found, expected = fingerprint(module.reference_model), state.get("reference_fingerprint", "none")
    if found != expected:
        raise ValueError(
            f"The reference loaded from {module.policy_source!r} is not the one that this checkpoint was trained "
            f"against (fingerprint {found}, expected {expected}): its files, its dtype or `reference` have changed."
        )


def load_rollout(module: "GVPOModule", state: dict[str, Any]) -> None:
    """Put the half-trained rollout back, if there was one."""
    rollouts = state["rollouts"]
    if not any(rollouts):
        return
    if len(rollouts) != module.world_size:
        raise ValueError(
            f"This checkpoint was saved within a rollout by {len(rollouts)} ranks and can't be resumed by "
            f"{module.world_size}: resume it with {len(rollouts)}, or take one saved at a rollout's end."
        )
    module.rollout = Rollout.from_state_dict(rollouts[module.global_rank], module.trainer.strategy.root_device)
