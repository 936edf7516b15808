"""Mistakes that an implementation of GVPO could make; each must turn ordinary tests red."""

import dataclasses

import pytest
import torch

from gvpo_kernels import reference
from gvpo_lightning.objectives import gvpo as objectives
from gvpo_lightning.rollout import plan
from gvpo_lightning.updates import meters
from tests.objectives import (
    test_case_table,
    test_group_over_ranks,
    test_gvpo_loss,
    test_optimum,
    test_views,
)
from tests.rollout import test_plan


def wrap_prepare(monkeypatch, change):
    """Replace what every view starts from by change(the right function, its arguments)."""
    right = reference.prepare

    def prepare(*arguments):
        arguments = (*arguments, None, None)[:8]  # num_groups and process_group are optional
        return change(right, *arguments)

    for module in (reference, objectives):
        monkeypatch.setattr(module, "prepare", prepare)


def loss_without(monkeypatch, *names):
    """The loss minus some of its three terms."""
    right = objectives.gvpo_loss

    def gvpo_loss(*batch, num_groups=None, process_group=None):
        result = right(*batch, num_groups=num_groups, process_group=process_group)
        terms = reference.rl_terms(reference.prepare(*batch, num_groups, process_group))
        return dataclasses.replace(result, loss=result.loss - sum(terms[name] for name in names))

    monkeypatch.setattr(objectives, "gvpo_loss", gvpo_loss)


def no_variance_term(monkeypatch):
    loss_without(monkeypatch, "objective/variance_term")


def no_covariance_term(monkeypatch):
    loss_without(monkeypatch, "objective/covariance_term")


def neither_term(monkeypatch):
    loss_without(monkeypatch, "objective/variance_term", "objective/covariance_term")


def rl_view_without(monkeypatch, name):
    right = reference.rl_terms
    for module in (reference, objectives):
        monkeypatch.setattr(module, "rl_terms", lambda batch: right(batch) | {name: 0 * right(batch)[name]})


def no_variance_term_in_the_rl_view(monkeypatch):
    rl_view_without(monkeypatch, "objective/variance_term")


def no_covariance_term_in_the_rl_view(monkeypatch):
    rl_view_without(monkeypatch, "objective/covariance_term")


def no_stop_gradient(monkeypatch):
    def change(right, *arguments):
        batch = right(*arguments)
        batch.residuals.detach = lambda: batch.residuals
        return batch

    wrap_prepare(monkeypatch, change)


def k_for_k_minus_1(monkeypatch):
    right = reference.GroupStatistics.weight

    def weight(self, kept):
        size = self.size[self.index].clamp(min=1)
        return right(self, kept) * (size - 1) / size

    monkeypatch.setattr(reference.GroupStatistics, "weight", weight)


def sum_instead_of_mean(monkeypatch):
    wrap_prepare(monkeypatch, lambda right, *arguments: right(*arguments[:6], 1, arguments[7]))


def mean_of_each_micro_batch(monkeypatch):
    wrap_prepare(monkeypatch, lambda right, *arguments: right(*arguments[:6], None, arguments[7]))


def change_updates(monkeypatch, change):
    right = plan.plan_updates
    monkeypatch.setattr(plan, "plan_updates", lambda *a, **k: [change(update) for update in right(*a, **k)])


