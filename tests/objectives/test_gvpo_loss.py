"""The loss against its definition, its arguments and its errors."""

import math

import pytest
import torch

from gvpo_kernels.reference import prepare
from gvpo_lightning.objectives import gvpo as objectives
from tests.objectives.builders import Batch, assert_same, gradient, naive_loss, random_batch

BATCHES = {
    "ragged groups": {},
    "one group": {"sizes": (4,)},
    "many small groups": {"sizes": (2,) * 9},
    "dropped completions": {"dropped": 2},
    "lone groups": {"sizes": (1, 4, 1, 2)},
    "groups dropped whole": {"sizes": (0, 3, 0, 2), "dropped": 1},
    "one token": {"num_tokens": 1},
    "large beta": {"beta": 7.0},
}


@pytest.mark.parametrize("arguments", BATCHES.values(), ids=BATCHES)
def test_equals_the_definition(arguments):
    batch = random_batch(**arguments)
    loss, expected = objectives.gvpo_loss(*batch).loss, naive_loss(batch)
    assert expected > 0
    assert_same(loss, expected)
    assert_same(gradient(loss, batch), gradient(expected, batch))


@pytest.mark.parametrize("arguments", BATCHES.values(), ids=BATCHES)
def test_gradcheck(arguments):
    batch = random_batch(**arguments)

    def loss(token_logprobs):
        return objectives.gvpo_loss(token_logprobs, *batch[1:]).loss

    assert torch.autograd.gradcheck(loss, batch.token_logprobs)


def test_record():
    batch = random_batch((3, 1, 2), dropped=1)
    result = objectives.gvpo_loss(*batch)
    num_rows = len(batch.rewards)
    assert result.loss.shape == ()
    assert result.residuals.shape == result.log_ratios.shape == (num_rows,)
    kept = batch.completion_mask.any(1)
    difference = (batch.token_logprobs - batch.reference_logprobs).detach()
    assert_same(result.log_ratios, (difference * batch.completion_mask).sum(1))
    sizes = (batch.group_ids[:, None] == batch.group_ids)[:, kept].sum(1)
    assert (result.residuals[~kept | (sizes < 2)] == 0).all()
    assert (result.residuals[kept & (sizes >= 2)] != 0).all()
    assert not prepare(*batch).statistics.mean_log_ratio.requires_grad
    detached = [result.residuals, result.log_ratios, *result.metrics.values()]
    assert not any(tensor.requires_grad for tensor in detached)


def test_residuals_sum_to_zero_in_each_group():
    batch = random_batch((3, 5, 2), dropped=1)
    residuals = objectives.gvpo_loss(*batch).residuals
    for group in batch.group_ids.unique():
        assert abs(float(residuals[batch.group_ids == group].sum())) < 1e-12


def test_every_token_of_a_completion_has_its_residual_as_gradient():
    batch = random_batch((3, 5), dropped=1)
    result = objectives.gvpo_loss(*batch)
    sizes = (batch.group_ids[:, None] == batch.group_ids).sum(1) - 1
    expected = batch.beta * result.residuals / (2 * (sizes - 1))
    assert_same(gradient(result.loss, batch), expected[:, None] * batch.completion_mask)


