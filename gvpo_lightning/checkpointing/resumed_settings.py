"""`SettingsWin`: on resume, the optimizer's and the scheduler's settings are those of the config."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

# what a scheduler's attributes say of where it is, rather than of what it was told
PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step", "base_lrs"} | {
    *("num_bad_epochs", "best", "cooldown_counter", "T_cur", "T_i", "total_steps"),
}


class SettingsWin(L.Callback):
    """Puts changed settings of optimizer and scheduler back after a checkpoint has been restored.

    PyTorch keeps them (lr, betas, weight_decay; total_iters, end_factor) in the state that a checkpoint holds, so that
    restoring it would undo what a config or the command line has changed. With this callback, which `GVPOModule` brings
    along, momentum and the scheduler's position come from the checkpoint and settings from the config:

    * unchanged settings: everything is restored bit by bit;
    * another lr: the scheduled one is scaled by new / old, or where the scheduler has a closed form follows from that;
    * other scheduler settings: the schedule goes on from the present step as if it had always been the new one, if it
      has a closed form (torch's Linear, Constant, Step, MultiStep, Exponential, Polynomial, Cosine), else it applies
      from the next step on;
    * a scheduler where there was none, or another one in its place, starts at its beginning.

    What has changed is logged.
    """

    def __init__(self) -> None:
        self._configured: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what an evaluation before this fit has loaded, which this fit does not go on from."""
        self._saved = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the settings: optimizers and schedulers are built, and nothing is restored yet."""
        self._configured = {
            "optimizers": [_group_settings(optimizer) for optimizer in trainer.optimizers],
            "schedulers": [
                [_scheduler_settings(part) for part in _parts(config.scheduler)]
                for config in trainer.lr_scheduler_configs
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """The settings that the run has."""
        return self._configured

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The settings that the run had."""
        self._saved = state

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply what differs."""
        saved, self._saved = self._saved, {}
        if not saved:
            return
        changes: list[str] = []
        for optimizer, now, then in zip(
            trainer.optimizers, self._configured["optimizers"], saved["optimizers"], strict=False
        ):
            changes += _update_groups(optimizer, now, then)
        for config, now, then in zip(
            trainer.lr_scheduler_configs, self._configured["schedulers"], saved["schedulers"], strict=False
        ):
            changes += _update_scheduler(config.scheduler, now, then, has_changed=bool(changes))
        if changes:
            rank_zero_info(f"Settings that win over the checkpoint's: {', '.join(changes)}.")


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, (int, float)) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each parameter group, with the lr that it starts from."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "initial_lr") and _plain(value)}
        | {"lr": float(group.get("initial_lr", group["lr"]))}
        for group in optimizer.param_groups
    ]


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(scheduler).items() if key not in PROGRESS and _plain(value)}


def _differing(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else bool(a == b)

    return [key for key in now if key in then and not same(now[key], then[key])]


def _update_groups(optimizer: Optimizer, now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    changes = []
    for group, new, old in zip(optimizer.param_groups, now, then, strict=False):
        for key in _differing(new, old):
            changes.append(f"{key} {new[key]} (was {old[key]})")
            if key != "lr":
                group[key] = new[key]
                continue
            group["lr"] = group["lr"] * new["lr"] / old["lr"] if old["lr"] else new["lr"]
            if "initial_lr" in group:
                group["initial_lr"] = new["lr"]
    return list(dict.fromkeys(changes))


def _update_scheduler(
    scheduler: Any, now: list[dict[str, Any]], then: list[dict[str, Any]], *, has_changed: bool
) -> list[str]:
    changes = []
    for part, new, old in zip(_parts(scheduler), now, then, strict=False):
        for key in _differing(new, old):
            changes.append(f"{type(part).__name__}.{key} {new[key]} (was {old[key]})")
            setattr(part, key, new[key])
        if hasattr(part, "base_lrs"):
            part.base_lrs = [group.get("initial_lr", group["lr"]) for group in part.optimizer.param_groups]
    if (changes or has_changed) and hasattr(scheduler, "_get_closed_form_lr"):
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler._get_closed_form_lr(), strict=True):
            group["lr"] = lr
    if changes or has_changed:
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
    return changes
