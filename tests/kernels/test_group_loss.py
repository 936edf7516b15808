"""The loss over packed groups: padded torch and the Triton kernels against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_kernels import group_loss, gvpo_loss
from tests.kernels.head_problems import make_completions

IMPLEMENTATIONS = ["torch", "triton"]
LENGTHS, GROUPS = [5, 0, 7, 1, 200, 3, 0, 9, 4], [4, 4, 4, -2, -2, 9, 9, 4, 7]


def arguments(batch):
    return batch.reference_logprobs, batch.cu_seqlens, batch.rewards, batch.group_ids, batch.beta


def results(batch, implementation, *, dtype=torch.float64, upstream=3.0, **options):
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(len(batch.reference_logprobs), generator=generator, dtype=torch.float64)
    logprobs = (batch.reference_logprobs + 0.3 * noise.to(batch.rewards.device)).to(dtype).requires_grad_()
    batch = replace(batch, reference_logprobs=batch.reference_logprobs.to(dtype))
    record = group_loss(logprobs, *arguments(batch), implementation=implementation, **options)
    (upstream * record.loss).backward()
    return record.loss.detach(), record.log_ratios, record.residuals, logprobs.grad


def by_definition(batch, logprobs):
    """Loop over groups and completions: nothing shared with the code under test."""
    starts, losses, residuals = batch.cu_seqlens.tolist(), [], torch.zeros(len(batch.rewards)).double()
    for group in sorted(set(batch.group_ids.tolist())):
        kept = [i for i, g in enumerate(batch.group_ids.tolist()) if g == group and starts[i + 1] > starts[i]]
        if len(kept) < 2:
            continue
        ratios = torch.stack([(logprobs - batch.reference_logprobs)[starts[i] : starts[i + 1]].sum() for i in kept])
        rewards = batch.rewards[kept]
        residual = batch.beta * (ratios - ratios.mean()) - (rewards - rewards.mean())
        residuals[kept] = residual.detach()
        losses.append(residual.square().sum() / (2 * (len(kept) - 1)))
    return torch.stack(losses).mean(), residuals


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_definition(implementation):
    batch = make_completions(LENGTHS, GROUPS)
    logprobs = (batch.reference_logprobs + 0.2).requires_grad_()
    record = group_loss(logprobs, *arguments(batch), implementation=implementation)
    expected, residuals = by_definition(batch, logprobs)
    torch.testing.assert_close(record.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(record.residuals, residuals, rtol=1e-12, atol=1e-14)
    actual, wanted = (torch.autograd.grad(loss, logprobs)[0] for loss in (record.loss, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
    assert not record.log_ratios.requires_grad
    assert not record.residuals.requires_grad


@pytest.mark.usefixtures("_poisoned")
@given(data=st.data())
@settings(max_examples=25)
def test_any_groups(data, device):
    lengths = data.draw(st.lists(st.integers(0, 90), min_size=0, max_size=12), "lengths")
    groups = data.draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)), "groups")
    num_groups = data.draw(st.sampled_from([None, 1, 5]), "num_groups")
    batch = make_completions(lengths, groups, device=device)
    if data.draw(st.booleans(), "int64"):
        batch = replace(batch, cu_seqlens=batch.cu_seqlens.long())
    ours = results(batch, "triton", num_groups=num_groups)
    truth = results(batch, "torch", num_groups=num_groups)
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype, implementation, device):
    batch = make_completions([2000, 1500], [0, 0], device=device)
    loss, log_ratios, _, grad = results(batch, implementation, dtype=dtype)
    assert loss.dtype == log_ratios.dtype == torch.float32
    assert grad.dtype == dtype
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(3500, generator=generator, dtype=torch.float64).to(device)
    policy, reference = (
        t.to(dtype).double() for t in (batch.reference_logprobs + 0.3 * noise, batch.reference_logprobs)
    )
    expected = torch.stack([piece.sum() for piece in (policy - reference).split([2000, 1500])])
    torch.testing.assert_close(log_ratios.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_size", [2, 5, 64, 512])
def test_group_sizes(group_size, implementation, device):
    batch = make_completions([3] * group_size + [4, 4], [1] * group_size + [0, 0], device=device)
    for actual, expected in zip(results(batch, implementation), results(batch, "reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_agrees_with_the_padded_loss(implementation):
    batch = make_completions([4] * 6, [0, 1] * 3)
    policy = (batch.reference_logprobs * 1.1).requires_grad_()
    padded = gvpo_loss(
        policy.view(6, 4),
        batch.reference_logprobs.view(6, 4),
        torch.ones(6, 4),
        batch.rewards,
        batch.group_ids,
        batch.beta,
    )
    record = group_loss(policy, *arguments(batch), implementation=implementation)
    torch.testing.assert_close(record.loss, padded.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(record.residuals, padded.residuals, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bitwise_equal(implementation, device):
    batch = make_completions([300, 700, 20, 433] * 4, list(range(4)) * 4, device=device)
    first, second = (results(batch, implementation, dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lengths", "groups"), [([], []), ([0, 0], [1, 1]), ([3, 4], [0, 1])])
def test_nothing_that_counts_is_a_connected_zero(lengths, groups, implementation, device):
    loss, _, residuals, grad = results(make_completions(lengths, groups, device=device), implementation)
    assert loss == 0
    assert residuals.abs().sum() == 0
    assert grad.abs().sum() == 0


def test_largest_group_of_the_kernel_is_refused_by_name(device):
    batch = make_completions([1] * 513, [0] * 513, device=device)
    with pytest.raises(ValueError, match=r"group_ids must put at most 512 .* use implementation='torch'"):
        results(batch, "triton")
    assert results(batch, "torch")[0] > 0
    assert results(batch, "auto")[0] > 0


def test_second_derivative_is_refused(device):
    batch = make_completions([3, 4], [0, 0], device=device)
    logprobs = batch.reference_logprobs.clone().requires_grad_()
    loss = group_loss(logprobs * 1.5, *arguments(batch), implementation="triton").loss
    (grad,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


WRONG = {
    "two dimensions": (0, torch.zeros(2, 6), "token_logprobs must be floating"),
    "integer log-probs": (0, torch.zeros(12).long(), "token_logprobs must be floating"),
    "reference shape": (1, torch.zeros(11), r"reference_logprobs must be floating \(12,\)"),
    "short": (2, torch.tensor([0, 3, 7, 11]), "cu_seqlens must rise from 0 to the number of tokens 12"),
    "late start": (2, torch.tensor([1, 3, 7, 12]), "cu_seqlens must rise from 0"),
    "falling": (2, torch.tensor([0, 7, 3, 12]), "cu_seqlens must rise from 0"),
    "floating offsets": (2, torch.tensor([0.0, 3, 7, 12]), "cu_seqlens must be .* int32 or int64"),
    "reward count": (3, torch.zeros(2), r"rewards must have one entry a completion, shape \(3,\)"),
    "reward": (3, torch.tensor([0, torch.nan, 1]), "rewards must be finite for every kept completion, got nan"),
    "group count": (4, torch.zeros(4).long(), "group_ids must have one entry"),
    "floating groups": (4, torch.zeros(3), "group_ids must be integers"),
    "beta": (5, 0.0, "beta must be > 0"),
}


@pytest.mark.parametrize(("position", "value", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(position, value, message):
    batch = make_completions([3, 4, 5], [0, 0, 0])
    columns = [torch.zeros(12), *arguments(batch)]
    columns[position] = value
    with pytest.raises(ValueError, match=message):
        group_loss(*columns)


def test_wrong_number_of_groups():
    batch = make_completions([3, 4], [0, 0])
    with pytest.raises(ValueError, match="num_groups must be >= 1, got 0"):
        group_loss(torch.zeros(7), *arguments(batch), num_groups=0)
