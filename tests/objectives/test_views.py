"""Likelihood, squared error, reinforcement learning: three views of one gradient."""

import itertools

import pytest
import torch

from gvpo_kernels.reference import prepare
from gvpo_lightning.objectives import gvpo as objectives
from tests.objectives.builders import assert_same, gradient, naive_loss, random_batch

BATCHES = {
    "ragged groups": {},
    "dropped and lone": {"sizes": (1, 4, 3, 0), "dropped": 1},
    "large beta": {"beta": 5.0},
}


@pytest.mark.parametrize("view", ["gvpo_nll_loss", "gvpo_rl_loss"])
@pytest.mark.parametrize("arguments", BATCHES.values(), ids=BATCHES)
def test_the_gradient_is_that_of_the_squared_error(view, arguments):
    batch = random_batch(**arguments)
    result, squared_error = getattr(objectives, view)(*batch), objectives.gvpo_loss(*batch)
    assert_same(gradient(result.loss, batch), gradient(squared_error.loss, batch), rtol=0, atol=1e-10)
    assert_same(result.residuals, squared_error.residuals)
    assert_same(result.log_ratios, squared_error.log_ratios)
    assert result.metrics.keys() == squared_error.metrics.keys()


@pytest.mark.parametrize("arguments", BATCHES.values(), ids=BATCHES)
def test_the_gradient_is_that_of_the_definition(arguments):
    batch = random_batch(**arguments)
    expected = gradient(naive_loss(batch), batch)
    for view in (objectives.gvpo_loss, objectives.gvpo_nll_loss, objectives.gvpo_rl_loss):
        assert_same(gradient(view(*batch).loss, batch), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("arguments", BATCHES.values(), ids=BATCHES)
def test_rl_value_is_the_loss_up_to_half_the_variance_of_its_target(arguments):
    """The constant, Var(beta log pi' + R) / 2 averaged over the groups, by torch.var rather than by the loss."""
    batch = random_batch(**arguments)
    target = batch.beta * (batch.reference_logprobs * batch.completion_mask).sum(1) + batch.rewards
    kept = batch.completion_mask.any(1)
    groups = [target[kept & (batch.group_ids == group)] for group in batch.group_ids.unique()]
    constant = torch.stack([group.var() / 2 for group in groups if len(group) >= 2]).mean()
    assert_same(objectives.gvpo_rl_loss(*batch).loss + constant, objectives.gvpo_loss(*batch).loss)


def test_likelihood_without_the_stop_gradient_is_another_gradient():
    """The mistake of a published re-implementation. It also shows that the tests above can tell the two apart."""
    batch = random_batch()
    prepared = prepare(*batch)
    mistaken = batch.beta * (prepared.share * prepared.residuals * prepared.sequence_logprobs).sum()
    right, wrong = gradient(objectives.gvpo_nll_loss(*batch).loss, batch), gradient(mistaken, batch)
    assert_same(mistaken, objectives.gvpo_nll_loss(*batch).loss)
    assert (right - wrong).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_policy_gradient_with_a_kl_penalty_is_the_on_policy_special_case(size, beta):
    """E over all groups drawn from pi of grad L  =  -beta grad (E[R] - beta KL(pi || pi')), by enumeration."""
    generator = torch.Generator().manual_seed(0)
    logits, reference, rewards = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    logprobs, reference = logits.log_softmax(0), reference.log_softmax(0)
    probabilities = logprobs.exp()

    expected_loss = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(4), repeat=size):
        rows = torch.tensor(group)
        result = objectives.gvpo_loss(
            logprobs[rows, None],
            reference[rows, None],
            torch.ones(size, 1, dtype=torch.bool),
            rewards[rows],
            torch.zeros(size, dtype=torch.int64),
            beta,
        )
        expected_loss = expected_loss + probabilities[rows].prod().detach() * result.loss
    (gvpo,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)

    objective = (probabilities * (rewards - beta * (logprobs - reference))).sum()
    (policy_gradient,) = torch.autograd.grad(objective, logits)
    assert policy_gradient.norm() > 0.1
    assert_same(gvpo, -beta * policy_gradient)
