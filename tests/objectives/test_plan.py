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


def rollout(group_sizes, dropped=1) -> Batch:
    """A batch whose group ids are rank * 100 + group, with `dropped` dropped completions in every group."""
    sizes = [size for rank in group_sizes for size in rank]
    batch = random_batch(sizes, dropped=dropped)
    names = torch.tensor([100 * rank + group for rank, sizes in enumerate(group_sizes) for group in range(len(sizes))])
    kept = batch.completion_mask.any(1)
    unnamed = batch.group_ids.unique().tolist()  # any matching of names with sizes will do, if it is the right size
    by_size = {g: int((kept & (batch.group_ids == g)).sum()) for g in unnamed}
    taken = dict(zip(sorted(unnamed, key=by_size.get), names[torch.tensor(sizes).argsort(stable=True)], strict=True))
    return batch._replace(group_ids=torch.tensor([int(taken[g]) for g in batch.group_ids.tolist()]))


def shapes(batch: Batch, group_sizes) -> list[list[plan.GroupShape]]:
    """The groups of each rank as the plan sees them; rows are those of the whole batch, prompts of 1 to 4 tokens."""
    lengths = batch.completion_mask.sum(1)

    def shape(rank, group):
        rows = ((batch.group_ids == 100 * rank + group) & (lengths > 0)).nonzero().squeeze(-1).tolist()
        return plan.GroupShape(tuple(rows), 1 + group % 4, tuple(lengths[rows].tolist()))

    return [[shape(rank, group) for group in range(len(sizes))] for rank, sizes in enumerate(group_sizes)]


def plans_of(groups, num_updates, accumulate, seed=0, limits=plan.Limits()):
    """The updates of every rank, in the order of the updates: [update][rank]."""
    arguments = {"num_updates": num_updates, "accumulate": accumulate, "seed": seed, "limits": limits}
    ranks = [plan.plan_updates(groups, rank=rank, **arguments) for rank in range(len(groups))]
    return list(zip(*ranks, strict=True))


def plans(group_sizes, num_updates, accumulate, seed=0, limits=plan.Limits()):
    return plans_of(shapes(rollout(group_sizes), group_sizes), num_updates, accumulate, seed, limits)


def equal_groups(group_sizes, prompt_tokens=1, completion_tokens=1):
    """Groups of completions that are all as long as each other, rows numbered through on each rank."""
    ranks = []
    for sizes in group_sizes:
        starts = itertools.accumulate(sizes, initial=0)
        ranks.append(
            [
                plan.GroupShape(tuple(range(start, start + size)), prompt_tokens, (completion_tokens,) * size)
                for start, size in zip(starts, sizes, strict=False)
            ]
        )
    return ranks


def planned_gradient(batch: Batch, update) -> torch.Tensor:
    """What Lightning and DDP make of an update: a mean over micro-batches, then a mean over ranks."""
    total = torch.zeros_like(batch.token_logprobs)
    for part in update:
        coefficients = planned_coefficients(batch, part) if part.is_cut else None
        for rows in part.micro_batches:
            rows = torch.tensor(rows, dtype=torch.int64)
            if coefficients is None:
                loss = objectives.gvpo_loss(*batch.rows(rows), num_groups=part.num_groups).loss
            else:
                loss = (coefficients[rows] * log_ratios(batch)[rows]).sum()
            total += gradient(loss * part.scale, batch) / len(part.micro_batches) / len(update)
    return total


def log_ratios(batch: Batch) -> torch.Tensor:
    differences = batch.token_logprobs - batch.reference_logprobs
    return torch.where(batch.completion_mask, differences, 0.0).sum(dim=1)


def planned_coefficients(batch: Batch, part) -> torch.Tensor:
    """Of a cut update, dL / d log-ratio for every row of the batch, from all completions of one rank."""
    rows = torch.tensor([row for micro_batch in part.micro_batches for row in micro_batch], dtype=torch.int64)
    values = log_ratios(batch).detach()[rows, None].requires_grad_()
    _, _, mask, rewards, group_ids, beta = batch.rows(rows)
    columns = (torch.zeros_like(values), mask.any(1, keepdim=True), rewards, group_ids, beta)
    loss = objectives.gvpo_loss(values, *columns, num_groups=part.num_groups).loss
    (found,) = torch.autograd.grad(loss, values)
    return torch.zeros(len(batch.rewards), dtype=found.dtype).index_copy(0, rows, found.squeeze(1))


