"""However an update is cut, its gradient is that of one big batch."""

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_lightning.checks.trainer import check_batch_sizes
from gvpo_lightning.objectives import gvpo as objectives
from gvpo_lightning.rollout import plan
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.seeding import derive_seed, seeded_permutation
from gvpo_lightning.updates import meters
from gvpo_lightning.updates.loss import sequence_coefficients
from tests.objectives.builders import Batch, assert_same, gradient, naive_loss, random_batch


def rollout(group_sizes, dropped=1) -> Batch:
    """A batch whose group ids count the groups, with `dropped` dropped completions in every group."""
    batch = random_batch(group_sizes, dropped=dropped)
    kept = batch.completion_mask.any(1)
    unnamed = batch.group_ids.unique().tolist()  # any matching of names with sizes will do, if it is the right size
    by_size = {g: int((kept & (batch.group_ids == g)).sum()) for g in unnamed}
    names = torch.tensor(group_sizes).argsort(stable=True).tolist()
    taken = dict(zip(sorted(unnamed, key=by_size.get), names, strict=True))
    return batch._replace(group_ids=torch.tensor([taken[g] for g in batch.group_ids.tolist()]))


def shapes(batch: Batch, num_groups) -> list[plan.GroupShape]:
    """The groups as the plan sees them: prompts of 1 to 4 tokens, and the rows of those that are not dropped."""
    lengths = batch.completion_mask.sum(1)

    def shape(group):
        rows = ((batch.group_ids == group) & (lengths > 0)).nonzero().squeeze(-1).tolist()
        return plan.GroupShape(tuple(rows), 1 + group % 4, tuple(lengths[rows].tolist()))

    return [shape(group) for group in range(num_groups)]


def plans_of(groups, num_ranks, num_updates, accumulate, seed=0, limits=plan.Limits()):
    """The updates as every rank works them out, in the order of the updates: [update][rank]."""
    arguments = {"num_updates": num_updates, "accumulate": accumulate, "seed": seed, "limits": limits}
    ranks = [plan.plan_updates(groups, rank=rank, num_ranks=num_ranks, **arguments) for rank in range(num_ranks)]
    return list(zip(*ranks, strict=True))


def plans(group_sizes, *arguments, **options):
    return plans_of(shapes(rollout(group_sizes), len(group_sizes)), *arguments, **options)


def equal_groups(group_sizes, prompt_tokens=1, completion_tokens=1):
    """Groups of completions that are all as long as each other, rows numbered through."""
    starts = itertools.accumulate(group_sizes, initial=0)
    return [
        plan.GroupShape(tuple(range(start, start + size)), prompt_tokens, (completion_tokens,) * size)
        for start, size in zip(starts, group_sizes, strict=False)
    ]


def bins_of(update) -> list[tuple[int, ...]]:
    """The micro-batches of all ranks."""
    return [rows for part in update for rows in part.micro_batches]


def planned_gradient(batch: Batch, update) -> torch.Tensor:
    """What Lightning and DDP make of an update: a mean over micro-batches, then a mean over ranks."""
    total = torch.zeros_like(batch.token_logprobs)
    # the ranks' own parts of an update whose groups are cut, and what the all-reduce makes of them
    own_ratios = [
        meters.scatter([log_ratios(batch)[list(rows)] for rows in part.micro_batches], part.positions, len(part.rows))
        for part in update
    ]
    for part in update:
        coefficients = planned_coefficients(batch, part, sum(own_ratios)) if part.is_cut else None
        for rows, positions in zip(part.micro_batches, part.positions, strict=True):
            rows = torch.tensor(rows, dtype=torch.int64)
            if coefficients is None:
                loss = objectives.gvpo_loss(*batch.rows(rows), num_groups=part.num_groups).loss
            else:
                loss = (coefficients[positions] * log_ratios(batch)[rows]).sum()
            total += gradient(loss * part.scale, batch) / len(part.micro_batches) / len(update)
    return total


def log_ratios(batch: Batch) -> torch.Tensor:
    differences = batch.token_logprobs - batch.reference_logprobs
    return torch.where(batch.completion_mask, differences, 0.0).sum(dim=1)


def planned_coefficients(batch: Batch, part, ratios) -> torch.Tensor:
    """Of a cut update, dL / d log-ratio of every completion, as one rank works it out."""
    rows = list(part.rows)
    return sequence_coefficients(
        ratios.detach(),
        batch.rewards[rows],
        batch.group_ids[rows],
        batch.beta,
        num_groups=part.num_groups,
        max_log_ratio=1e4,
    )


