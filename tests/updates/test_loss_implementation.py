"""`loss_implementation`: every path trains the same policy, and a path that can't run is refused at the start."""

import logging

import pytest
import torch

from gvpo_lightning.rollout.settings import RolloutSettings


def train(make_module, fit, weights, implementation, dtype=torch.float32, **trainer_arguments):
    """Three SGD updates on one rollout, which depends on the first weights alone; the change of the weights."""
    module = make_module(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        rollout=RolloutSettings(group_size=4, prompts_per_rollout=12, prompts_per_update=4),
        loss_implementation=implementation,
    )
    module.policy.to(dtype)
    start = weights(module).double()
    fit(module, max_steps=3, **trainer_arguments)
    return weights(module).double() - start, module.rollout


def test_three_sgd_steps_are_the_same_in_every_implementation(make_module, fit, weights):
    truth, recorded = train(make_module, fit, weights, "reference", torch.float64)
    eager, rollout = train(make_module, fit, weights, "reference")
    assert torch.equal(rollout.batch.completion_ids, recorded.batch.completion_ids)
    budget = 2 * float((eager - truth).norm()) + 1e-6 * float(truth.norm())
    for implementation in ("torch", "triton"):
        ours, rollout = train(make_module, fit, weights, implementation)
        assert torch.equal(rollout.batch.completion_ids, recorded.batch.completion_ids)
        assert float((ours - truth).norm()) <= budget
    assert float(truth.norm()) > 0.01


def test_start_up_says_what_runs(make_module, fit, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(make_module(), max_steps=1)
    assert "runs in the 'torch' implementation (loss_implementation='auto')" in caplog.text


def test_a_named_implementation_that_can_not_run_is_an_error_not_a_fallback(make_module, fit, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    module = make_module(loss_implementation="triton")
    with pytest.raises(ValueError, match="implementation='triton' cannot run here"):
        fit(module)
    assert module.microstep == 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_triton_trains_on_a_gpu_as_eager_does(make_module, fit, weights, precision):
    options = {"accelerator": "gpu", "devices": 1, "precision": precision}
    truth, _ = train(make_module, fit, weights, "reference", **options)
    ours, _ = train(make_module, fit, weights, "triton", **options)
    assert torch.nn.functional.cosine_similarity(ours, truth, dim=0) > 0.99