def test_order_of_rows_and_names_of_groups_do_not_matter():
    batch = random_batch((3, 5, 2), dropped=1)
    shuffled = batch.rows(torch.randperm(len(batch.rewards), generator=torch.Generator().manual_seed(1)))
    names = dict(zip(batch.group_ids.unique().tolist(), (-7, 2, 2**62), strict=True))
    renamed = shuffled._replace(group_ids=torch.tensor([names[group] for group in shuffled.group_ids.tolist()]))
    assert_same(objectives.gvpo_loss(*renamed).loss, objectives.gvpo_loss(*batch).loss)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_types_of_group_ids(dtype):
    batch = random_batch((3, 2))
    ids = torch.unique(batch.group_ids, return_inverse=True)[1]
    expected = objectives.gvpo_loss(*batch).loss
    assert_same(objectives.gvpo_loss(*batch._replace(group_ids=ids.to(dtype))).loss, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_masks_of_zeros_and_ones(dtype):
    batch = random_batch()
    mask = batch.completion_mask.to(dtype)
    assert_same(objectives.gvpo_loss(*batch._replace(completion_mask=mask)).loss, objectives.gvpo_loss(*batch).loss)


def test_where_the_masked_tokens_stand_does_not_matter():
    batch = random_batch(dropped=1)
    moved = batch._replace(**{name: getattr(batch, name).flip(1) for name in Batch._fields[:3]})
    assert_same(objectives.gvpo_loss(*moved).loss, objectives.gvpo_loss(*batch).loss)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("loss", ["gvpo_loss", "gvpo_nll_loss", "gvpo_rl_loss"])
def test_garbage_behind_the_mask_never_leaks(loss, garbage):
    clean, dirty = (random_batch((3, 1, 2), dropped=1, garbage=value) for value in (0.0, garbage))
    results = [getattr(objectives, loss)(*batch) for batch in (clean, dirty)]
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(gradient(results[0].loss, clean), gradient(results[1].loss, dirty))
    for name, value in results[0].metrics.items():
        assert torch.equal(value, results[1].metrics[name]), name


@pytest.mark.parametrize("loss", ["gvpo_loss", "gvpo_nll_loss", "gvpo_rl_loss"])
@pytest.mark.parametrize(
    "batch",
    [random_batch((0, 0), dropped=3), random_batch((1, 1, 1)), random_batch((3,)).rows(slice(0, 0))],
    ids=["all dropped", "all lone", "no completions"],
)
def test_nothing_to_learn_from_is_a_zero_connected_to_the_graph(loss, batch):
    batch = batch._replace(token_logprobs=batch.token_logprobs.detach().requires_grad_())
    result = getattr(objectives, loss)(*batch)
    assert result.loss == 0
    assert (gradient(result.loss, batch) == 0).all()
    assert math.isnan(result.metrics.pop("implicit_reward/slope"))
    assert all(torch.isfinite(value) for value in result.metrics.values())


def test_num_groups_is_the_denominator():
    batch = random_batch((3, 5, 2))
    mean = objectives.gvpo_loss(*batch)
    share = objectives.gvpo_loss(*batch, num_groups=12)
    assert_same(share.loss * 12, mean.loss * 3)
    assert_same(gradient(share.loss, batch) * 12, gradient(mean.loss, batch) * 3)
    assert_same(share.residuals, mean.residuals)


def test_micro_batches_of_whole_groups_add_up_to_the_batch():
    batch = random_batch((3, 1, 5, 2), dropped=1)
    result = objectives.gvpo_loss(*batch)
    parts = [batch.rows(batch.group_ids == group) for group in batch.group_ids.unique()]
    total = sum(objectives.gvpo_loss(*part, num_groups=3).loss for part in parts)
    assert_same(total, result.loss)
    assert_same(gradient(total, batch), gradient(result.loss, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_summed_as_differences_in_float32(dtype):
    """Against the float64 loss of the same, already rounded, numbers: the arithmetic may add float32 noise alone."""
    batch = random_batch((4, 4), num_tokens=2048).to(dtype)
    result, expected = objectives.gvpo_loss(*batch), objectives.gvpo_loss(*batch.to(torch.float64))
    assert result.loss.dtype == result.residuals.dtype == torch.float32
    assert_same(result.log_ratios, expected.log_ratios, rtol=1e-5, atol=1e-3)
    assert_same(result.loss, expected.loss, rtol=1e-4)


def test_long_completions_close_to_their_reference_keep_their_small_log_ratio():
    """Two float32 sums near -12,000 nats would be off by about 1e-3 each; here the differences are exact."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(-3 * 2**20, -(2**10), (2, 8192), generator=generator) / 2**20
    difference = torch.randint(-(2**10), 2**10, (2, 8192), generator=generator) / 2**20
    token = reference + difference
    assert torch.equal(token - reference, difference)
    mask = torch.ones(2, 8192, dtype=torch.bool)
    result = objectives.gvpo_loss(token, reference, mask, torch.zeros(2), torch.zeros(2, dtype=torch.int64), 0.1)
    assert torch.equal(result.log_ratios.double(), difference.double().sum(1))


def test_gradient_has_the_dtype_of_its_input():
    batch = random_batch().to(torch.bfloat16)
    batch.token_logprobs.requires_grad_()
    assert gradient(objectives.gvpo_loss(*batch).loss, batch).dtype == torch.bfloat16


def test_nothing_but_the_policy_gets_a_gradient():
    batch = random_batch()
    batch.reference_logprobs.requires_grad_()
    batch.rewards.requires_grad_()
    for loss in (objectives.gvpo_loss, objectives.gvpo_nll_loss, objectives.gvpo_rl_loss):
        loss(*batch).loss.backward()
    assert batch.reference_logprobs.grad is None
    assert batch.rewards.grad is None


BATCH = random_batch((3, 2))
WRONG_ARGUMENTS = {
    "token_logprobs of one dimension": ({"token_logprobs": torch.zeros(5)}, r"token_logprobs must .* \(5,\)"),
    "token_logprobs of integers": ({"token_logprobs": torch.zeros(5, 6).long()}, r"token_logprobs must .*int64"),
    "reference of another shape": (
        {"reference_logprobs": torch.zeros(5, 7)},
        r"reference_logprobs .*\(5, 6\).*\(5, 7\)",
    ),
    "mask of another shape": ({"completion_mask": torch.zeros(4, 6)}, r"completion_mask .*\(5, 6\).*\(4, 6\)"),
    "too few rewards": ({"rewards": torch.zeros(4)}, r"rewards .*\(5,\).*\(4,\)"),
    "rewards of two dimensions": ({"rewards": torch.zeros(5, 1)}, r"rewards .*\(5,\).*\(5, 1\)"),
    "too many group ids": ({"group_ids": torch.zeros(6).long()}, r"group_ids .*\(5,\).*\(6,\)"),
    "floating group ids": ({"group_ids": torch.zeros(5)}, "group_ids must be integers, got torch.float32"),
    "boolean group ids": ({"group_ids": torch.zeros(5).bool()}, "group_ids must be integers, got torch.bool"),
    "beta of zero": ({"beta": 0.0}, "beta must be > 0, got 0.0"),
    "negative beta": ({"beta": -0.1}, "beta must be > 0, got -0.1"),
    "beta not a number": ({"beta": math.nan}, "beta must be > 0, got nan"),
}


@pytest.mark.parametrize("loss", ["gvpo_loss", "gvpo_nll_loss", "gvpo_rl_loss"])
@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments(loss, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(objectives, loss)(*BATCH._replace(**change))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_reward_on_a_kept_row_names_the_row(value):
    batch = random_batch((3, 5))
    batch.rewards[4] = value
    with pytest.raises(ValueError, match=rf"got {value} in row 4: drop that completion"):
        objectives.gvpo_loss(*batch)


def batch_at_the_optimum() -> Batch:
    """Sequence log-ratios of R / beta plus a constant a group, spread over the tokens."""
    batch = random_batch((4, 3, 5), dropped=1)
    offset = torch.unique(batch.group_ids, return_inverse=True)[1]
    log_ratio = batch.rewards / batch.beta + offset
    lengths = batch.completion_mask.sum(1)
    token_logprobs = batch.reference_logprobs + (log_ratio / lengths)[:, None]
    return batch._replace(token_logprobs=token_logprobs.detach().requires_grad_())


def test_loss_gradient_and_metrics_at_the_optimum():
    batch = batch_at_the_optimum()
    result = objectives.gvpo_loss(*batch)
    assert result.loss < 1e-24
    assert float(gradient(result.loss, batch).abs().max()) < 1e-12
    assert float(result.metrics["residual/rms"]) < 1e-12
    assert float(result.metrics["implicit_reward/slope"]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.5, 3.0])
def test_slope_measures_how_far_the_implicit_reward_went(slope):
    batch = batch_at_the_optimum()
    token_logprobs = torch.lerp(batch.reference_logprobs, batch.token_logprobs, slope)
    metrics = objectives.gvpo_loss(*batch._replace(token_logprobs=token_logprobs)).metrics
    assert float(metrics["implicit_reward/slope"]) == pytest.approx(slope, abs=1e-12)


def test_metrics_by_hand():
    """Two groups that count (one of equal rewards), a lone completion and a dropped one, one token each."""
    log_ratios = [0.5, -0.5, -1.0, -3.0, 9.0, 0.0]
    batch = Batch(
        token_logprobs=torch.tensor(log_ratios, dtype=torch.float64)[:, None] - 4,
        reference_logprobs=torch.full((6, 1), -4.0, dtype=torch.float64),
        completion_mask=torch.tensor([1, 1, 1, 1, 1, 0])[:, None],
        rewards=torch.tensor([1.0, 0.0, 0.3, 0.3, 1.0, math.nan], dtype=torch.float64),
        group_ids=torch.tensor([0, 0, 1, 1, 2, 3]),
        beta=0.1,
    )
    result = objectives.gvpo_loss(*batch)
    residuals = [-0.45, 0.45, 0.1, -0.1, 0, 0]
    assert_same(result.residuals, torch.tensor(residuals, dtype=torch.float64))
    expected = {
        "residual/rms": math.sqrt((2 * 0.45**2 + 2 * 0.1**2) / 4),
        "implicit_reward/slope": (0.05 * 0.5 * 2) / 0.5,
        "log_ratio/mean": -1.0,
        "log_ratio/max": 3.0,
        "group/zero_variance_fraction": 0.5,
        "group/dropped": 2.0,
        "objective/reward_term": -0.1 * 0.5 / 2,
        "objective/covariance_term": 0.0,
        "objective/variance_term": 0.5 * 0.01 * (0.5 + 2) / 2,
    }
    assert {name: float(value) for name, value in result.metrics.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 7, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_slope_whatever_rounding_does_to_their_mean(size, dtype):
    batch = random_batch((size,)).to(dtype)
    metrics = objectives.gvpo_loss(*batch._replace(rewards=torch.full((size,), 0.1, dtype=dtype))).metrics
    assert math.isnan(metrics["implicit_reward/slope"])
    assert float(metrics["group/zero_variance_fraction"]) == 1


def test_terms_add_up_to_the_loss_and_its_constant():
    batch = random_batch((3, 5, 2), dropped=1)
    result = objectives.gvpo_loss(*batch)
    constant = naive_loss(batch._replace(token_logprobs=torch.zeros_like(batch.token_logprobs)))
    names = ("objective/reward_term", "objective/variance_term", "objective/covariance_term")
    assert_same(sum(result.metrics[name] for name in names) + constant, result.loss)


@pytest.mark.parametrize("loss", ["gvpo_loss", "gvpo_nll_loss", "gvpo_rl_loss"])
def test_a_lone_completion_of_probability_zero_spoils_nothing(loss):
    batch = random_batch((3, 1))
    ids, counts = batch.group_ids.unique(return_counts=True)
    lone = batch.group_ids == ids[counts == 1]
    with torch.no_grad():
        batch.token_logprobs[lone, 0] = -math.inf
    result = getattr(objectives, loss)(*batch)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(gradient(result.loss, batch)).all()
    assert all(torch.isfinite(value) for value in result.metrics.values())