def check_plan(group_sizes, num_ranks, num_updates, accumulate, seed=0, limits=plan.Limits()):
    """Every update's gradient is its groups' big batch's; every completion that counts is trained exactly once."""
    batch = rollout(group_sizes)
    groups = shapes(batch, len(group_sizes))
    updates = plans_of(groups, num_ranks, num_updates, accumulate, seed, limits)
    assert len(updates) == num_updates
    trained = []
    for update in updates:
        assert all(len(part.micro_batches) == accumulate for part in update)
        assert len({dataclasses.replace(part, micro_batches=()) for part in update}) == 1  # the ranks are of one mind
        rows = [row for micro_batch in bins_of(update) for row in micro_batch]
        assert list(update[0].rows) == sorted(rows)
        for part in update:
            assert [[part.rows[p] for p in bins] for bins in part.positions] == [list(b) for b in part.micro_batches]
        ids = batch.group_ids[rows]
        assert update[0].num_groups == len(ids.unique())
        assert update[0].scale == num_ranks * accumulate
        big_batch = batch.rows(torch.isin(batch.group_ids, ids))
        assert_same(planned_gradient(batch, update), gradient(naive_loss(big_batch), batch))
        check_cuts_and_limits(batch, groups, update, limits)
        check_balance(groups, update, limits)
        trained += rows
    counting = [row for group in groups for row in group.rows if len(group.rows) >= 2]
    assert sorted(trained) == sorted(counting)
    sizes = [update[0].num_groups + update[0].num_dropped for update in updates]
    assert sum(sizes) == len(group_sizes)
    assert max(sizes) - min(sizes) <= 1
    return updates


def check_cuts_and_limits(batch, groups, update, limits):
    """`is_cut` and `over_limit` are what the micro-batches show, and groups are cut for a reason only."""
    homes, shown = {}, []
    for number, rows in enumerate(bins_of(update)):
        for group in batch.group_ids[list(rows)].tolist():
            homes.setdefault(group, set()).add(number)
        shown.append(sizes_of(groups, rows, limits.padding_free))
    assert update[0].is_cut == any(len(bins) > 1 for bins in homes.values())
    over = [
        (limits.completions is not None and completions > limits.completions)
        or (limits.tokens is not None and tokens > limits.tokens)
        for completions, tokens in shown
    ]
    assert update[0].over_limit == any(over)
    if limits.completions is None and limits.tokens is None:
        assert update[0].is_cut == (0 < len(homes) < len(shown))


def check_balance(groups, update, limits):
    """What the ranks train at the same time is of one size, and none has more in all than a micro-batch can explain."""
    loads = [[sizes_of(groups, rows, limits.padding_free)[1] for rows in part.micro_batches] for part in update]
    by_slot = list(zip(*loads, strict=True))
    assert all(min(now) >= max(later) for now, later in itertools.pairwise(by_slot))
    totals = list(map(sum, loads))
    assert max(totals) - min(totals) <= max(by_slot[0]) - min(by_slot[-1])


def sizes_of(groups, rows, padding_free=False) -> tuple[int, int]:
    """Completions of a micro-batch, and its tokens: as a padded tensor has them, or each that is there."""
    prompts = [group.prompt_tokens for group in groups for row in group.rows if row in rows]
    lengths = [n for group in groups for row, n in zip(group.rows, group.completion_tokens, strict=True) if row in rows]
    if padding_free:
        return len(rows), sum(prompts) + sum(lengths)
    return len(rows), len(rows) * (max(prompts, default=0) + max(lengths, default=0))


@st.composite
def cut_rollouts(draw):
    """Groups of any sizes on any number of ranks, any number of updates and micro-batches, with limits or without."""
    group_sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    limits = plan.Limits(draw(st.none() | st.integers(1, 8)), draw(st.none() | st.integers(1, 60)), draw(st.booleans()))
    numbers = [draw(st.integers(1, largest)) for largest in (5, 5, 6)]  # ranks, updates, micro-batches
    return group_sizes, *numbers, draw(st.integers(0, 10)), limits


@settings(max_examples=200, derandomize=True, database=None)
@given(cut_rollouts())
def test_any_cut_has_the_gradient_of_one_big_batch(case):
    check_plan(*case)


