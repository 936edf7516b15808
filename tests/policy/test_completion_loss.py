"""The loss fused with the model's head, against eager autograd through the model's own logits."""

import pytest
import torch

from gvpo_lightning.objectives.gvpo import gvpo_loss
from gvpo_lightning.policy.head import Scoring, completion_loss, padded_inputs
from gvpo_lightning.policy.head_check import check_logprob_head
from gvpo_lightning.policy.prepare import prepare_policy
from tests.error_budget import sum_budget
from tests.policy.conftest import CHANGED, FLOAT32_ALONE

NAMES = ["qwen2", "qwen2-tied", "llama", "phi-head-bias", "gpt2", *(n for n in CHANGED if n not in FLOAT32_ALONE)]


@pytest.fixture
def batch(ragged):
    """Two groups, one completion dropped, so that the second group has one left and doesn't count."""
    ragged.rewards = torch.tensor([1.0, 0.0, 0.5, torch.nan])
    ragged.reference_logprobs = -3 * torch.rand(
        ragged.completion_mask.shape, generator=torch.Generator().manual_seed(0)
    )
    return ragged


def own_logprobs(model, batch, temperature=1.0):
    """From the logits that the model gives for padded rows."""
    inputs, _ = padded_inputs(batch)
    logits = model(**inputs, use_cache=False).logits[:, batch.prompt_ids.shape[1] - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(-1, batch.completion_ids[..., None]).squeeze(-1) * batch.completion_mask


def eager_loss(model, batch, **options):
    logprobs = own_logprobs(model, batch)
    return gvpo_loss(
        logprobs, batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids, 0.3, **options
    )


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_eagers_in_float64(build_model, batch, name, implementation):
    model = build_model(name).double()
    prepare_policy(model)
    record = completion_loss(model, batch, 0.3, Scoring(implementation=implementation), num_groups=3)
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


@pytest.mark.parametrize("name", ["gemma3-softcap", "cohere-scaled", "granite-tied"])
def test_known_coefficients_at_a_temperature(build_model, batch, name):
    """The second pass of a cut update: the gradient of sum c_i log pi(y_i|x), formed as the tokens are met."""
    model = build_model(name).double()
    prepare_policy(model)
    coefficients = torch.tensor([0.3, -1.0, 0.7, 0.0], dtype=torch.float64)
    record = completion_loss(model, batch, 0.3, Scoring(0.6), sequence_coefficients=coefficients)
    log_ratios = (own_logprobs(model, batch, 0.6) - batch.reference_logprobs) * batch.completion_mask
    expected = (coefficients * log_ratios.sum(dim=1)).sum()
    torch.testing.assert_close(record.loss, expected, atol=1e-12, rtol=1e-12)
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (record.loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", ["qwen2", "gemma3-softcap", "granite-scaled"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_float32_is_no_worse_than_eager_float32(build_model, batch, implementation, name):
    def gradient(dtype, loss):
        model = build_model(name).to(dtype)
        prepare_policy(model)
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss(model), list(model.parameters()))])

    truth = gradient(torch.float64, lambda model: eager_loss(model, batch).loss)
    eager = gradient(torch.float32, lambda model: eager_loss(model, batch).loss)
    fused = gradient(
        torch.float32, lambda m: completion_loss(m, batch, 0.3, Scoring(implementation=implementation)).loss
    )
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
        assert check_logprob_head(model, Scoring(implementation=implementation)) < float(sum_budget(1.0))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="implementation='triton' cannot run here"):
        check_logprob_head(model, Scoring(implementation="triton"))
