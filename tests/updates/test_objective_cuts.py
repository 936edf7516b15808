"""However an update is cut into micro-batches and ranks, its gradient is the same, of every objective."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives import make_objective
from gvpo_lightning.objectives.settings import ObjectiveSettings
from gvpo_lightning.rollout.plan import GroupShape, Limits, plan_updates
from gvpo_lightning.updates.loss import coefficients_of
from tests.objectives.builders import assert_same
from tests.objectives.test_baselines import BETA, LONGEST, random_update

OBJECTIVES = [
    ObjectiveSettings(),
    ObjectiveSettings(variance_term=False),
    ObjectiveSettings(covariance_term=False),
    ObjectiveSettings(length_exponent=0.5),
    *(ObjectiveSettings(kind) for kind in ("grpo", "dr_grpo", "policy_gradient", "dpo", "sft")),
]
CASES = {
    "sizes": st.lists(st.integers(1, 5), min_size=1, max_size=5),
    "num_ranks": st.integers(1, 3),
    "accumulate": st.integers(1, 4),
    "completions": st.none() | st.integers(1, 8),
    "seed": st.integers(0, 20),
}


def rows_of(batch: CompletionBatch, rows) -> CompletionBatch:
    return CompletionBatch(**{name: tensor[rows] for name, tensor in batch.state_dict().items()})


def shapes(batch: CompletionBatch) -> list[GroupShape]:
    groups = [(batch.group_ids == group).nonzero().squeeze(1).tolist() for group in batch.group_ids.unique()]
    return [GroupShape(tuple(rows), 1, tuple(batch.lengths[rows].tolist())) for rows in groups]


def parts_loss(objective, policy, whole, terms, update) -> torch.Tensor:
    """The sum of one rank's micro-batches, as they are trained."""
    losses = []
    for rows, positions in zip(update.micro_batches, update.positions, strict=True):
        if not rows:
            continue
        part = rows_of(whole, list(positions))
        own = policy[list(rows)]
        if update.is_cut and objective.couples_groups:
            ratios = sum_completion_tokens(policy[list(update.rows)] - whole.reference_logprobs, whole.completion_mask)
            known = coefficients_of(ratios, lambda values: objective.sequence_loss(values, whole, terms), 1e4)
            losses.append((known[positions] * sum_completion_tokens(own, part.completion_mask)).sum())
        else:
            losses.append(objective.loss(own, part, terms.select(positions)).loss)
    return sum(losses, start=0 * policy.sum())


@pytest.mark.parametrize("chosen", OBJECTIVES, ids=str)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(case=st.fixed_dictionaries(CASES))
def test_any_cut_has_the_gradient_of_one_big_batch(chosen, case):
    policy, batch = random_update(case["sizes"], seed=case["seed"])
    objective = make_objective(chosen, BETA, LONGEST)
    total = torch.zeros_like(policy)
    for rank in range(case["num_ranks"]):
        (update,) = plan_updates(
            shapes(batch),
            rank=rank,
            num_ranks=case["num_ranks"],
            num_updates=1,
            accumulate=case["accumulate"],
            seed=0,
            limits=Limits(case["completions"]),
        )
        whole = rows_of(batch, list(update.rows))
        terms = objective.terms(whole)
        (gradient,) = torch.autograd.grad(parts_loss(objective, policy, whole, terms, update), policy)
        total += gradient
    (expected,) = torch.autograd.grad(objective.loss(policy[list(update.rows)], whole, terms).loss, policy)
    assert_same(total, expected, atol=1e-12)