@pytest.mark.parametrize(
    "limits", [plan.Limits(), plan.Limits(completions=2), plan.Limits(tokens=25), plan.Limits(None, 25, True)], ids=str
)
def test_one_update_has_one_gradient_for_every_accumulation_and_number_of_ranks(limits):
    sizes = [3, 2, 4, 1, 2, 0, 3, 2, 3, 4, 2, 2]
    batch = rollout(sizes)
    expected = gradient(objectives.gvpo_loss(*batch).loss, batch)
    for num_ranks, accumulate in itertools.product((1, 2, 3, 4, 5), (1, 2, 5, 12, 20)):
        (update,) = plans_of(shapes(batch, len(sizes)), num_ranks, 1, accumulate, limits=limits)
        assert_same(planned_gradient(batch, update), expected)


@pytest.mark.parametrize(("num_ranks", "accumulate"), [(1, 3), (1, 5), (1, 9), (3, 1), (5, 1), (2, 2), (3, 3)])
def test_more_micro_batches_than_groups_cuts_groups(num_ranks, accumulate):
    (update,) = check_plan([2, 3], num_ranks, 1, accumulate)
    assert update[0].is_cut
    assert not update[0].over_limit
    assert sum(map(len, bins_of(update))) == 5


@pytest.mark.parametrize(("num_ranks", "accumulate"), [(1, 2), (2, 1)])
def test_as_many_groups_as_micro_batches_stay_whole(num_ranks, accumulate):
    (update,) = check_plan([2, 3], num_ranks, 1, accumulate)
    assert not update[0].is_cut
    assert sorted(map(len, bins_of(update))) == [2, 3]


def test_one_group_spans_ranks():
    check_plan([8], 2, 1, 1)
    check_plan([3], 2, 1, 1)
    for size, parts in ((8, [4, 4]), (3, [2, 1])):
        (update,) = plans_of(equal_groups([size]), 2, 1, 1)
        assert [len(part.micro_batches[0]) for part in update] == parts
        assert all(part.is_cut for part in update)


def test_a_rank_makes_two_passes_where_another_ones_group_is_cut():
    (update,) = check_plan([2, 2, 6], 2, 1, 2, limits=plan.Limits(completions=3))
    assert all(part.is_cut for part in update)


def test_a_limit_that_cannot_be_kept_is_told_and_all_is_trained():
    for num_ranks, accumulate in ((1, 2), (2, 1)):
        for limits in (plan.Limits(completions=3), plan.Limits(tokens=2)):
            (update,) = check_plan([4, 4], num_ranks, 1, accumulate, limits=limits)
            assert all(part.over_limit for part in update)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_update_of_groups_that_do_not_count_is_empty_and_harmless(num_ranks):
    (update,) = check_plan([0, 1, 1], num_ranks, 1, 2)
    for part in update:
        assert part.micro_batches == ((), ())
        assert part.rows == ()
        assert part.num_groups == 0
    assert planned_gradient(rollout([0, 1, 1]), update).norm() == 0


def test_a_rank_for_which_nothing_is_left_still_steps_through_its_micro_batches():
    (update,) = check_plan([3, 0, 1], 5, 1, 2)
    assert sorted(map(len, bins_of(update))) == [0] * 7 + [1] * 3
    assert sum(part.micro_batches == ((), ()) for part in update) == 2
    assert {part.num_groups for part in update} == {1}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [[2, 5, 3, 8, 2, 2, 6, 4, 3], [9, 2, 2, 2, 2, 2]])
