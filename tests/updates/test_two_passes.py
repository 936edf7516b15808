"""What is known of an update's completions after its first pass, without a model."""

import pytest
import torch

from gvpo_lightning.updates.loss import sequence_coefficients
from gvpo_lightning.updates.meters import scatter
from tests.objectives.builders import assert_same, naive_loss, random_batch


def known(**changes):
    """The arguments for a batch of three groups, one token a completion, and the loss they belong to."""
    batch = random_batch((3, 5, 2), num_tokens=1)
    arguments = {
        "log_ratios": (batch.token_logprobs - batch.reference_logprobs).squeeze(1).detach(),
        "rewards": batch.rewards,
        "group_ids": batch.group_ids,
        "beta": batch.beta,
        "num_groups": 3,
        "max_log_ratio": 1e4,
    }
    return arguments | changes, batch


def test_coefficients_are_the_gradient_of_the_log_probs():
    arguments, batch = known()
    (expected,) = torch.autograd.grad(naive_loss(batch), batch.token_logprobs)
    assert_same(sequence_coefficients(**arguments), expected.squeeze(1))
    arguments, _ = known(num_groups=6)
    assert_same(sequence_coefficients(**arguments), expected.squeeze(1) / 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.5e4, -1.5e4])
def test_one_log_ratio_that_is_not_usable_makes_all_coefficients_zero(value):
    arguments, _ = known()
    assert sequence_coefficients(**arguments).abs().min() > 0
    arguments["log_ratios"][4] = value
    coefficients = sequence_coefficients(**arguments)
    assert torch.equal(coefficients, torch.zeros(10, dtype=coefficients.dtype))
    if abs(value) < torch.inf:
        assert sequence_coefficients(**arguments | {"max_log_ratio": 2e4}).abs().min() > 0


def test_scatter_puts_each_value_where_its_completion_stands_and_takes_none_of_an_empty_micro_batch():
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([9.0]), torch.tensor([3.0])]
    assert scatter(parts, [[4, 0], [], [2]], 6).tolist() == [2, 0, 3, 0, 1, 0]
    assert scatter([torch.tensor([9.0])], [[]], 2).tolist() == [0, 0]
    assert scatter([torch.tensor([9.0])], [[]], 0).tolist() == []
