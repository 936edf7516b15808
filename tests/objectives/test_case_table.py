"""The cases that decide whether an implementation is right: one test a case."""

import dataclasses
import math

import pytest
import torch

from gvpo_kernels import linear_logprob
from gvpo_kernels.reference import compute_residuals, prepare
from gvpo_lightning.objectives import gvpo as objectives
from tests.objectives.builders import assert_same, gradient, naive_loss, random_batch


def test_first_update_against_the_previous_policy_is_beta_times_centred_reinforce():
    batch = random_batch((3, 5))
    batch = batch._replace(reference_logprobs=batch.token_logprobs.detach().clone())
    sequence_logprobs = (batch.token_logprobs * batch.completion_mask).sum(1)
    reinforce = torch.zeros((), dtype=torch.float64)
    for group in batch.group_ids.unique():
        rows = batch.group_ids == group
        advantage = batch.rewards[rows] - batch.rewards[rows].mean()
        reinforce = reinforce - (advantage * sequence_logprobs[rows]).sum() / (rows.sum() - 1) / 2
    result = objectives.gvpo_loss(*batch)
    assert (result.log_ratios == 0).all()
    assert_same(gradient(result.loss, batch), batch.beta * gradient(reinforce, batch))


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_have_a_gradient_once_the_policy_has_moved(reward):
    batch = random_batch((4,))
    batch = batch._replace(rewards=torch.full_like(batch.rewards, reward))
    moved = gradient(objectives.gvpo_loss(*batch).loss, batch)
    assert moved.norm() > 0.01
    assert_same(moved, gradient(naive_loss(batch), batch))
    unmoved = batch._replace(reference_logprobs=batch.token_logprobs.detach())
    assert gradient(objectives.gvpo_loss(*unmoved).loss, unmoved).norm() == 0


def test_a_completion_with_an_empty_mask_leaves_its_group():
    """Size, means and k - 1 all shrink: as if the row had never been there, whatever its reward."""
    batch = random_batch((3, 5), dropped=2)
    kept = batch.completion_mask.any(1)
    without = batch.rows(kept)
    with_dropped, expected = objectives.gvpo_loss(*batch), objectives.gvpo_loss(*without)
    assert_same(with_dropped.loss, expected.loss)
    assert_same(with_dropped.residuals[kept], expected.residuals)
    assert (with_dropped.residuals[~kept] == 0).all()
    assert_same(gradient(with_dropped.loss, batch), gradient(expected.loss, batch))
    rewarded = batch._replace(rewards=batch.rewards.nan_to_num(1e6))
    assert torch.equal(objectives.gvpo_loss(*rewarded).loss, with_dropped.loss)


@pytest.mark.parametrize(("lone", "dropped"), [((1, 1), 0), ((0,), 2), ((1, 0), 1)])
def test_a_group_of_one_or_none_adds_nothing_and_is_counted(lone, dropped):
    batch = random_batch((3, *lone, 4), dropped=dropped)
    sizes = {g: int(batch.completion_mask[batch.group_ids == g].any(1).sum()) for g in batch.group_ids.tolist()}
    whole = torch.tensor([sizes[group] >= 2 for group in batch.group_ids.tolist()])
    result, expected = objectives.gvpo_loss(*batch), objectives.gvpo_loss(*batch.rows(whole))
    assert_same(result.loss, expected.loss)
    assert_same(gradient(result.loss, batch), gradient(expected.loss, batch))
    assert float(result.metrics["group/dropped"]) == len(lone)
    assert float(expected.metrics["group/dropped"]) == 0


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_group_spread_over_micro_batches_has_the_gradient_of_one_big_batch(micro_batch):
    """Two passes: statistics without gradient, then a backward pass a micro-batch with what is then known."""
    batch = random_batch((3, 5, 1), dropped=1)
    with torch.no_grad():
        everything = prepare(*batch)
    total = torch.zeros_like(batch.token_logprobs)
    for rows in torch.arange(len(batch.rewards)).split(micro_batch):
        part = prepare(*batch.rows(rows))
        statistics = dataclasses.replace(everything.statistics, index=everything.statistics.index[rows])
        residuals = compute_residuals(part.log_ratios, part.rewards, statistics, part.kept, batch.beta)
        total += gradient(0.5 * (everything.share[rows] * residuals.square()).sum(), batch)
    assert_same(total, gradient(naive_loss(batch), batch))


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_raises_on_a_kept_completion_alone(reward):
    batch = random_batch((3, 2), dropped=1)
    dropped_row = int((~batch.completion_mask.any(1)).nonzero()[0])
    kept_row = int(batch.completion_mask.any(1).nonzero()[-1])
    expected = objectives.gvpo_loss(*batch).loss
    batch.rewards[dropped_row] = reward
    assert torch.equal(objectives.gvpo_loss(*batch).loss, expected)
    batch.rewards[kept_row] = reward
    with pytest.raises(ValueError, match=f"row {kept_row}"):
        objectives.gvpo_loss(*batch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_ratio_that_is_not_finite_shows_in_the_loss(value):
    """The update can be skipped only if the loss does not hide it."""
    batch = random_batch((3, 2))
    with torch.no_grad():
        batch.token_logprobs[2, 0] = value
    assert not torch.isfinite(objectives.gvpo_loss(*batch).loss)


def test_policy_and_reference_are_taken_at_one_temperature():
    """The tempered policy's optimum is the closed form; the same logits at temperature 1 are not at it."""
    beta, temperature = 0.5, 2.0
    reference = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    optimum = reference + temperature * rewards / beta

    def loss(policy_temperature):
        policy, fixed = (
            linear_logprob(torch.ones(3, 1).double(), logits[:, None], torch.arange(3), temperature=t)[:, None]
            for logits, t in ((optimum, policy_temperature), (reference, temperature))
        )
        group_ids = torch.zeros(3, dtype=torch.int64)
        return float(objectives.gvpo_loss(policy, fixed, torch.ones(3, 1), rewards, group_ids, beta).loss)

    assert loss(temperature) < 1e-24
    assert loss(1.0) > 0.05


def test_a_truncated_completion_counts_like_any_other():
    """No EOS needed: whatever the mask holds is the completion, with its reward and its place in the mean."""
    batch = random_batch((4,), num_tokens=3)
    batch = batch._replace(completion_mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool())
    assert_same(objectives.gvpo_loss(*batch).loss, naive_loss(batch))


def test_dropped_groups_of_equal_rewards_are_the_callers_choice_only():
    """They are part of the mean, and counted, unless their completions are dropped."""
    batch = random_batch((2, 2))
    equal = batch.group_ids == batch.group_ids[0]
    batch = batch._replace(rewards=torch.where(equal, 1.0, batch.rewards))
    result = objectives.gvpo_loss(*batch)
    assert float(result.metrics["group/zero_variance_fraction"]) == 0.5
    assert gradient(result.loss, batch)[equal].norm() > 0
    dropped = batch._replace(completion_mask=batch.completion_mask & ~equal[:, None])
    assert_same(objectives.gvpo_loss(*dropped).loss, objectives.gvpo_loss(*batch.rows(~equal)).loss)
