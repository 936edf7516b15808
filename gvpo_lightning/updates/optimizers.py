"""The optimizer and its scheduler, as Lightning wants them: one step an update, or one a validation."""

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from gvpo_lightning.distributed.placement import Placement

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLATEAU = 'lightning.pytorch.cli.ReduceLROnPlateau with monitor="validation/reward/mean" and mode="max"'


def configured(
    parameters: Iterable[nn.Parameter],
    make_optimizer: OptimizerCallable,
    make_scheduler: LRSchedulerCallable | None,
    placement: Placement,
    validation: Any | None,
    clips: bool,
) -> dict[str, Any]:
    """What `configure_optimizers` gives: the optimizer over all trainable parameters, and the scheduler.

    Lightning steps a scheduler after every update. One whose `step` takes a metric, as ReduceLROnPlateau's does, waits
    for `due`.

    Args:
        validation: what has the loader of the fit's validations, as Lightning keeps it, or None.
        clips: whether the fit clips gradients.

    Raises:
        ValueError: an update can't be made with these, or the scheduler would never be stepped.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "The policy has no trainable parameters (requires_grad): unfreeze some, or give "
            "peft.PeftModel.from_pretrained is_trainable=True."
        )
    optimizer: Any = make_optimizer(trainable)
    _check_optimizer(optimizer, trainable)
    is_scaled = placement.precision.endswith("-mixed") and not placement.is_sharded
    if clips and is_scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"A fused {type(optimizer).__name__} can't be clipped under trainer.precision={placement.precision}: leave "
            "fused out, or trainer.gradient_clip_val."
        )
    if make_scheduler is None:
        return {"optimizer": optimizer}
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} with lr=None finds its learning rate itself, which no lr_scheduler can "
            "change: leave lr_scheduler out, or give the optimizer an lr."
        )
    scheduler: Any = make_scheduler(optimizer)
    if not callable(getattr(scheduler, "step", None)):
        raise ValueError(
            f"lr_scheduler must give one scheduler, which is stepped once an update, got {type(scheduler).__name__}: "
            "return the scheduler itself, and count its steps in updates."
        )
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if _required_arguments(scheduler.step):
        config |= _at_validation(scheduler, validation)
    return {"optimizer": optimizer, "lr_scheduler": config}


def _check_optimizer(optimizer: Any, trainable: list[nn.Parameter]) -> None:
    """Raise ValueError for what can't make an update of all trainable parameters from one gradient."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must give one torch.optim.Optimizer, got {name}: return the optimizer itself.")
    if needed := _required_arguments(optimizer.step):
        raise ValueError(
            f"{name} can't train a rollout's updates: its step needs {' and '.join(needed)}, to compute the loss "
            "several times, and an update has one gradient. Use another, such as torch.optim.AdamW."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("SparseAdam takes sparse gradients only, and a policy's are dense: use torch.optim.AdamW.")
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = len({id(parameter) for parameter in trainable} - {id(parameter) for parameter in given})
    if missing:
        raise ValueError(
            f"The optimizer must have all trainable parameters, but {missing} of the policy's {len(trainable)} are "
            "missing: put them into one of its groups, or call requires_grad_(False) on them before."
        )
    if any(group.get("capturable") for group in optimizer.param_groups) and given[0].device.type == "cpu":
        raise ValueError(f"{name} with capturable=True does not run on a CPU: leave capturable out.")


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in VARIADIC
    ]


def _at_validation(scheduler: Any, validation: Any | None) -> dict[str, Any]:
    """For a scheduler that is stepped with a metric; Lightning would step it with an old one, or miss validations."""
    name, monitor = type(scheduler).__name__, getattr(scheduler, "monitor", None)
    if monitor is None:
        raise ValueError(
            f"{name} is stepped with a metric, and does not say with which: use {PLATEAU}, or the name of another "
            "metric that is logged."
        )
    # a datamodule without validation prompts has an empty list in place of a loader
    if validation is None or validation.dataloader() in ([], None):
        raise ValueError(
            f"{name} is stepped after each validation, and this fit has none: give it prompts to validate on "
            "(data.validation_split, val_dataloaders), or use a scheduler that follows the updates."
        )
    return {"reduce_on_plateau": True, "monitor": monitor, "frequency": sys.maxsize}


def due(
    state: TrainerState, configs: Iterable[LRSchedulerConfig], logged: Mapping[str, Any], absent: Collection[str]
) -> Iterator[tuple[Any, Any]]:
    """The schedulers to step after a validation, each with its metric; none after the one before training.

    Args:
        state: what the Trainer is doing; only a fit steps schedulers.
        logged: the fit's metrics by name.
        absent: of what a validation logs, without "validation/", what this one has no completion for: no news, no step.

    Raises:
        ValueError: a metric is never logged.
    """
    if state.fn != TrainerFn.FITTING:
        return
    is_trial = state.stage == RunningStage.SANITY_CHECKING
    for config in configs:
        if not config.reduce_on_plateau or config.monitor in {f"validation/{name}" for name in absent}:
            continue
        monitor = str(config.monitor)
        if monitor in logged:
            if not is_trial:
                yield config.scheduler, logged[monitor]
        elif not is_trial or monitor.startswith("validation/"):  # what training logs is not there before it
            raise ValueError(
                f"{type(config.scheduler).__name__} waits for the metric {monitor!r}, which is not logged: set its "
                f"monitor to one of {', '.join(sorted(logged))}."
            )