def check_plan(group_sizes, num_updates, accumulate, seed=0, limits=plan.Limits()):
    """Every update's gradient is its groups' big batch's; every completion that counts is trained exactly once."""
    batch = rollout(group_sizes)
    groups = shapes(batch, group_sizes)
    updates = plans_of(groups, num_updates, accumulate, seed, limits)
    assert len(updates) == num_updates
    trained = []
    for update in updates:
        assert all(len(part.micro_batches) == accumulate for part in update)
        assert (
            len({(part.num_groups, part.num_dropped, part.scale, part.is_cut, part.over_limit) for part in update}) == 1
        )
        rows = [row for part in update for micro_batch in part.micro_batches for row in micro_batch]
        ids = batch.group_ids[rows]
        assert update[0].num_groups == len(ids.unique())
        for rank, part in enumerate(update):
            assert {row for bins in part.micro_batches for row in bins} <= {r for g in groups[rank] for r in g.rows}
        big_batch = batch.rows(torch.isin(batch.group_ids, ids))
        assert_same(planned_gradient(batch, update), gradient(naive_loss(big_batch), batch))
        check_cuts_and_limits(batch, groups, update, limits)
        trained += rows
    counting = [row for rank in groups for group in rank for row in group.rows if len(group.rows) >= 2]
    assert sorted(trained) == sorted(counting)
    sizes = [update[0].num_groups + update[0].num_dropped for update in updates]
    assert sum(sizes) == sum(map(len, group_sizes))
    assert max(sizes) - min(sizes) <= 1
    return updates


