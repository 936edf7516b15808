"""What wins on resume: the settings of the config; momentum and position are the checkpoint's."""

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from gvpo_lightning.callbacks import RunCheckpoint, SettingsWin


def linear(end_factor=0.0, total_iters=8):
    return lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=end_factor, total_iters=total_iters)


@pytest.fixture
def resumed(make_module, fit, tmp_path):
    """The lr of every update from the 5th to the 8th, after 4 updates with other settings."""

    def run(first: dict, second: dict, **options):
        used = []

        class Recorder(L.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                used.append(optimizer.param_groups[0]["lr"])

        fit(
            make_module(**first),
            max_steps=4,
            enable_checkpointing=True,
            callbacks=[RunCheckpoint(tmp_path / "c")],
            **options,
        )
        last = tmp_path / "c" / "last.ckpt"
        fit(make_module(**second), max_steps=8, ckpt_path=last, callbacks=[Recorder()], **options)
        return used

    return run


def adamw(lr: float, **settings):
    return {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr, **settings)}


def test_without_the_callback_the_checkpoint_would_win(make_module, fit, tmp_path):
    """The trap that `SettingsWin` is for: PyTorch keeps the lr in the optimizer's state."""

    class Off(SettingsWin):
        def on_train_start(self, trainer, module):
            pass

    fit(make_module(**adamw(1e-3)), max_steps=4, enable_checkpointing=True, callbacks=[RunCheckpoint(tmp_path / "c")])
    last = tmp_path / "c" / "last.ckpt"
    trainer = fit(make_module(**adamw(1e-4)), max_steps=5, ckpt_path=last, callbacks=[Off()])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    trainer = fit(make_module(**adamw(1e-4, weight_decay=0.5)), max_steps=5, ckpt_path=last)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 5  # with what it had gathered


def scheduled(lr: float, scheduler) -> dict:
    return adamw(lr) | {"lr_scheduler": scheduler}


def one_cycle(total_steps):
    """Up over half of the updates, from a quarter of the lr, and down to that again."""
    settings = {"pct_start": 0.5, "anneal_strategy": "linear", "div_factor": 4, "final_div_factor": 1}
    return lambda optimizer: OneCycleLR(optimizer, 8e-3, total_steps, cycle_momentum=False, **settings)


def restarting(minimum):
    return lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=4, eta_min=minimum)


def milestones(*updates):
    return lambda optimizer: MultiStepLR(optimizer, list(updates), gamma=0.5)


def plateau(**settings):
    """Nothing but the first validation is ever better."""
    told = {"monitor": "validation/reward/mean", "mode": "max", "threshold": 100, "threshold_mode": "abs"} | settings
    return scheduled(8e-3, lambda optimizer: ReduceLROnPlateau(optimizer, **told))


LINEAR = scheduled(8e-3, linear())
CASES = {
    "nothing changed": (LINEAR, LINEAR, [4e-3, 3e-3, 2e-3, 1e-3]),
    "lr": (adamw(1e-3), adamw(1e-4), [1e-4] * 4),
    "lr under a scheduler": (LINEAR, scheduled(8e-4, linear()), [4e-4, 3e-4, 2e-4, 1e-4]),
    "a longer schedule": (LINEAR, scheduled(8e-3, linear(total_iters=16)), [6e-3, 5.5e-3, 5e-3, 4.5e-3]),
    "another end": (LINEAR, scheduled(8e-3, linear(end_factor=0.5)), [6e-3, 5.5e-3, 5e-3, 4.5e-3]),
    "a function": (
        scheduled(8e-3, lambda optimizer: LambdaLR(optimizer, lambda step: 1.0)),
        scheduled(4e-3, lambda optimizer: LambdaLR(optimizer, lambda step: 1.0)),
        [4e-3] * 4,
    ),
    "lr under schedulers in a row": (
        *(
            scheduled(
                lr,
                lambda optimizer: SequentialLR(
                    optimizer, [ConstantLR(optimizer, 0.5, 2), ConstantLR(optimizer, 1.0, 9)], milestones=[6]
                ),
            )
            for lr in (8e-3, 4e-3)
        ),
        [4e-3] * 4,
    ),
    "a longer cycle": (scheduled(0, one_cycle(4)), scheduled(0, one_cycle(8)), [6.5e-3, 5e-3, 3.5e-3, 2e-3]),
    "another end of the cycle": (
        scheduled(8e-3, restarting(0.0)),
        scheduled(8e-3, restarting(4e-3)),
        [8e-3, 4e-3 + 2e-3 * (1 + 0.5**0.5), 6e-3, 4e-3 + 2e-3 * (1 - 0.5**0.5)],
    ),
    "other milestones": (scheduled(8e-3, milestones(2)), scheduled(8e-3, milestones(2, 6)), [4e-3, 4e-3, 2e-3, 2e-3]),
    "another scheduler": (
        LINEAR,
        scheduled(8e-3, lambda optimizer: StepLR(optimizer, 2, gamma=0.5)),
        [8e-3, 8e-3, 4e-3, 4e-3],
    ),
    "a scheduler where there was none": (adamw(8e-3), LINEAR, [8e-3, 7e-3, 6e-3, 5e-3]),
    "no scheduler any more": (scheduled(8e-3, linear()), adamw(8e-3), [4e-3] * 4),
}


@pytest.mark.parametrize(("first", "second", "expected"), CASES.values(), ids=CASES.keys())
def test_changed_settings_win_and_the_position_is_kept(resumed, first, second, expected):
    assert resumed(first, second) == pytest.approx(expected, rel=1e-6)


PLATEAUS = {
    # bad ones before: the second, the third that halves, the fourth
    "patience and factor": (plateau(patience=0, factor=0.1), [4e-3, 4e-4, 4e-5, 4e-6]),
    # another best: the fifth validation is the first of its kind
    "metric": (plateau(patience=1, factor=0.5, monitor="validation/completion/length_max"), [4e-3, 4e-3, 4e-3, 2e-3]),
}


@pytest.mark.parametrize(("second", "expected"), PLATEAUS.values(), ids=PLATEAUS.keys())
def test_a_plateau_takes_changed_settings_and_keeps_what_it_has_seen(resumed, prompts, second, expected):
    loader = torch.utils.data.DataLoader(prompts[:1])
    first = plateau(patience=1, factor=0.5)
    assert resumed(first, second, val_dataloaders=loader, val_check_interval=1) == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_of_another_optimizer_is_refused_before_training(resumed):
    with pytest.raises(ValueError, match=r"of another optimizer: SGD needs momentum, which it does not have\. Set"):
        resumed(adamw(1e-3), {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3)})


def test_what_changed_is_told(resumed, caplog):
    with caplog.at_level("INFO"):
        resumed(LINEAR, scheduled(8e-4, linear(total_iters=16)))
    message = "Settings that win over the checkpoint's: lr 0.0008 (was 0.008), LinearLR.total_iters 16 (was 8)."
    assert message in caplog.text
