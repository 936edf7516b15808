"""Nothing is saved within an optimizer update, whatever asks for it: a save or a stop that comes due waits."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gvpo_lightning.callbacks import RunCheckpoint
from gvpo_lightning.rewards import RewardError
from gvpo_lightning.rollout.settings import RolloutSettings
from tests.conftest import digit_reward

ACCUMULATE = 4  # micro-batches of an update; an epoch is 24
ROLLOUT = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=4)
METRIC = "validation/reward/mean"


@pytest.fixture
def train(make_module, fit, prompts, tmp_path):
    """Trains an epoch with a validation by the clock, after every micro-batch if `validates`; gives the module."""

    def run(*callbacks, validates: bool = False, reward=digit_reward, ckpt_path=None, seed=0, **settings):
        module = make_module(seed, rollout=ROLLOUT, reward=reward)
        data = torch.utils.data.DataLoader(prompts[:1], batch_size=1) if validates else None
        clock = {"val_check_interval": timedelta(0), "check_val_every_n_epoch": None} if validates else {}
        options = {"accumulate_grad_batches": ACCUMULATE, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        options |= {"max_steps": -1, "max_epochs": 1, "default_root_dir": tmp_path} | clock | settings
        fit(module, val_dataloaders=data, callbacks=list(callbacks), ckpt_path=ckpt_path, **options)
        return module

    return run


def saved(folder: Path) -> list[int]:
    """The updates that each checkpoint there has seen, none of them in part."""
    states = [torch.load(path) for path in folder.rglob("*.ckpt") if not path.is_symlink()]
    for state in states:
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert progress["started"] == progress["processed"]
        assert (
            state["gvpo"]["microstep"] == ACCUMULATE * state["global_step"] == ACCUMULATE * state["gvpo"]["num_updates"]
        )
    return sorted(state["global_step"] for state in states)


def test_validation_that_is_counted_over_epochs_must_not_cut_an_update(train):
    with pytest.raises(ValueError, match=r"comes every 30 micro-batches \(val_check_interval\), not a multiple of"):
        train(validates=True, val_check_interval=30)
    train(val_check_interval=30, check_val_every_n_epoch=None, max_steps=1)  # there is none
    train(validates=True, val_check_interval=32, max_steps=1)


def test_what_a_validation_by_the_clock_would_save_waits(train, weights, tmp_path):
    saver = RunCheckpoint(tmp_path / "a", monitor=METRIC, save_top_k=-1, save_on_train_epoch_end=False)
    through = train(saver, validates=True)
    assert saved(tmp_path / "a") == [1, 2, 3, 4, 5, 6]
    at = next((tmp_path / "a").glob("*step=3.ckpt"))
    resumed = train(RunCheckpoint(tmp_path / "b"), validates=True, ckpt_path=at, seed=1)
    assert torch.equal(weights(resumed), weights(through))


@pytest.mark.parametrize("where", ["validation", "batch"])
def test_a_stop_within_an_update_waits(train, tmp_path, where):
    class Stops(L.Callback):
        def stop(self, trainer, module, *_):
            trainer.should_stop |= module.microstep >= 6

        on_validation_end, on_train_batch_end = (stop, L.Callback.on_train_batch_end)
        if where == "batch":
            on_validation_end, on_train_batch_end = (L.Callback.on_validation_end, stop)

    module = train(Stops(), RunCheckpoint(tmp_path / "a"), validates=where == "validation")
    assert module.microstep == 8
    assert saved(tmp_path / "a") == [2]


def test_what_ends_in_the_middle_of_an_update_is_not_saved(train, tmp_path):
    class Ends(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):  # before the first backward pass of an update
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

    train(Ends(), RunCheckpoint(tmp_path / "a"), max_epochs=-1)
    assert saved(tmp_path / "a") == []


class Raises(L.Callback):
    """Raises once the run is at a micro-batch, in one of the hooks."""

    def __init__(self, hook: str, microstep: int, error: BaseException):
        def fail(trainer, module, *_):
            if module.microstep == microstep:
                raise error

        setattr(self, hook, fail)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("broken"), pytest.param(KeyboardInterrupt(), marks=pytest.mark.slow)],
    ids=["error", "ctrl-c"],
)
@pytest.mark.parametrize(
    ("hook", "microstep", "steps"),
    [
        ("on_train_batch_start", 8, [2]),
        ("on_train_batch_start", 9, []),
        ("on_before_zero_grad", 9, []),
        ("on_before_backward", 8, []),
        ("on_before_optimizer_step", 8, []),
        ("on_train_batch_end", 6, []),
        ("on_validation_end", 7, []),
        ("on_validation_end", 8, [2]),
    ],
)
def test_an_exception_saves_what_is_whole_and_nothing_else(train, tmp_path, hook, microstep, steps, error):
    saver = RunCheckpoint(tmp_path / "a", save_on_exception=True)
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        train(Raises(hook, microstep, error), saver, validates=hook == "on_validation_end")
    assert saved(tmp_path / "a") == steps


def test_sigterm_in_a_validation_within_an_update_waits_for_its_end(train, weights, tmp_path):
    class Kills(L.Callback):
        def on_validation_start(self, trainer, module):
            if module.microstep == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    for folder, callbacks in (("a", [RunCheckpoint(tmp_path / "a")]), ("b", [])):
        with pytest.raises(SystemExit) as stopped:
            train(
                Kills(),
                *callbacks,
                validates=True,
                default_root_dir=tmp_path / folder,
                enable_checkpointing=folder == "a",
            )
        assert stopped.value.code == 143
        assert saved(tmp_path / folder) == [2]


def test_a_reward_that_fails_in_a_validation_within_an_update_saves_nothing(train, tmp_path):
    calls = []

    def failing(prompts, completions, **columns):
        calls.append(len(completions))
        if calls.count(4) > 2:  # the third validation: of one prompt
            raise ValueError("no judge")
        return digit_reward(prompts, completions)

    failing.in_process = True
    with pytest.raises(RewardError):
        train(RunCheckpoint(tmp_path / "a"), validates=True, reward=failing)
    assert saved(tmp_path / "a") == []


@pytest.mark.parametrize(
    ("settings", "validates", "named"),
    [
        ({"train_time_interval": timedelta(0)}, False, "its train_time_interval is over"),
        ({}, True, "a validation by the clock has ended"),
    ],
)
def test_a_plain_model_checkpoint_that_can_not_wait_is_refused(train, tmp_path, settings, validates, named):
    with pytest.raises(ValueError, match=f"A ModelCheckpoint that saves when {named} .*use gvpo_lightning"):
        train(ModelCheckpoint(tmp_path / "a", **settings), validates=validates)
    train(ModelCheckpoint(tmp_path / "b", save_on_train_epoch_end=True), validates=validates)
    assert saved(tmp_path / "b") == [6]