def check_cuts_and_limits(batch, groups, update, limits):
    """`is_cut` and `over_limit` are what the micro-batches show, and groups are cut for a reason only."""
    homes, shown = {}, []
    for rank, part in enumerate(update):
        for number, rows in enumerate(part.micro_batches):
            for group in batch.group_ids[list(rows)].tolist():
                homes.setdefault(group, set()).add((rank, number))
            shown.append(sizes_of(groups[rank], rows))
    assert update[0].is_cut == any(len(bins) > 1 for bins in homes.values())
    over = [
        (limits.completions is not None and completions > limits.completions)
        or (limits.tokens is not None and tokens > limits.tokens)
        for completions, tokens in shown
    ]
    assert update[0].over_limit == any(over)
    if limits == plan.Limits():
        counting = [len({g for g, bins in homes.items() if g // 100 == rank}) for rank in range(len(update))]
        assert update[0].is_cut <= any(0 < count < len(update[0].micro_batches) for count in counting)


def sizes_of(groups, rows) -> tuple[int, int]:
    """Completions of a micro-batch, and its tokens as a padded tensor has them."""
    prompts = [group.prompt_tokens for group in groups if set(group.rows) & set(rows)]
    lengths = [n for group in groups for row, n in zip(group.rows, group.completion_tokens, strict=True) if row in rows]
    return len(rows), len(rows) * (max(prompts, default=0) + max(lengths, default=0))


@st.composite
def cut_rollouts(draw):
    """Ranks with unequal numbers of groups, any number of updates and micro-batches, with limits or without."""
    world_size = draw(st.integers(1, 3))
    group_sizes = [draw(st.lists(st.integers(0, 4), max_size=7)) for _ in range(world_size)]
    if not any(group_sizes):
        group_sizes[0] = [2]
    limits = plan.Limits(draw(st.none() | st.integers(1, 8)), draw(st.none() | st.integers(1, 60)))
    return group_sizes, draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 10)), limits


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(cut_rollouts())
def test_any_cut_has_the_gradient_of_one_big_batch(case):
    check_plan(*case)


@pytest.mark.parametrize("limits", [plan.Limits(), plan.Limits(completions=2), plan.Limits(tokens=25)], ids=str)
def test_one_update_has_one_gradient_for_every_accumulation_and_number_of_ranks(limits):
    sizes = [3, 2, 4, 1, 2, 0, 3, 2, 3, 4, 2, 2]
    whole = rollout([sizes])
    expected = gradient(objectives.gvpo_loss(*whole).loss, whole)
    for world_size, accumulate in itertools.product((1, 2, 3, 4, 5), (1, 2, 5, 12, 20)):
        cut = [sizes[rank::world_size] for rank in range(world_size)]
        ids = whole.group_ids
        batch = whole._replace(group_ids=100 * (ids % world_size) + ids // world_size)
        (update,) = plans_of(shapes(batch, cut), 1, accumulate, limits=limits)
        assert_same(planned_gradient(batch, update), expected)


@pytest.mark.parametrize("accumulate", [3, 5, 9])
def test_more_micro_batches_than_groups_cuts_groups(accumulate):
    (update,) = check_plan([[2, 3]], 1, accumulate)[0]
    assert update.is_cut
    assert not update.over_limit
    assert sum(map(len, update.micro_batches)) == 5


def test_as_many_groups_as_micro_batches_stay_whole():
    (update,) = check_plan([[2, 3]], 1, 2)[0]
    assert not update.is_cut
    assert sorted(map(len, update.micro_batches)) == [2, 3]


def test_a_rank_whose_groups_are_whole_makes_two_passes_where_another_ranks_are_cut():
    (first, second) = check_plan([[4, 4, 4], [4, 4]], 1, 3)[0]
    assert first.is_cut
    assert second.is_cut
    assert sorted(map(len, first.micro_batches)) == [4, 4, 4]


def test_a_limit_that_cannot_be_kept_is_told_and_all_is_trained():
    assert check_plan([[4, 4]], 1, 2, limits=plan.Limits(completions=3))[0][0].over_limit
    assert check_plan([[4, 4]], 1, 2, limits=plan.Limits(tokens=2))[0][0].over_limit


def test_an_update_of_groups_that_do_not_count_is_empty_and_harmless():
    (update,) = check_plan([[0, 1, 1]], 1, 2)[0]
    assert update.micro_batches == ((), ())
    assert update.num_groups == 0
    assert planned_gradient(rollout([[0, 1, 1]]), (update,)).norm() == 0


def test_a_rank_of_dropped_groups_still_steps_through_its_micro_batches():
    (first, second) = check_plan([[3, 2, 4], [0, 1, 1]], 1, 3)[0]
    assert sum(map(len, first.micro_batches)) == 9
    assert second.micro_batches == ((), (), ())
    assert first.num_groups == second.num_groups == 3


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [[2, 5, 3, 8, 2, 2, 6, 4, 3], [9, 2, 2, 2, 2, 2]])
def test_micro_batches_hold_at_most_their_share_of_the_completions_where_asked_to(sizes, accumulate):
    share = -(-sum(sizes) // accumulate)
    (update,) = plans([sizes], 1, accumulate, limits=plan.Limits(completions=share))[0]
    assert max(map(len, update.micro_batches)) <= share
    assert not update.over_limit


def loads(groups, update) -> list[int]:
    return [sizes_of(groups, rows)[1] for rows in update.micro_batches]


@pytest.mark.parametrize(
    ("lengths", "load"), [([99, 24, 24, 24, 24], [200, 200]), ([9, 9, 9, 9], [40, 40]), ([29, 29, 14, 14], [60, 120])]
)
def test_micro_batches_are_balanced_by_padded_tokens(lengths, load):
    groups = [plan.GroupShape((2 * g, 2 * g + 1), 1, (1, length)) for g, length in enumerate(lengths)]
    ((update,),) = plans_of([groups], 1, 2)
    assert sorted(loads(groups, update)) == load
    assert not update.is_cut


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 3))
def test_no_other_packing_of_equal_groups_has_a_smaller_largest_micro_batch(lengths, accumulate):
    groups = [plan.GroupShape((2 * g, 2 * g + 1), 3, (1, length)) for g, length in enumerate(lengths)]
    ((update,),) = plans_of([groups], 1, accumulate)
    if update.is_cut:  # then there are at most two groups: four completions
        groups = [
            plan.GroupShape((2 * g + i,), 3, (n,)) for g, long in enumerate(lengths) for i, n in enumerate((1, long))
        ]
    best = min(
        max(
            sizes_of(groups, [row for group, b in zip(groups, homes, strict=True) if b == bin_ for row in group.rows])[
                1
            ]
            for bin_ in range(accumulate)
        )
        for homes in itertools.product(range(accumulate), repeat=len(groups))
    )
    assert max(loads(groups, update)) == best


