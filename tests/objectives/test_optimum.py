"""Minimising the loss leads where the theory says: pi' exp(R / beta) / Z, on response sets small enough to know it."""

import pytest
import torch
from torch import Tensor

from gvpo_lightning.objectives import gvpo as objectives

REFERENCE = torch.tensor([8, 4, 2, 1, 1], dtype=torch.float64) / 16
REWARDS = torch.tensor([0.0, 1.0, 0.3, -0.5, 0.8], dtype=torch.float64)
# How often each response stands in the one group that is trained on, so that this group's variance is, up to
# k / (k - 1), the exact variance under the sampling distribution: no Monte Carlo.
SAMPLING = {"uniform": (1, 1, 1, 1, 1), "reference": (8, 4, 2, 1, 1), "skewed mixture": (1, 1, 2, 3, 25)}


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return torch.softmax(reference.log() + rewards / beta, dim=-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


def train(reference: Tensor, rewards: Tensor, beta: float, counts, start: Tensor | None = None) -> tuple[Tensor, float]:
    """Minimise the loss of a softmax table, started at `start` (the reference): its probabilities and its loss.

    One row of `reference` and `rewards` a prompt; response j stands counts[j] times in every prompt's group.
    """
    reference, rewards = torch.atleast_2d(reference), torch.atleast_2d(rewards)
    logits = (reference.log() if start is None else torch.atleast_2d(start)).clone().requires_grad_()
    prompt = torch.arange(len(reference)).repeat_interleave(sum(counts))
    response = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).repeat(len(reference))

    def loss():
        return objectives.gvpo_loss(
            logits.log_softmax(-1)[prompt, response][:, None],
            reference.log()[prompt, response][:, None],
            torch.ones(len(prompt), 1),
            rewards[prompt, response],
            prompt,
            beta,
        ).loss

    def closure():
        logits.grad = None
        value = loss()
        value.backward()
        return value

    torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    ).step(closure)
    return logits.detach().softmax(-1).squeeze(0), float(loss().detach())


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("counts", SAMPLING.values(), ids=SAMPLING)
def test_any_full_support_sampling_reaches_the_closed_form(counts, beta):
    expected = optimum(REFERENCE, REWARDS, beta)
    assert kl(expected, REFERENCE) > 0.1
    reached, loss = train(REFERENCE, REWARDS, beta, counts)
    assert kl(reached, expected) < 1e-6
    assert loss < 1e-12


def test_the_start_does_not_matter():
    start = torch.tensor([-3.0, 2.0, 0.0, 1.0, -2.0], dtype=torch.float64)
    reached, _ = train(REFERENCE, REWARDS, 0.5, SAMPLING["uniform"], start)
    assert kl(reached, optimum(REFERENCE, REWARDS, 0.5)) < 1e-6


def test_missing_support_does_not_identify_the_optimum():
    """Without the second response in the samples a loss of 0 is reached far from the closed form, and twice."""
    counts, expected = (1, 0, 1, 1, 1), optimum(REFERENCE, REWARDS, 0.5)
    starts = [REFERENCE.log() + shift * torch.eye(5, dtype=torch.float64)[1] for shift in (-3.0, 3.0)]
    reached = [train(REFERENCE, REWARDS, 0.5, counts, start) for start in starts]
    assert all(loss < 1e-12 for _, loss in reached)
    assert all(kl(probabilities, expected) > 0.1 for probabilities, _ in reached)
    assert kl(reached[0][0], reached[1][0]) > 0.1
    seen = torch.tensor(counts) > 0
    for probabilities, _ in reached:  # among the responses that were sampled the optimum is right
        assert kl(probabilities[seen] / probabilities[seen].sum(), expected[seen] / expected[seen].sum()) < 1e-6


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_right_answers_gain_one_over_beta_nats(beta):
    """0/1 rewards: p* = p e^(1/beta) / (p e^(1/beta) + 1 - p) for each prompt, and not for the mean of p."""
    reference = torch.tensor([[0.1, 0.1, 0.3, 0.5], [0.2, 0.3, 0.2, 0.3], [0.05, 0.0125, 0.9, 0.0375]]).double()
    rewards = torch.tensor([[1, 1, 0, 0]] * 3).double()
    p = (reference * rewards).sum(1)
    boost = torch.tensor(1 / beta).double().exp()

    reached, _ = train(reference, rewards, beta, (1, 1, 1, 1))

    p_reached = (reached * rewards).sum(1)
    torch.testing.assert_close(p_reached, p * boost / (p * boost + 1 - p), rtol=0, atol=1e-6)
    of_the_mean = p.mean() * boost / (p.mean() * boost + 1 - p.mean())
    assert of_the_mean - p_reached.mean() > 0.005


def test_with_the_previous_policy_as_reference_the_pull_decays():
    """n steps, each to its optimum against the policy it started from: pi_0 exp(n R / beta) / Z."""
    policy = REFERENCE
    for n in range(1, 4):
        policy, _ = train(policy, REWARDS, 1.0, SAMPLING["uniform"])
        assert kl(policy, optimum(REFERENCE, REWARDS, 1.0 / n)) < 1e-6
    assert kl(policy, optimum(REFERENCE, REWARDS, 1.0)) > 0.05
