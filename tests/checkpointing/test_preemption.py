"""SIGTERM: the update is finished, a checkpoint saved, the status is 143, and the resumed run ends as if without it."""

import os
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gvpo_lightning.callbacks import SettingsWin, Whereabouts
from gvpo_lightning.checkpointing import preemption
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import RolloutSettings
from tests.checkpointing.survivor import assert_the_same_as

CASES = {
    "single, rolling out": ("single", "rollout", (0,)),
    "second of two ranks": ("ddp", "reward", (1,)),
    "both ranks": ("ddp", "training", (0, 1)),
}
SLOW = {
    "single, saving": ("single", "checkpoint", (0,)),
    "first of two ranks": ("ddp", "checkpoint", (0,)),
    "second of two ranks, FSDP2": ("fsdp2", "training", (1,)),
}


@pytest.mark.parametrize(
    ("strategy", "phase", "ranks"),
    [*CASES.values(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.values())],
    ids=[*CASES, *SLOW],
)
def test_after_sigterm_a_run_saves_stops_and_goes_on_bitwise(crew, through, tmp_path, strategy, phase, ranks):
    first = crew(strategy)
    assert first.wait_for(phase, 3)
    first.signal(signal.SIGTERM, *ranks)
    assert set(first.end()) == {143}, first.errors()
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    steps = [len((run / f"trained{rank}.jsonl").read_text().splitlines()) for rank in range(len(first.processes))]
    assert set(steps) == {steps[0]}
    assert 0 < steps[0] < 10
    assert os.readlink(last).endswith(f"step={steps[0]}.ckpt")
    assert f"SIGTERM: stopped at step {steps[0]} with status 143, resume with ckpt_path={last}" in first.errors()
    assert not (run / "ended0.pt").exists()
    assert set(crew(strategy).end()) == {0}
    assert_the_same_as(through(strategy), run, ranks=len(first.processes))


def test_sigterm_in_a_validation_within_the_run_ends_it_before_the_next_rollout(crew, through, tmp_path):
    """The epoch of 2 updates ends in a validation; its reward tells."""
    first = crew(validate=True)
    assert first.wait_for("checkpoint", 2)
    assert first.wait_for("reward")
    first.signal(signal.SIGTERM, 0)
    assert first.end() == [143], first.errors()
    assert len((tmp_path / "run" / "trained0.jsonl").read_text().splitlines()) == 2
    assert crew(validate=True).end() == [0]
    assert_the_same_as(through("single", validate=True), tmp_path / "run", ranks=1)


def test_sigterm_before_training_saves_nothing(crew, tmp_path):
    first = crew(validate=True, num_sanity_val_steps=2)
    assert first.wait_for("reward")
    first.signal(signal.SIGTERM, 0)
    assert first.end() == [143], first.errors()
    assert "nothing has been trained yet" in first.errors()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_second_sigterm_kills_at_once(crew):
    first = crew(sleep=0)
    assert first.wait_for("reward", 2)
    first.signal(signal.SIGTERM, 0)
    time.sleep(0.5)
    first.signal(signal.SIGTERM, 0)  # the same one by another way: no reason to give up the checkpoint
    time.sleep(preemption.REPEAT)
    assert first.processes[0].is_alive()
    first.signal(signal.SIGTERM, 0)
    assert first.end() == [-signal.SIGTERM]


def test_own_handlers_are_called_and_put_back_and_the_update_is_finished(make_module, fit, tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append("own"))
    own = signal.getsignal(signal.SIGTERM)

    try:
        rollout = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=8)
        module = make_module(reward=terminating_reward, rollout=rollout)
        with pytest.raises(SystemExit) as stopped:
            fit(module, accumulate_grad_batches=2)
        assert stopped.value.code == 143
        assert called == ["own"]
        assert signal.getsignal(signal.SIGTERM) is own
        assert (tmp_path / "stopped-step=1.ckpt").exists()
        resumed = make_module(rollout=rollout)
        trainer = fit(resumed, accumulate_grad_batches=2, ckpt_path=tmp_path / "stopped-step=1.ckpt")
        assert trainer.global_step == 8
    finally:
        signal.signal(signal.SIGTERM, before)


def terminating_reward(prompts, completions, **columns):
    os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]


def test_a_plain_model_checkpoint_saves_its_last(make_module, fit, tmp_path):
    plain = ModelCheckpoint(tmp_path / "plain", save_last=True)
    with pytest.raises(SystemExit):
        fit(make_module(reward=terminating_reward), enable_checkpointing=True, callbacks=[plain])
    assert torch.load(tmp_path / "plain" / "last.ckpt")["global_step"] == 1


def test_the_callbacks_are_there_once(make_module, fit, prompts):
    own = preemption.Preemption()
    module = make_module()
    trainer = fit(module, max_steps=1, callbacks=[own])
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, RolloutLoader(prompts, module))
    for kind in (preemption.Preemption, SettingsWin, Whereabouts):
        assert sum(isinstance(callback, kind) for callback in trainer.callbacks) == 1
    assert own in trainer.callbacks