def test_order_is_a_function_of_the_seed_and_shuffles():
    sizes = [[2] * 12, [3] * 12]
    assert plans(sizes, 6, 2, seed=1) == plans(sizes, 6, 2, seed=1)
    groups = equal_groups([[2] * 12, [2] * 12])  # the same rows on both ranks
    orders = [[part.micro_batches for update in plans_of(groups, 6, 2, seed) for part in update] for seed in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first_rank, second_rank = orders[0][0::2], orders[0][1::2]
    assert first_rank != second_rank


def test_which_groups_share_an_update_does_not_depend_on_the_accumulation_or_the_limits():
    def members(accumulate, limits=plan.Limits()):
        return [
            {row for bins in part.micro_batches for row in bins}
            for (part,) in plans([[2] * 12], 3, accumulate, limits=limits)
        ]

    assert members(1) == members(2) == members(4) == members(7) == members(4, plan.Limits(1, 9))


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
    "micro_batch_tokens": 20,
    "longest_completion": 10,
    "accumulate": 2,
    "world_size": 2,
}
WRONG = {
    "update over the rollout": {"prompts_per_rollout": 5},
    "update over the micro-batches": {"accumulate": 1},
    "micro-batch too small": {"micro_batch_size": 5},
    "micro-batch below a group": {"micro_batch_size": 3},
    "tokens below a completion": {"micro_batch_tokens": 10},
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


def error(*, micro_batch_size=None, micro_batch_tokens=None, **sizes) -> str | None:
    try:
        plan.check_batch_sizes(**sizes, limits=plan.Limits(micro_batch_size, micro_batch_tokens))
    except ValueError as problem:
        return str(problem)
    return None


def test_right_sizes_pass_and_are_planned():
    assert error(**RIGHT) is None
    assert error(**RIGHT | {"micro_batch_size": None, "micro_batch_tokens": None, "accumulate": 1}) is None
    for update in plans([[4] * 6, [4] * 6], 2, 2, limits=plan.Limits(completions=8)):
        assert all(len(rows) <= 8 for part in update for rows in part.micro_batches)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts_per_rollout": 13},
        {"prompts_per_update": 5},
        {"world_size": 5},
        {"accumulate": 7},
        {"micro_batch_size": 7},
        {"micro_batch_size": 3, "accumulate": 4},
    ],
    ids=str,
)
def test_nothing_has_to_divide_anything(change):
    assert error(**RIGHT | change) is None


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
    st.fixed_dictionaries({name: st.integers(1, 30) for name in RIGHT}), st.sets(st.sampled_from(["size", "tokens"]))
)
def test_following_the_advice_ends(sizes, without):
    """Every mend removes its error and none comes back: from any sizes at most one error a rule."""
    sizes |= {f"micro_batch_{name}": None for name in without}

    def follow(sizes, seen):
        message = error(**sizes)
        if message is None:
            return
        rule = message.split(":")[0] if ":" in message else message[:12]
        assert rule not in seen, message
        for mend in mends(message):
            follow(sizes | mend, {*seen, rule})

    follow(sizes, set())


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 4),
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_sizes_that_pass_make_micro_batches_that_fit(world_size, rollout, update, group_size, accumulate, largest):
    update = min(update, rollout)
    sizes = {"group_size": group_size, "prompts_per_rollout": rollout, "prompts_per_update": update}
    sizes |= {"micro_batch_size": largest, "accumulate": accumulate, "world_size": world_size, "longest_completion": 1}
    shares = [plan.rank_share(rollout, rank, world_size) for rank in range(world_size)]
    groups = equal_groups([[group_size] * len(share) for share in shares])
    updates = plans_of(groups, -(-rollout // update), accumulate, limits=plan.Limits(completions=largest))
    parts = [part for parts in updates for part in parts]
    fits = max(len(rows) for part in parts for rows in part.micro_batches) <= largest
    assert fits == (not any(part.over_limit for part in parts))
    assert error(**sizes) is not None or fits
    if rollout % (update * world_size) == 0 == update % world_size:  # then every rank has as many as the rule says
        assert (error(**sizes) is None) == fits
