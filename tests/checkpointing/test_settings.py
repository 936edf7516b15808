"""What wins on resume: the settings of the config; momentum and position are the checkpoint's."""

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LinearLR, SequentialLR

from gvpo_lightning.callbacks import RunCheckpoint, SettingsWin


def linear(end_factor=0.0, total_iters=8):
    return lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=end_factor, total_iters=total_iters)


@pytest.fixture
def resumed(make_module, fit, tmp_path):
    """The lr of every update from the 5th to the 8th, after 4 updates with other settings."""

    def run(first: dict, second: dict):
        used = []

        class Recorder(L.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                used.append(optimizer.param_groups[0]["lr"])

        fit(make_module(**first), max_steps=4, enable_checkpointing=True, callbacks=[RunCheckpoint(tmp_path / "c")])
        fit(make_module(**second), max_steps=8, ckpt_path=tmp_path / "c" / "last.ckpt", callbacks=[Recorder()])
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
    "no scheduler any more": (scheduled(8e-3, linear()), adamw(8e-3), [4e-3] * 4),
}


@pytest.mark.parametrize(("first", "second", "expected"), CASES.values(), ids=CASES.keys())
def test_changed_settings_win_and_the_position_is_kept(resumed, first, second, expected):
    assert resumed(first, second) == pytest.approx(expected, rel=1e-6)


def test_what_changed_is_told(resumed, caplog):
    with caplog.at_level("INFO"):
        resumed(LINEAR, scheduled(8e-4, linear(total_iters=16)))
    message = "Settings that win over the checkpoint's: lr 0.0008 (was 0.008), LinearLR.total_iters 16 (was 8)."
    assert message in caplog.text
