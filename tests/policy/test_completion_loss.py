"""The loss fused with the model's head, against eager autograd through the model's own logits."""

import pytest
import torch

from gvpo_lightning.head import completion_logprobs, completion_loss
from gvpo_lightning.head_check import check_logprob_head
from gvpo_lightning.objectives import gvpo_loss
from gvpo_lightning.policy import prepare_policy

PLAIN = ["qwen2", "qwen2-tied", "llama", "phi-head-bias", "gpt2"]


@pytest.fixture
def batch(ragged):
    """Two groups, one completion dropped, so that the second group has one left and doesn't count."""
    ragged.rewards = torch.tensor([1.0, 0.0, 0.5, torch.nan])
    ragged.reference_logprobs = -3 * torch.rand(
        ragged.completion_mask.shape, generator=torch.Generator().manual_seed(0)
    )
    return ragged


def eager_loss(model, batch, **options):
    logprobs, _ = completion_logprobs(model, batch, implementation="reference")
    return gvpo_loss(
        logprobs, batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids, 0.3, **options
    )


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradients_are_eagers_in_float64(build_model, batch, name, implementation):
    model = build_model(name).double()
    prepare_policy(model)
    record = completion_loss(model, batch, 0.3, num_groups=3, implementation=implementation)
    expected = eager_loss(model, batch, num_groups=3)
    torch.testing.assert_close(record.loss, expected.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(record.residuals, expected.residuals, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(record.log_ratios, expected.log_ratios, atol=1e-12, rtol=1e-12)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(3 * record.loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(3 * expected.loss, parameters, allow_unused=True)
    for mine, truth in zip(ours, theirs, strict=True):
        assert (mine is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(mine, truth, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_float32_is_no_worse_than_eager_float32(build_model, batch, implementation):
    def gradient(dtype, loss):
        model = build_model("qwen2").to(dtype)
        prepare_policy(model)
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss(model), list(model.parameters()))])

    truth = gradient(torch.float64, lambda model: eager_loss(model, batch).loss)
    eager = gradient(torch.float32, lambda model: eager_loss(model, batch).loss)
    fused = gradient(torch.float32, lambda m: completion_loss(m, batch, 0.3, implementation=implementation).loss)
    assert (fused - truth).norm() <= 2 * (eager - truth).norm() + 1e-7 * truth.norm()


def test_frozen_head_gives_no_gradient_there_and_the_same_elsewhere(build_model, batch):
    model = build_model("qwen2").double()
    prepare_policy(model)
    model.lm_head.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(completion_loss(model, batch, 0.3).loss, parameters)
    theirs = torch.autograd.grad(eager_loss(model, batch).loss, parameters)
    for mine, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-11, rtol=1e-9)


def test_everything_dropped_is_a_connected_zero(build_model, batch):
    model = build_model("qwen2")
    prepare_policy(model)
    batch.drop(torch.ones(4, dtype=torch.bool))
    record = completion_loss(model, batch, 0.3)
    record.loss.backward()
    assert float(record.loss) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


def test_start_up_check_covers_the_named_implementation(build_model, monkeypatch):
    model = build_model("qwen2")
    prepare_policy(model)
    for implementation in ("auto", "torch", "triton", "reference"):
        assert check_logprob_head(model, implementation) < 1e-5
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="implementation='triton' cannot run here"):
        check_logprob_head(model, "triton")
