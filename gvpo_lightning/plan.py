"""The update plan: which completions an optimizer update trains, in which micro-batch, at which scale.

A pure function of sizes and a seed, so that every rank works out the same plan, and so that it can be
tested alone: the gradient of an update must not depend on how the update is cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gvpo_lightning.seeding import seeded_permutation


@dataclass(frozen=True)
class Update:
    """One optimizer update, as one rank sees it.

    Attributes:
        micro_batches: exactly `accumulate` tuples of this rank's group indices; some may be empty and
            are stepped through all the same.
        num_groups: groups with two or more kept completions over ALL ranks: the loss's denominator.
        num_dropped: the update's other groups, over all ranks.
        scale: a micro-batch's loss (its groups' sum / num_groups) is multiplied by this, because
            Lightning divides by the accumulation and DDP by the number of ranks.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    num_groups: int
    num_dropped: int
    scale: int


def plan_updates(
    group_sizes: Sequence[Sequence[int]],
    *,
    rank: int,
    prompts_per_update: int,
    accumulate: int,
    seed: int,
) -> list[Update]:
    """Cut one pass over a rollout into optimizer updates of whole groups.

    Args:
        group_sizes: for each rank, the number of kept completions of each of its groups.
        rank: the rank whose micro-batches are wanted.
        prompts_per_update: groups in one update, over all ranks; `check_batch_sizes` holds.
        accumulate: micro-batches in one update.
        seed: decides the order of the groups.

    Returns:
        the updates, in order. Groups with fewer than two kept completions are in no micro-batch. Within an
        update groups are spread so that micro-batches hold nearly equal numbers of completions and no more
        than ceil(groups / accumulate) groups.
    """
    world_size = len(group_sizes)
    per_rank = prompts_per_update // world_size
    orders = [seeded_permutation(len(sizes), seed, "update order", r) for r, sizes in enumerate(group_sizes)]
    updates = []
    for start in range(0, len(group_sizes[rank]), per_rank):
        members = [order[start : start + per_rank] for order in orders]
        num_groups = sum(group_sizes[r][group] >= 2 for r, groups in enumerate(members) for group in groups)
        micro_batches = _pack(members[rank], group_sizes[rank], accumulate)
        num_dropped = sum(map(len, members)) - num_groups
        updates.append(Update(micro_batches, num_groups, num_dropped, accumulate * world_size))
    return updates


def _pack(groups: Sequence[int], sizes: Sequence[int], num_bins: int) -> tuple[tuple[int, ...], ...]:
    """Longest group first into the emptiest bin that has room."""
    room = math.ceil(len(groups) / num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for group in sorted((g for g in groups if sizes[g] >= 2), key=lambda g: -sizes[g]):
        open_bins = [b for b in bins if len(b) < room]
        min(open_bins, key=lambda b: sum(sizes[g] for g in b)).append(group)
    return tuple(tuple(b) for b in bins)


def check_batch_sizes(
    *,
    group_size: int,
    prompts_per_rollout: int,
    prompts_per_update: int,
    micro_batch_size: int | None,
    accumulate: int,
    world_size: int,
) -> None:
    """Raise ValueError, with the numbers and the mend, where a rollout can't be cut into updates as asked."""
    if prompts_per_update % world_size:
        update = world_size * math.ceil(prompts_per_update / world_size)
        rollout = update * math.ceil(prompts_per_rollout / update)
        raise ValueError(
            f"Every rank trains whole groups: prompts_per_update={prompts_per_update} is not a multiple of the "
            f"{world_size} ranks. Set prompts_per_update={update} and prompts_per_rollout={rollout}."
        )
    if prompts_per_rollout % prompts_per_update:
        rollout = prompts_per_update * math.ceil(prompts_per_rollout / prompts_per_update)
        raise ValueError(
            f"A rollout must be cut into whole updates: prompts_per_rollout={prompts_per_rollout} is not a multiple of "
            f"prompts_per_update={prompts_per_update}. Set prompts_per_rollout={rollout}."
        )
    if micro_batch_size is None:
        return
    groups_per_rank = prompts_per_update // world_size
    largest = math.ceil(groups_per_rank / accumulate) * group_size
    if micro_batch_size < group_size:
        raise ValueError(
            f"A micro-batch holds whole groups: micro_batch_size={micro_batch_size} completions is less than "
            f"group_size={group_size}. Set micro_batch_size={largest}, or leave it out."
        )
    if largest > micro_batch_size:
        needed = math.ceil(groups_per_rank / (micro_batch_size // group_size))
        raise ValueError(
            f"An update of {groups_per_rank} groups of {group_size} completions a rank makes {accumulate} "
            f"micro-batches (trainer.accumulate_grad_batches) of up to {largest} completions, over micro_batch_size="
            f"{micro_batch_size}. Set accumulate_grad_batches={needed}, or micro_batch_size={largest}."
        )
