"""Real processes: whatever part of an update each rank has, it is the update of one big batch."""

import itertools

import pytest
import torch

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives import make_objective
from gvpo_lightning.objectives.settings import ObjectiveSettings
from gvpo_lightning.policy.head import completion_logprobs
from gvpo_lightning.policy.prepare import load_policy
from tests.error_budget import assert_within
from tests.forked import run_ranks
from tests.update_budget import sgd_update
from tests.updates.two_ranks_script import LR, RUNS, main


@pytest.fixture(scope="module")
def results(arithmetic, tmp_path_factory):
    """What every rank of every run left; runs on as many ranks share their processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for num_ranks in {run.ranks for run in RUNS.values()}:
        names = [name for name, run in RUNS.items() if run.ranks == num_ranks]
        run_ranks(folder, num_ranks, main, str(arithmetic / "model"), folder, names)
    return {
        name: [torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in range(run.ranks)]
        for name, run in RUNS.items()
    }


def same(ours, theirs) -> bool:
    """Whether two states are equal, their tensors to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    return repr(ours) == repr(theirs)  # where NaN is NaN


def check_agreement(ranks):
    """Every rank has the same rollouts, weights and metrics, whatever part of them was its own."""
    first, *others = ranks
    own = {name for name in first["metrics"] if name.startswith(("time/", "throughput/"))}
    for other in others:
        for name in first["metrics"].keys() - own:
            assert first["metrics"][name] == other["metrics"][name], name  # and finite
        for ours, theirs in zip(first["weights"], other["weights"], strict=True):
            assert same(ours, theirs)
        for ours, theirs in zip(first["rollouts"], other["rollouts"], strict=True):
            shared = ours.keys() - {"updates"}
            assert same({name: ours[name] for name in shared}, {name: theirs[name] for name in shared})


def gvpo_loss(logprobs, batch):
    """By its definition, over all completions of an update at once."""
    losses = []
    for group in batch.group_ids.unique():
        mine = batch.group_ids == group
        log_ratio = logprobs[mine].sum(1) - batch.reference_logprobs[mine].sum(1)
        reward = batch.rewards[mine]
        residual = 0.5 * (log_ratio - log_ratio.mean()) - (reward - reward.mean())
        losses.append(residual.square().sum() / (2 * (int(mine.sum()) - 1)))
    return torch.stack(losses).mean()


def loss_of(objective):
    """That of GVPO by its definition; those of the others are tested where they are."""
    if objective == "gvpo":
        return gvpo_loss
    function = make_objective(ObjectiveSettings(objective), 0.5, 4)
    return lambda logprobs, batch: function.loss(logprobs, batch, function.terms(batch)).loss


def check_updates(ranks, policy, objective):
    """Each update moved the weights by one big batch's gradient, and trained every group of two or more once."""
    states = [{name: p.detach().clone() for name, p in policy.named_parameters()}, *ranks[0]["weights"]]
    steps = itertools.pairwise(states)
    for rollout, *others in zip(*(rank["rollouts"] for rank in ranks), strict=True):
        batch = CompletionBatch(**rollout["batch"])
        trained = []
        for parts in zip(rollout["updates"], *(other["updates"] for other in others), strict=True):
            rows = [row for part in parts for micro_batch in part for row in micro_batch]
            before, after = next(steps)
            policy.load_state_dict(before)
            part = batch.select(torch.tensor(rows))
            update = sgd_update(policy, part, loss_of(objective), LR)
            for name, weight in update.weights.items():
                assert_within(after[name], weight, update.budgets[name], name)
            trained += rows
        sizes = batch.group_ids[batch.kept].bincount(minlength=len(rollout["prompts"]))
        assert sorted(trained) == (batch.kept & (sizes[batch.group_ids] >= 2)).nonzero().squeeze(1).tolist()
    assert next(steps, None) is None
    assert_within(ranks[0]["metrics"]["loss"], update.loss, update.loss_budget, "loss")
    _, entropies = completion_logprobs(policy, part, return_entropy=True)  # of the last update
    mean = float(entropies[part.completion_mask].mean())
    assert ranks[0]["metrics"]["entropy"] == pytest.approx(mean, rel=1e-4)  # of positive terms: nothing cancels


def updates_of(ranks):
    """Every update, as for each rank its micro-batches, with the rollout's group ids."""
    for rollouts in zip(*(rank["rollouts"] for rank in ranks), strict=True):
        for update in zip(*(rollout["updates"] for rollout in rollouts), strict=True):
            yield update, rollouts[0]["batch"]["group_ids"]


def num_trained(update) -> list[int]:
    """By each rank, fewest first."""
    return sorted(sum(map(len, micro_batches)) for micro_batches in update)


def is_cut(parts, group_ids) -> bool:
    """Whether a group has completions in several of them."""
    homes = [group for rows in parts for group in group_ids[rows].unique().tolist()]
    return len(homes) > len(set(homes))


@pytest.fixture
def run(results, arithmetic):
    """What the ranks of a run left, held against each other and against one big batch."""

    def checked(name) -> list[dict]:
        ranks = results[name]
        assert len(ranks[0]["weights"]) == RUNS[name].updates
        check_agreement(ranks)
        check_updates(ranks, load_policy(str(arithmetic / "model")), RUNS[name].objective)
        return ranks

    return checked


@pytest.mark.parametrize("name", ["even", "uneven"])
def test_update_over_two_ranks_is_that_of_one_big_batch(run, name):
    ranks = run(name)
    prompts = [prompt for rollout in ranks[0]["rollouts"] for prompt in rollout["prompts"]]
    passes = len(prompts) // 24
    assert passes >= 1
    assert sorted(prompts[: 24 * passes]) == sorted(passes * [f"{n}+{n % 7}=" for n in range(24)])
    assert ("replay" in ranks[0]["rollouts"][-1]["sources"]) == (name == "uneven")
    updates = list(updates_of(ranks))
    assert any(len(set(num_trained(update))) == 2 for update, _ in updates)  # or it would not show unequal ranks
    within = [any(is_cut(micro_batches, ids) for micro_batches in update) for update, ids in updates]
    between = [is_cut([list(itertools.chain(*rows)) for rows in update], ids) for update, ids in updates]
    assert any(within) == any(between) == (name == "uneven")


@pytest.mark.parametrize("objective", ["dpo", "policy_gradient"])
def test_other_objectives_over_two_ranks_are_those_of_one_big_batch(run, objective):
    ranks = run(objective)
    assert any(is_cut([list(itertools.chain(*rows)) for rows in update], ids) for update, ids in updates_of(ranks))
    assert ranks[0]["metrics"]["update/passes"] == (2 if objective == "dpo" else 1)


def test_a_group_that_two_ranks_share_unequally_trains_as_a_whole_one(run):
    ranks = run("spanning")
    assert all(num_trained(update) == [1, 2] for update, _ in updates_of(ranks))
    assert ranks[0]["metrics"]["update/passes"] == 2
    for rollout in ranks[0]["rollouts"]:
        assert rollout["completions"][:4] != rollout["completions"][4:]  # ranks do not sample the same


def test_a_rank_with_nothing_to_train_steps_with_the_other(run):
    assert all(num_trained(update) == [0, 3] for update, _ in updates_of(run("nothing to train")))


def test_a_rank_with_nothing_to_sample_steps_with_the_others(run):
    ranks = run("nothing to sample")
    assert all(num_trained(update) == [0, 1, 1] for update, _ in updates_of(ranks))
    assert ranks[0]["metrics"]["completion/dropped_fraction"] == 0