def accumulation_forgotten(monkeypatch):
    change_updates(
        monkeypatch, lambda update: dataclasses.replace(update, scale=update.scale // len(update.micro_batches))
    )


def ranks_forgotten_in_the_scale(monkeypatch):
    change_updates(monkeypatch, lambda update: dataclasses.replace(update, scale=len(update.micro_batches)))


def cut_groups_trained_like_whole_ones(monkeypatch):
    change_updates(monkeypatch, lambda update: dataclasses.replace(update, is_cut=False))


def log_ratios_of_other_completions(monkeypatch):
    right = meters.scatter
    monkeypatch.setattr(meters, "scatter", lambda *arguments: right(*arguments).roll(1))


def dropped_completion_left_in_the_mean(monkeypatch):
    right = reference.group_statistics

    def group_statistics(log_ratios, rewards, sequence_logprobs, group_ids, kept, process_group=None):
        everything = torch.ones_like(kept)
        return right(log_ratios, rewards, sequence_logprobs, group_ids, everything, process_group)

    monkeypatch.setattr(reference, "group_statistics", group_statistics)


def reference_of_another_group(monkeypatch):
    def change(right, policy, reference_logprobs, mask, rewards, group_ids, *others):
        order = group_ids.argsort(stable=True)
        of_next_group = order.roll(-int((group_ids == group_ids.min()).sum()))
        shuffled = torch.empty_like(reference_logprobs)
        shuffled[order] = reference_logprobs[of_next_group]
        return right(policy, shuffled, mask, rewards, group_ids, *others)

    wrap_prepare(monkeypatch, change)


def last_token_not_counted(monkeypatch):
    right = reference.sum_completion_tokens

    def sum_completion_tokens(token_values, mask):
        num_tokens_from_here = mask.flip(1).cumsum(1).flip(1)
        return right(token_values, mask & (num_tokens_from_here > 1))

    monkeypatch.setattr(reference, "sum_completion_tokens", sum_completion_tokens)


def group_means_not_exchanged(monkeypatch):
    right = reference.group_statistics
    monkeypatch.setattr(reference, "group_statistics", lambda *arguments: right(*arguments[:5]))


def ranks_not_counted_in_the_loss(monkeypatch):
    def change(right, *arguments):
        batch = right(*arguments)
        return dataclasses.replace(batch, share=batch.share / test_group_over_ranks.WORLD_SIZE)

    wrap_prepare(monkeypatch, change)


UNIFORM = test_optimum.SAMPLING["uniform"]
# mistake -> ordinary tests with the arguments they are called with; every one of them must fail
MUTATIONS = {
    no_variance_term: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_views.test_the_gradient_is_that_of_the_squared_error, "gvpo_nll_loss", {}),
        (test_views.test_the_gradient_is_that_of_the_definition, {}),
        (test_optimum.test_any_full_support_sampling_reaches_the_closed_form, UNIFORM, 1.0),
    ],
    no_covariance_term: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_views.test_policy_gradient_with_a_kl_penalty_is_the_on_policy_special_case, 2, 1.0),
        (test_optimum.test_any_full_support_sampling_reaches_the_closed_form, UNIFORM, 1.0),
    ],
    neither_term: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_case_table.test_equal_rewards_have_a_gradient_once_the_policy_has_moved, 1.0),
    ],
    no_variance_term_in_the_rl_view: [
        (test_gvpo_loss.test_terms_add_up_to_the_loss_and_its_constant,),
        (test_views.test_the_gradient_is_that_of_the_squared_error, "gvpo_rl_loss", {}),
        (test_views.test_rl_value_is_the_loss_up_to_half_the_variance_of_its_target, {}),
    ],
    no_covariance_term_in_the_rl_view: [
        (test_gvpo_loss.test_terms_add_up_to_the_loss_and_its_constant,),
        (test_views.test_the_gradient_is_that_of_the_squared_error, "gvpo_rl_loss", {}),
        (test_views.test_rl_value_is_the_loss_up_to_half_the_variance_of_its_target, {}),
    ],
    no_stop_gradient: [
        (test_views.test_the_gradient_is_that_of_the_squared_error, "gvpo_nll_loss", {}),
        (test_views.test_the_gradient_is_that_of_the_definition, {}),
        (test_views.test_likelihood_without_the_stop_gradient_is_another_gradient,),
    ],
    k_for_k_minus_1: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_gvpo_loss.test_metrics_by_hand,),
        (test_views.test_rl_value_is_the_loss_up_to_half_the_variance_of_its_target, {}),
        (test_views.test_policy_gradient_with_a_kl_penalty_is_the_on_policy_special_case, 3, 1.0),
        (test_case_table.test_first_update_against_the_previous_policy_is_beta_times_centred_reinforce,),
    ],
    sum_instead_of_mean: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_plan.check_plan, [3, 2, 4, 1], 1, 1, 2),
    ],
    mean_of_each_micro_batch: [
        (test_gvpo_loss.test_num_groups_is_the_denominator,),
        (test_gvpo_loss.test_micro_batches_of_whole_groups_add_up_to_the_batch,),
        (test_plan.check_plan, [3, 2, 4, 1], 1, 1, 2),
        (test_plan.check_plan, [3, 2, 4, 1], 2, 1, 1),
    ],
    cut_groups_trained_like_whole_ones: [
        (test_plan.check_plan, [3, 2], 1, 1, 5),
        (test_plan.check_plan, [4], 2, 1, 1),
        (test_plan.check_plan, [4, 3, 2], 1, 1, 3, 0, plan.Limits(completions=3)),
    ],
    log_ratios_of_other_completions: [
        (test_plan.check_plan, [3, 2], 1, 1, 5),
        (test_plan.check_plan, [4], 2, 1, 1),
    ],
    accumulation_forgotten: [
        (test_plan.check_plan, [3, 2, 4, 1], 1, 1, 2),
        (test_plan.check_plan, [3, 2], 1, 1, 5),
    ],
    ranks_forgotten_in_the_scale: [
        (test_plan.check_plan, [3, 2, 4, 1], 2, 1, 1),
        (test_plan.check_plan, [4], 2, 1, 1),
    ],
    dropped_completion_left_in_the_mean: [
        (test_gvpo_loss.test_equals_the_definition, {"dropped": 2}),
        (test_case_table.test_a_completion_with_an_empty_mask_leaves_its_group,),
        (test_case_table.test_a_group_of_one_or_none_adds_nothing_and_is_counted, (1, 0), 1),
    ],
    reference_of_another_group: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_gvpo_loss.test_loss_gradient_and_metrics_at_the_optimum,),
        (test_optimum.test_right_answers_gain_one_over_beta_nats, 1.0),
    ],
    last_token_not_counted: [
        (test_gvpo_loss.test_equals_the_definition, {}),
        (test_gvpo_loss.test_every_token_of_a_completion_has_its_residual_as_gradient,),
        (test_case_table.test_a_truncated_completion_counts_like_any_other,),
    ],
}
PAIRS = [
    pytest.param(mutate, test, arguments, id=f"{mutate.__name__}: {test.__name__} {number}")
    for mutate, tests in MUTATIONS.items()
    for number, (test, *arguments) in enumerate(tests)
]


@pytest.mark.parametrize(("mutate", "test", "arguments"), PAIRS)
def test_mistake_is_seen(monkeypatch, mutate, test, arguments):
    test(*arguments)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)


@pytest.mark.parametrize("mutate", [group_means_not_exchanged, ranks_not_counted_in_the_loss])
def test_mistake_over_ranks_is_seen(tmp_path, mutate):
    ranks = test_group_over_ranks.run_ranks(tmp_path, mutate)
    with pytest.raises(AssertionError):
        test_group_over_ranks.test_mean_of_loss_and_gradient_is_the_big_batchs(ranks, "cut down the middle", None)
    with pytest.raises(AssertionError):
        test_group_over_ranks.test_mean_of_the_objectives_terms_is_the_big_batchs(ranks, "alternating rows")
