"""What a checkpoint holds besides Lightning's own state: where the run is, and what it is measured against.

Only tensors, numbers, strings, lists and dicts, so that it loads with weights_only=True.
"""

from typing import TYPE_CHECKING, Any

from gvpo_lightning.rollout.rollout import Rollout

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule


COUNTERS = ("microstep", "num_updates", "num_completion_tokens", "skipped_updates", "consecutive_skips")


def position_units(module: "GVPOModule") -> dict[str, int | float]:
    """The settings that a position, counted in micro-batches, and kept log-probs are measured in."""
    settings = module.rollout_settings
    return {
        "prompts_per_rollout": settings.prompts_per_rollout,
        "prompts_per_update": settings.prompts_per_update,
        "epochs_per_rollout": settings.epochs_per_rollout,
        "accumulate_grad_batches": module.trainer.accumulate_grad_batches,
        "temperature": module.temperature,
    }


def gvpo_state(module: "GVPOModule") -> dict[str, Any]:
    """The module's counters, its rollout if that is half trained, its replay buffer, and what the reference needs."""
    unfinished = module.rollout if module.microstep % module.micro_batches_per_rollout else None
    state: dict[str, Any] = {name: getattr(module, name) for name in COUNTERS}
    state["units"] = position_units(module)
    state["seconds"] = dict(module.seconds)
    state["rollout"] = None if unfinished is None else unfinished.state_dict()
    state["num_ranks"] = module.data_ranks.size
    state["group_size"] = module.rollout_settings.group_size
    if module.sources.replay is not None:
        state["replay"] = module.sources.replay.state_dict() | {"precision": str(module.trainer.precision)}
    if module.reference_settings.kind == "cached":
        state["cache"] = module.sources.references
    state["reference_kind"] = module.reference_settings.kind
    state["reference"] = module.reference.state_dict(module.policy)
    return state


def load_gvpo_state(module: "GVPOModule", state: dict[str, Any]) -> None:
    """Take up what `gvpo_state` left.

    Raises:
        ValueError: the reference is not the one of the checkpoint.
    """
    for name in COUNTERS:
        setattr(module, name, state[name])
    module.seconds.update(state["seconds"])
    if module.sources.replay is not None and "replay" in state:
        same_precision = state["replay"]["precision"] == str(module.trainer.precision)
        module.sources.replay.load_state_dict(state["replay"], keep_logprobs=same_precision)
    if module.trainer.state.fn != "fit":  # nothing is measured against the reference
        return
    kind = module.reference_settings.kind
    if kind != state["reference_kind"]:
        raise ValueError(
            f"This checkpoint was trained with reference: {state['reference_kind']}, the settings say {kind}: set it "
            "back, or start a new run from the exported policy."
        )
    if kind == "cached" and module.sources.references != state["cache"]:
        raise ValueError(
            f"This checkpoint was trained on cached log-probs from {state['cache']}, {module.sources.settings.file} "
            f"has some from {module.sources.references}."
        )
    module.reference.load_state_dict(state["reference"], module.policy)


def load_position(module: "GVPOModule", state: dict[str, Any]) -> None:
    """Put the half-trained rollout back, if there was one.

    Raises:
        ValueError: settings, an objective or a number of ranks with which the run can't go on from this position, or
            rewards that the objective has no meaning for.
    """
    units, saved = position_units(module), state["units"]
    changed = [name for name in units if units[name] != saved[name]]
    if changed:
        raise ValueError(
            f"A run can't be resumed with another {changed[0]}: the checkpoint was saved with {saved[changed[0]]}, "
            f"the settings say {units[changed[0]]}. Set it back, or start a new run from the exported policy."
        )
    if state["microstep"] % units["accumulate_grad_batches"]:
        raise ValueError(
            f"This checkpoint was saved within an optimizer update, at micro-batch {state['microstep']} with "
            f"accumulate_grad_batches={units['accumulate_grad_batches']}: the update's first gradients are lost. "
            "Resume from another one."
        )
    if state["rollout"] is None:
        return
    num_ranks, now = state["num_ranks"], module.data_ranks.size
    if num_ranks != now:
        raise ValueError(
            f"This checkpoint was saved within a rollout by {num_ranks} data-parallel ranks and can't be resumed by "
            f"{now}: resume it with {num_ranks}, or take one saved at a rollout's end."
        )
    size = state["group_size"]
    if size != module.rollout_settings.group_size:
        raise ValueError(
            f"This checkpoint was saved within a rollout of group_size={size} and can't be resumed with "
            f"group_size={module.rollout_settings.group_size}: set it back, or take one saved at a rollout's end."
        )
    rollout = Rollout.from_state_dict(state["rollout"])
    if module.objective.needs_sampler_logprobs and rollout.batch.sampler_logprobs is None:
        raise ValueError(
            f"objective: {module.objective_settings.kind} needs log-probs of the policy that has sampled a rollout, "
            "and this checkpoint was saved within one of another objective, which has none: set the objective back, or "
            "take a checkpoint saved at a rollout's end."
        )
    module.objective.check_rewards(rollout.batch)
    module.rollout = rollout