def test_micro_batches_hold_at_most_their_share_of_the_completions_where_asked_to(sizes, accumulate, num_ranks):
    share = -(-sum(sizes) // (accumulate * num_ranks))
    (update,) = plans(sizes, num_ranks, 1, accumulate, limits=plan.Limits(completions=share))
    assert max(map(len, bins_of(update))) <= share
    assert not update[0].over_limit


def loads(groups, update) -> list[int]:
    return [sizes_of(groups, rows)[1] for rows in bins_of(update)]


@pytest.mark.parametrize(("num_ranks", "accumulate"), [(1, 2), (2, 1)])
@pytest.mark.parametrize(
    ("lengths", "load"), [([99, 24, 24, 24, 24], [200, 200]), ([9, 9, 9, 9], [40, 40]), ([29, 29, 14, 14], [60, 120])]
)
def test_micro_batches_are_balanced_by_padded_tokens(lengths, load, num_ranks, accumulate):
    groups = [plan.GroupShape((2 * g, 2 * g + 1), 1, (1, length)) for g, length in enumerate(lengths)]
    (update,) = plans_of(groups, num_ranks, 1, accumulate)
    assert sorted(loads(groups, update)) == load
    assert not update[0].is_cut


def test_ranks_have_the_same_to_do_at_every_step_and_in_all():
    groups = [plan.GroupShape((2 * g, 2 * g + 1), 1, (2 * g + 1, 2 * g + 2)) for g in range(4)]
    (update,) = plans_of(groups, 2, 1, 4, limits=plan.Limits(completions=1))
    first, second = ([sizes_of(groups, rows)[1] for rows in part.micro_batches] for part in update)
    assert (first, second) == ([9, 6, 5, 2], [8, 7, 4, 3])


def test_a_step_in_which_one_rank_has_much_is_one_in_which_all_have():
    """Also where longer completions fill a micro-batch less than shorter ones do."""
    groups = [plan.GroupShape((0, 1, 2, 3), 0, (10, 6, 6, 5))]
    (update,) = plans_of(groups, 1, 1, 3)
    assert loads(groups, update) == [12, 10, 5]


@settings(max_examples=60, derandomize=True, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)]))
def test_no_other_packing_of_equal_groups_has_a_smaller_largest_micro_batch(lengths, cut):
    num_ranks, accumulate = cut
    groups = [plan.GroupShape((2 * g, 2 * g + 1), 3, (1, length)) for g, length in enumerate(lengths)]
    (update,) = plans_of(groups, num_ranks, 1, accumulate)
    if update[0].is_cut:  # then there are at most two groups: four completions
        groups = [
            plan.GroupShape((2 * g + i,), 3, (n,)) for g, long in enumerate(lengths) for i, n in enumerate((1, long))
        ]
    best = min(
        max(
            sizes_of(groups, [row for group, b in zip(groups, homes, strict=True) if b == bin_ for row in group.rows])[
                1
            ]
            for bin_ in range(num_ranks * accumulate)
        )
        for homes in itertools.product(range(num_ranks * accumulate), repeat=len(groups))
    )
    assert max(loads(groups, update)) == best


def test_order_is_a_function_of_the_seed_and_shuffles():
    sizes = [2, 3] * 12
    assert plans(sizes, 2, 6, 2, seed=1) == plans(sizes, 2, 6, 2, seed=1)
    groups = equal_groups([2] * 24)
    orders = [[part.rows for (part,) in plans_of(groups, 1, 6, 2, seed)] for seed in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_which_groups_share_an_update_depends_on_the_seed_alone():
    def members(num_ranks, accumulate, limits=plan.Limits()):
        updates = plans([2, 3, 0, 4] * 4, num_ranks, 3, accumulate, limits=limits)
        return [sorted(row for rows in bins_of(update) for row in rows) for update in updates]

    expected = members(1, 1)
    for num_ranks, accumulate in itertools.product((1, 2, 3, 7), (1, 2, 4, 7)):
        assert members(num_ranks, accumulate) == expected
        assert members(num_ranks, accumulate, plan.Limits(1, 9)) == expected


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


def error(*, group_size, longest_completion, accumulate, world_size, **settings) -> str | None:
    try:
        check_batch_sizes(RolloutSettings(**settings), group_size, longest_completion, accumulate, world_size)
    except ValueError as problem:
        return str(problem)
    return None


def test_right_sizes_pass_and_are_planned():
    assert error(**RIGHT) is None
    assert error(**RIGHT | {"micro_batch_size": None, "micro_batch_tokens": None, "accumulate": 1}) is None
    for update in plans([4] * 12, 2, 2, 2, limits=plan.Limits(completions=8)):
        assert all(len(rows) <= 8 for rows in bins_of(update))


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


@settings(max_examples=200, derandomize=True, database=None)
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


@settings(max_examples=200, derandomize=True, database=None)
@given(
    st.integers(1, 4),
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_sizes_that_pass_make_micro_batches_that_fit(num_ranks, rollout, update, group_size, accumulate, largest):
    update = min(update, rollout)
    sizes = {"group_size": group_size, "prompts_per_rollout": rollout, "prompts_per_update": update}
    sizes |= {"micro_batch_size": largest, "accumulate": accumulate, "world_size": num_ranks, "longest_completion": 1}
    groups = equal_groups([group_size] * rollout)
    updates = plans_of(groups, num_ranks, -(-rollout // update), accumulate, limits=plan.Limits(completions=largest))
    fits = max(len(rows) for parts in updates for rows in bins_of(parts)) <= largest
    assert fits == (not any(part.over_limit for parts in updates for part in parts))
    assert error(**sizes) is not None or fits
    if rollout % update == 0:  # then every update has as many prompts as the rule says
        assert (error(**sizes) is None) == fits
