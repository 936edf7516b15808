"""What an exception breaks off, a validation or a rollout, is done over by the run that is resumed."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.utils.data import DataLoader

from gvpo_lightning.callbacks import RunCheckpoint
from gvpo_lightning.checkpointing.resumption import NOTHING
from gvpo_lightning.rewards import RewardError
from tests.conftest import digit_reward

VALIDATED = [{"prompt": "99=", "answer": "1"}, {"prompt": "98=", "answer": "1"}]


class Judge:
    """A reward that fails from the call of this number on, of training or of validation."""

    in_process = True
    __name__ = "judge"

    def __init__(self, *, training: int = 0, validation: int = 0):
        self.failing, self.calls = {False: training, True: validation}, {False: 0, True: 0}

    def __call__(self, prompts, completions, **columns):
        validates = prompts[0] in ("99=", "98=")
        self.calls[validates] += 1
        if 0 < self.failing[validates] <= self.calls[validates]:
            raise KeyError("no judge")
        return digit_reward(prompts, completions)


class Validations(L.Callback):
    """After how many updates each has ended; at the second, the hook raises."""

    def __init__(self, hook: str = "", error: BaseException | None = None):
        self.ended = []
        if hook:

            def fail(trainer, module, *_):
                if trainer.global_step == 4:
                    raise error

            setattr(self, hook, fail)

    def on_validation_end(self, trainer, module):
        self.ended.append(trainer.global_step)


@pytest.fixture
def run(make_module, fit, prompts, weights, tmp_path):
    """A run of 8 updates, whose scheduler halves the lr at every validation but the first; gives weights and lr."""

    def train(*callbacks, reward=None, seed=0, **settings):
        def halved(optimizer):
            told = {"monitor": "validation/reward/mean", "mode": "max", "patience": 0, "factor": 0.5, "threshold": 9.0}
            return ReduceLROnPlateau(optimizer, **told)

        module = make_module(seed, reward=reward or Judge(), lr_scheduler=halved)
        options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
        options |= {"val_dataloaders": DataLoader(VALIDATED, collate_fn=list), "enable_checkpointing": True}
        options |= {"max_steps": 8, "callbacks": list(callbacks), "default_root_dir": tmp_path / "other"} | settings
        trainer = fit(module, **options)
        return weights(module), trainer.optimizers[0].param_groups[0]["lr"]

    return train


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("", None),  # the reward
        ("on_validation_batch_end", RuntimeError("broken")),
        pytest.param("on_validation_start", RuntimeError("broken"), marks=pytest.mark.slow),
        pytest.param("on_validation_batch_start", KeyboardInterrupt(), marks=pytest.mark.slow),
    ],
    ids=["reward", "batch end", "start", "ctrl-c"],
)
def test_a_validation_that_was_broken_off_is_run_anew(run, tmp_path, hook, error):
    through, after = Validations(), Validations()
    expected = run(through)
    reward = Judge(validation=0 if hook else 3)
    saver = RunCheckpoint(tmp_path, every_n_train_steps=100, save_on_exception=bool(hook))
    with pytest.raises((RewardError, RuntimeError, SystemExit)):
        run(saver, Validations(hook, error), reward=reward)
    ended = run(after, seed=5, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(ended[0], expected[0])
    assert ended[1] == expected[1]
    assert [*through.ended[:1], *after.ended] == through.ended == [2, 4, 6, 8]


def test_training_goes_on_after_a_validation_at_an_epochs_end_was_broken_off(run, tmp_path):
    options, through, after = {"val_check_interval": 6, "max_steps": 15}, Validations(), Validations()
    expected = run(through, **options)
    with pytest.raises(RewardError):
        run(RunCheckpoint(tmp_path), reward=Judge(validation=3), **options)
    ended = run(after, seed=5, ckpt_path=tmp_path / "last.ckpt", **options)
    assert torch.equal(ended[0], expected[0])
    assert [*through.ended[:1], *after.ended] == through.ended == [6, 12]


def test_a_rollout_that_has_failed_does_not_count_as_trained(run, tmp_path):
    """Where validations are counted over epochs, those that follow come when they would have."""
    through, before, after = Validations(), Validations(), Validations()
    expected = run(through, val_check_interval=3)
    with pytest.raises(RewardError):
        run(RunCheckpoint(tmp_path), before, reward=Judge(training=3), val_check_interval=3)
    ended = run(after, seed=5, ckpt_path=tmp_path / "last.ckpt", val_check_interval=3)
    assert torch.equal(ended[0], expected[0])
    assert before.ended + after.ended == through.ended == [3, 6]


def test_averaged_weights_are_not_saved_in_the_policys_place(run, tmp_path):
    """Within a validation that is where they are."""
    saver = RunCheckpoint(tmp_path, every_n_train_steps=100, save_on_exception=True)
    broken = Validations("on_validation_batch_start", RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken") as failed:
        run(saver, EMAWeightAveraging(decay=0.5), broken)
    assert failed.value.__notes__[-1] == NOTHING
    assert not list(tmp_path.rglob("*.ckpt"))
