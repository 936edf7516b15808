"""However an update is cut, its gradient is that of one big batch."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_lightning import objectives, plan
from gvpo_lightning.seeding import derive_seed, seeded_permutation
from tests.objectives.builders import Batch, assert_same, gradient, naive_loss, random_batch


def plans(group_sizes, per_update, accumulate, seed=0):
    """The updates of every rank, in the order of the updates: [update][rank]."""
    arguments = {"prompts_per_update": per_update, "accumulate": accumulate, "seed": seed}
    ranks = [plan.plan_updates(group_sizes, rank=rank, **arguments) for rank in range(len(group_sizes))]
    return list(zip(*ranks, strict=True))


def rollout(group_sizes, dropped=1) -> Batch:
    """A batch whose group ids are rank * 100 + group, with `dropped` dropped completions in every group."""
    sizes = [size for rank in group_sizes for size in rank]
    batch = random_batch(sizes, dropped=dropped)
    names = torch.tensor([100 * rank + group for rank, sizes in enumerate(group_sizes) for group in range(len(sizes))])
    kept = batch.completion_mask.any(1)
    unnamed = batch.group_ids.unique().tolist()  # any matching of names with sizes will do, if it is the right size
    by_size = {g: int((kept & (batch.group_ids == g)).sum()) for g in unnamed}
    taken = dict(zip(sorted(unnamed, key=by_size.get), names[torch.tensor(sizes).argsort(stable=True)], strict=True))
    return batch._replace(group_ids=torch.stack([taken[g] for g in batch.group_ids.tolist()]))


def planned_gradient(batch: Batch, update) -> torch.Tensor:
    """What Lightning and DDP make of an update: a mean over micro-batches, then a mean over ranks."""
    total = torch.zeros_like(batch.token_logprobs)
    for rank, part in enumerate(update):
        for groups in part.micro_batches:
            rows = torch.isin(batch.group_ids, torch.tensor([100 * rank + group for group in groups]))
            loss = objectives.gvpo_loss(*batch.rows(rows), num_groups=part.num_groups).loss * part.scale
            total += gradient(loss, batch) / len(part.micro_batches) / len(update)
    return total


def check_plan(group_sizes, per_update, accumulate, seed=0):
    """Every update's gradient is its groups' big batch's; every group that counts is trained exactly once."""
    batch = rollout(group_sizes)
    trained = []
    updates = plans(group_sizes, per_update, accumulate, seed)
    for update in updates:
        assert all(len(part.micro_batches) == accumulate for part in update)
        groups = [100 * rank + g for rank, part in enumerate(update) for bins in part.micro_batches for g in bins]
        assert [part.num_groups for part in update] == [len(groups)] * len(update)
        big_batch = batch.rows(torch.isin(batch.group_ids, torch.tensor(groups)))
        assert_same(planned_gradient(batch, update), gradient(naive_loss(big_batch), batch))
        trained += groups
    counting = [100 * r + g for r, sizes in enumerate(group_sizes) for g, size in enumerate(sizes) if size >= 2]
    assert sorted(trained) == counting
    return updates


@st.composite
def cut_rollouts(draw):
    world_size, per_rank, num_updates = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups = st.lists(st.integers(0, 4), min_size=per_rank * num_updates, max_size=per_rank * num_updates)
    group_sizes = [draw(groups) for _ in range(world_size)]
    return group_sizes, per_rank * world_size, draw(st.integers(1, 5)), draw(st.integers(0, 10))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(cut_rollouts())
def test_any_cut_has_the_gradient_of_one_big_batch(case):
    check_plan(*case)


