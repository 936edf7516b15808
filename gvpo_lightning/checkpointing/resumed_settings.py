"""On resume: `SettingsWin`, settings are those of the config; `DueValidation`, a validation that was due is run."""

import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR, ReduceLROnPlateau

# what a scheduler's attributes say of where it is, rather than of what it was told
PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step", "base_lrs"} | {
    *("num_bad_epochs", "best", "cooldown_counter", "T_cur", "T_i"),
}
TYPE = "type of scheduler"
# their `get_lr` depends on where they are, and not on the present lr
BY_POSITION = (OneCycleLR, CyclicLR, CosineAnnealingWarmRestarts)


class SettingsWin(L.Callback):
    """Puts changed settings of optimizer and scheduler back after a checkpoint has been restored.

    PyTorch keeps them (lr, betas, weight_decay; total_iters, end_factor) in the state that a checkpoint holds, so that
    restoring it would undo what a config or the command line has changed. With this callback, which `GVPOModule` brings
    along, momentum and the scheduler's position come from the checkpoint and settings from the config:

    * unchanged settings: everything is restored bit by bit;
    * another lr: the scheduled one is scaled by new / old, or where the scheduler has a closed form follows from that;
    * other scheduler settings: the schedule goes on from the present step as if it had always been the new one, if it
      has a closed form (torch's Linear, Constant, Step, MultiStep, Exponential, Polynomial, Cosine, OneCycle, Cyclic),
      else it applies from the next step on; ReduceLROnPlateau with another monitor or mode starts to compare anew;
    * a scheduler where there was none, or another one in its place, starts at its beginning.

    What has changed is logged.

    Raises:
        ValueError: the checkpoint is of another optimizer.
    """

    def __init__(self) -> None:
        self._configured: dict[str, Any] = {}
        self._beginning: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])  # of groups and schedulers
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
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        parts = [part for config in trainer.lr_scheduler_configs for part in _parts(config.scheduler)]
        self._beginning = ([_told(group) for group in groups], [dict(vars(part)) for part in parts])

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
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if _are_others(self._configured["schedulers"], saved["schedulers"]):
            self._begin_anew(trainer.optimizers, schedulers)
            changes.append(f"{' and '.join(type(scheduler).__name__ for scheduler in schedulers)} from its beginning")
        else:
            for scheduler, now, then in zip(
                schedulers, self._configured["schedulers"], saved["schedulers"], strict=False
            ):
                changes += _update_scheduler(scheduler, now, then, has_changed=bool(changes))
        if changes:
            rank_zero_info(f"Settings that win over the checkpoint's: {', '.join(changes)}.")

    def _begin_anew(self, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        """Undo what was restored of another scheduler, or of none."""
        groups, parts = self._beginning
        for group, told in zip((g for optimizer in optimizers for g in optimizer.param_groups), groups, strict=True):
            group.update(told)
        for part, values in zip((p for scheduler in schedulers for p in _parts(scheduler)), parts, strict=True):
            vars(part).clear()
            vars(part).update(values)


class DueValidation(L.Callback):
    """Validates before training goes on, where the run that saved would have done so at once.

    A checkpoint may be saved at an update's end, before the validation that is due there, or when an exception has
    ended that validation. Lightning passes over it on resume, so that what follows validations (ReduceLROnPlateau,
    EarlyStopping) would miss one. `GVPOModule` brings this callback along.
    """

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._is_due = False
        self._has_ended = False
        self._is_broken_off = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Know whom to ask when a checkpoint is saved."""
        self._trainer, self._is_due = trainer, False
        self._has_ended = self._is_broken_off = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next validation is another one."""
        self._has_ended = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All that follows it has seen it."""
        self._has_ended = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """What is saved from now on has yet to see it."""
        self._is_broken_off = trainer.state.fn == "fit" and trainer.validating and not self._has_ended

    def state_dict(self) -> dict[str, bool]:
        """Whether a validation is to come before the next update."""
        assert self._trainer is not None
        loop, fetcher = self._trainer.fit_loop.epoch_loop, self._trainer.fit_loop._data_fetcher
        progress: Any = loop.batch_progress.total
        is_batch_end = self._trainer.training and progress.completed < progress.processed
        is_to_come = is_batch_end and fetcher is not None and loop._should_check_val_fx(fetcher)
        return {"is_due": self._is_broken_off or is_to_come}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What the run that saved has left to do."""
        self._is_due = state["is_due"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run it as Lightning runs others."""
        if not self._is_due:
            return
        self._is_due = False
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # or it would go on where an earlier one has ended
        trainer.validating = True
        validation.run()
        validation._has_run = False  # or Lightning would take an epoch's last for the end of all later ones
        trainer.training = True


def _plain(value: Any) -> bool:
    if isinstance(value, dict):  # MultiStepLR's milestones
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(_plain(part) for part in value)  # of OneCycleLR's phases each is a dict
    return value is None or isinstance(value, (bool, int, float, str))


def _told(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _are_others(now: list[list[dict[str, Any]]], then: list[list[dict[str, Any]]]) -> bool:
    """Whether schedulers, or what they are made of, are not of the types that they were, or there were none."""
    if len(now) > len(then):
        return True
    pairs = [pair for parts in zip(now, then, strict=False) for pair in zip(*parts, strict=False)]
    # earlier versions have not saved the type
    return any(part[TYPE] != saved.get(TYPE, part[TYPE]) for part, saved in pairs)


def _group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each parameter group, with the lr that it starts from."""
    return [
        {key: value for key, value in _told(group).items() if key != "initial_lr" and _plain(value)}
        | {"lr": None if group["lr"] is None else float(group.get("initial_lr", group["lr"]))}
        for group in optimizer.param_groups
    ]


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    told = {key: value for key, value in vars(scheduler).items() if key not in PROGRESS and _plain(value)}
    return told | {TYPE: type(scheduler).__name__}


def _differing(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else bool(a == b)

    return [key for key in now if key in then and not same(now[key], then[key])]


def _update_groups(optimizer: Optimizer, now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    changes = []
    for group, new, old in zip(optimizer.param_groups, now, then, strict=False):
        if missing := [key for key in new if key not in group]:
            raise ValueError(
                f"The checkpoint is of another optimizer: {type(optimizer).__name__} needs {missing[0]}, which it does "
                "not have. Set model.optimizer to the one that it was, or start another run with the exported policy."
            )
        for key in _differing(new, old):
            changes.append(f"{key} {new[key]} (was {old[key]})")
            if key != "lr":
                group[key] = new[key]
                continue
            group["lr"] = group["lr"] * new["lr"] / old["lr"] if new["lr"] and old["lr"] else new["lr"]
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
        if isinstance(part, ReduceLROnPlateau) and {"monitor", "mode"} & set(_differing(new, old)):
            part._reset()  # the best that was seen is another metric's
        if hasattr(part, "base_lrs"):
            part.base_lrs = [group.get("initial_lr", group["lr"]) for group in part.optimizer.param_groups]
    if not changes and not has_changed:
        return changes
    if isinstance(scheduler, BY_POSITION):
        with warnings.catch_warnings(action="ignore"):  # torch's, that get_lr is for the scheduler alone
            rates = scheduler.get_lr()
    else:
        groups = scheduler.optimizer.param_groups
        rates = getattr(scheduler, "_get_closed_form_lr", lambda: [group["lr"] for group in groups])()
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
    return changes