def test_one_update_has_one_gradient_for_every_accumulation_and_number_of_ranks():
    sizes = [3, 2, 4, 1, 2, 0, 3, 2, 3, 4, 2, 2]
    whole = rollout([sizes])
    expected = gradient(objectives.gvpo_loss(*whole).loss, whole)
    for world_size, accumulate in itertools.product((1, 2, 3, 4), (1, 2, 5, 12, 20)):
        cut = [sizes[rank::world_size] for rank in range(world_size)]
        ids = whole.group_ids
        batch = whole._replace(group_ids=100 * (ids % world_size) + ids // world_size)
        (update,) = plans(cut, len(sizes), accumulate)
        assert_same(planned_gradient(batch, update), expected)


def test_more_micro_batches_than_groups_leaves_some_empty():
    (update,) = check_plan([[2, 3]], 2, 5)[0]
    assert sorted(map(len, update.micro_batches)) == [0, 0, 0, 1, 1]


def test_an_update_of_groups_that_do_not_count_is_empty_and_harmless():
    (update,) = check_plan([[0, 1, 1]], 3, 2)[0]
    assert update.micro_batches == ((), ())
    assert update.num_groups == 0
    assert planned_gradient(rollout([[0, 1, 1]]), (update,)).norm() == 0


def test_a_rank_of_dropped_groups_still_steps_through_its_micro_batches():
    (first, second) = check_plan([[3, 2, 4], [0, 1, 1]], 6, 3)[0]
    assert sum(map(len, first.micro_batches)) == 3
    assert second.micro_batches == ((), (), ())
    assert first.num_groups == second.num_groups == 3


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [[2, 5, 3, 8, 2, 2, 6, 4, 3], [9, 2, 2, 2, 2, 2]])
def test_micro_batches_hold_at_most_their_share_of_the_groups(sizes, accumulate):
    (update,) = plans([sizes], len(sizes), accumulate)[0]
    assert max(map(len, update.micro_batches)) <= -(-len(sizes) // accumulate)


@pytest.mark.parametrize(("sizes", "load"), [([2, 4, 2], 4), ([2, 3, 4, 5], 7), ([6, 2, 5, 3], 8)])
def test_micro_batches_are_balanced(sizes, load):
    (update,) = plans([sizes], len(sizes), 2)[0]
    assert [sum(sizes[group] for group in groups) for groups in update.micro_batches] == [load, load]


def test_order_is_a_function_of_the_seed_and_shuffles():
    sizes = [[2] * 12, [3] * 12]
    assert plans(sizes, 4, 2, seed=1) == plans(sizes, 4, 2, seed=1)
    orders = [[part.micro_batches for update in plans(sizes, 4, 2, seed) for part in update] for seed in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first_rank, second_rank = orders[0][0::2], orders[0][1::2]
    assert first_rank != second_rank


def test_which_groups_share_an_update_does_not_depend_on_the_accumulation():
    def members(accumulate):
        return [{g for bins in part.micro_batches for g in bins} for (part,) in plans([[2] * 12], 4, accumulate)]

    assert members(1) == members(2) == members(4)


def test_permutation_depends_on_its_purpose_alone():
    torch.manual_seed(0)
    first = seeded_permutation(20, 7, "update order", 0)
    torch.manual_seed(1)
    assert seeded_permutation(20, 7, "update order", 0) == first
    assert sorted(first) == list(range(20)) != first
    assert seeded_permutation(20, 7, "other", 0) != first
    assert seeded_permutation(20, 8, "update order", 0) != first


def test_seeds_are_the_same_on_every_machine_and_differ_between_purposes():
    assert derive_seed(0, "rollout", 1) == 20203844001317467
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed("1", "23"), derive_seed(1, "23")}) == 4


RIGHT = {
    "group_size": 4,
    "prompts_per_rollout": 12,
    "prompts_per_update": 6,
    "micro_batch_size": 8,
    "accumulate": 2,
    "world_size": 2,
}
WRONG = {
    "rollout not whole updates": {"prompts_per_rollout": 13},
    "update not whole ranks": {"prompts_per_update": 3},
    "micro-batch below a group": {"micro_batch_size": 3},
    "update over the micro-batches": {"accumulate": 1},
    "micro-batch not whole groups": {"micro_batch_size": 7},
}


def mends(message: str) -> list[dict[str, int]]:
    """The settings that an error tells its reader to make; those joined by `and` go together."""
    advice = message[message.index(" Set ") :]
    mends = [
        {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", option)} for option in advice.split(", or")
    ]
    return [
        {name.replace("accumulate_grad_batches", "accumulate"): value for name, value in mend.items()}
        for mend in mends
        if mend
    ]


def error(**sizes) -> str | None:
    try:
        plan.check_batch_sizes(**sizes)
    except ValueError as problem:
        return str(problem)
    return None


def test_right_sizes_pass_and_are_planned():
    assert error(**RIGHT) is None
    assert error(**RIGHT | {"micro_batch_size": None, "accumulate": 1}) is None
    for update in plans([[4] * 6, [4] * 6], 6, 2):
        assert all(len(groups) * 4 <= 8 for part in update for groups in part.micro_batches)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_sizes_name_their_numbers_and_every_mend_works(change):
    sizes = RIGHT | change
    message = error(**sizes)
    ((name, value),) = change.items()
    assert str(value) in message.split(" Set ")[0]
    assert name.replace("accumulate", "accumulate_grad_batches") in message
    assert mends(message)
    for mend in mends(message):
        assert error(**sizes | mend) is None, f"{message} was followed"


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.fixed_dictionaries({name: st.integers(1, 30) for name in RIGHT} | {"micro_batch_size": st.integers(1, 30)}),
    st.booleans(),
)
def test_following_the_advice_ends(sizes, with_micro_batch_size):
    """Every mend removes its error and none comes back: from any sizes at most one error a rule."""
    if not with_micro_batch_size:
        sizes |= {"micro_batch_size": None}

    def follow(sizes, seen):
        message = error(**sizes)
        if message is None:
            return
        rule = message.split(":")[0] if ":" in message else message[:12]
        assert rule not in seen, message
        for mend in mends(message):
            follow(sizes | mend, {*seen, rule})

    follow(sizes, set())


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 40))
def test_sizes_that_pass_make_micro_batches_that_fit(world_size, per_rank, group_size, accumulate, micro_batch_size):
    update = per_rank * world_size
    sizes = {"group_size": group_size, "prompts_per_rollout": 2 * update, "prompts_per_update": update}
    sizes |= {"micro_batch_size": micro_batch_size, "accumulate": accumulate, "world_size": world_size}
    largest = max(
        len(groups) * group_size
        for parts in plans([[max(group_size, 2)] * 2 * per_rank] * world_size, update, accumulate)
        for part in parts
        for groups in part.micro_batches
    )
    assert (error(**sizes) is None) == (largest <= micro_batch_size)
