"""The update plan: which completions an optimizer update trains, in which micro-batch, at which scale.

A pure function of sizes and a seed, so that every rank works out the same plan, and so that it can be
tested alone: the gradient of an update must not depend on how the update is cut. Nothing has to divide
anything: updates and micro-batches are as equal as they can be, and remainders are trained like the rest.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gvpo_lightning.seeding import seeded_permutation


@dataclass(frozen=True)
class GroupShape:
    """The kept completions of one prompt: their rows in the rollout's batch, and how many tokens they have."""

    rows: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What one micro-batch may hold: completions, and tokens as the model sees them, prompts included.

    `padding_free`: padding is not among them, with limits or without.
    """

    completions: int | None = None
    tokens: int | None = None
    padding_free: bool = False

    def seen(self, micro_batch: "Sequence[_Piece]") -> int:
        """Tokens that the model sees: padded, every completion is as wide as the widest prompt and completion."""
        if self.padding_free:
            return sum(piece.tokens for piece in micro_batch)
        prompt = max((piece.prompt_tokens for piece in micro_batch), default=0)
        completion = max((piece.completion_tokens for piece in micro_batch), default=0)
        return sum(len(piece.rows) for piece in micro_batch) * (prompt + completion)

    def hold(self, micro_batch: "Sequence[_Piece]") -> bool:
        """Whether these fit."""
        return (self.completions is None or sum(len(piece.rows) for piece in micro_batch) <= self.completions) and (
            self.tokens is None or self.seen(micro_batch) <= self.tokens
        )


@dataclass(frozen=True)
class Update:
    """One optimizer update, as one rank sees it.

    Attributes:
        micro_batches: exactly `accumulate` tuples of rows, this rank's; some may be empty and are stepped
            through all the same.
        rows: what the update trains on all ranks, in ascending order.
        num_groups: groups with two or more kept completions: the loss's denominator.
        num_dropped: the update's other groups.
        scale: a micro-batch's loss (its share of the sum over groups / num_groups) is multiplied by this,
            because Lightning divides by the accumulation and DDP and FSDP by the number of ranks.
        is_cut: a group lies in several micro-batches or on several ranks, so a pass without gradient must give
            the group means before the one with gradient.
        over_limit: some micro-batch holds more than the `limits` allow.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    num_groups: int
    num_dropped: int
    scale: int
    is_cut: bool = False
    over_limit: bool = False
    limits: Limits = Limits()

    @property
    def positions(self) -> list[list[int]]:
        """For each of this rank's micro-batches, where its rows stand in `rows`."""
        position = {row: number for number, row in enumerate(self.rows)}
        return [[position[row] for row in rows] for rows in self.micro_batches]


@dataclass(frozen=True)
class _Piece:
    """Completions that are packed as one: a whole group, or one completion of it."""

    group: int
    rows: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int  # the longest one's
    tokens: int  # of all, each with its prompt


def plan_updates(
    groups: Sequence[GroupShape],
    *,
    rank: int,
    num_ranks: int,
    num_updates: int,
    accumulate: int,
    seed: int,
    limits: Limits = Limits(),
) -> list[Update]:
    """Cut one pass over a rollout into optimizer updates.

    Args:
        groups: the rollout's, the same on every rank.
        rank: the rank whose micro-batches are wanted, of `num_ranks`.
        num_updates: updates to be made; their numbers of groups differ by one at most.
        accumulate: micro-batches in one update, on each rank.
        seed: decides the order of the groups. Which update a group is in depends on nothing else.
        limits: what a micro-batch may hold.

    Returns:
        the updates, in order. Groups with fewer than two kept completions are in no micro-batch. Groups stay
        whole where that keeps within the limits (without limits: where there are as many groups as
        micro-batches over all ranks); else their completions are packed one by one.
    """
    order = seeded_permutation(len(groups), seed, "update order", 0)
    bounds = [len(order) * u // num_updates for u in range(num_updates + 1)]
    updates = []
    for start, stop in itertools.pairwise(bounds):
        counting = [(g, groups[g]) for g in order[start:stop] if len(groups[g].rows) >= 2]
        # largest first, as `_bins_of` deals them: a run of shorter completions may be larger than the one before
        bins = sorted(_micro_batches(counting, accumulate * num_ranks, limits), key=limits.seen, reverse=True)
        updates.append(
            Update(
                micro_batches=tuple(
                    tuple(sorted(row for piece in bins[number] for row in piece.rows))
                    for number in _bins_of(rank, num_ranks, accumulate)
                ),
                rows=tuple(sorted(row for _, shape in counting for row in shape.rows)),
                num_groups=len(counting),
                num_dropped=stop - start - len(counting),
                scale=accumulate * num_ranks,
                is_cut=_cuts_groups(bins),
                over_limit=not all(map(limits.hold, bins)),
                limits=limits,
            )
        )
    return updates


def _bins_of(rank: int, num_ranks: int, accumulate: int) -> list[int]:
    """Of bins from the largest down: at every step ranks have what is nearest in size, and who has more alternates."""
    return [slot * num_ranks + (rank if slot % 2 == 0 else num_ranks - 1 - rank) for slot in range(accumulate)]


def _micro_batches(groups: Sequence[tuple[int, GroupShape]], num_bins: int, limits: Limits) -> list[list[_Piece]]:
    """Whole groups if they fit, else single completions, in exactly `num_bins` bins."""
    whole = [
        _Piece(
            g,
            shape.rows,
            shape.prompt_tokens,
            max(shape.completion_tokens),
            len(shape.rows) * shape.prompt_tokens + sum(shape.completion_tokens),
        )
        for g, shape in groups
    ]
    bins = _pack(whole, num_bins, limits)
    if limits.completions is None and limits.tokens is None:
        fits = len(whole) >= num_bins or not whole
    else:
        fits = all(limits.hold(pieces) for pieces in bins)
    if fits:
        return bins
    single = [
        _Piece(g, (row,), shape.prompt_tokens, tokens, shape.prompt_tokens + tokens)
        for g, shape in groups
        for row, tokens in zip(shape.rows, shape.completion_tokens, strict=True)
    ]
    return _pack(single, num_bins, limits)


def _cuts_groups(bins: Sequence[Sequence[_Piece]]) -> bool:
    homes: dict[int, int] = {}
    return any(homes.setdefault(p.group, number) != number for number, pieces in enumerate(bins) for p in pieces)


def _pack(pieces: Sequence[_Piece], num_bins: int, limits: Limits) -> list[list[_Piece]]:
    """Longest first, into exactly `num_bins` runs of which the largest shows the model as few tokens as can be.

    Where the limit of completions cannot be kept, it is as if it had not been given.
    """
    ordered = sorted(pieces, key=lambda p: (-(p.prompt_tokens + p.completion_tokens), p.group, p.rows))
    for limit in (limits, replace(limits, completions=None)):
        low, high = 0, limit.seen(ordered)  # the smallest capacity that does lies in (low, high]
        if limit.completions is not None and len(_fill(ordered, high, limit)) > num_bins:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_fill(ordered, middle, limit)) <= num_bins else (middle, high)
        bins = _fill(ordered, high, limit)
        break
    return bins + [[] for _ in range(num_bins - len(bins))]


def _fill(pieces: Sequence[_Piece], capacity: int, limits: Limits) -> list[list[_Piece]]:
    """Runs of pieces that show the model at most `capacity` tokens each; one piece may be more."""
    bins: list[list[_Piece]] = []
    rows = prompt = completion = tokens = 0  # of the last run: what `Limits.seen` looks at, kept up piece by piece
    for piece in pieces:
        rows, tokens = rows + len(piece.rows), tokens + piece.tokens
        prompt, completion = max(prompt, piece.prompt_tokens), max(completion, piece.completion_tokens)
        seen = tokens if limits.padding_free else rows * (prompt + completion)
        if bins and seen <= capacity and (limits.completions is None or rows <= limits.completions):
            bins[-1].append(piece)
        else:
            bins.append([piece])
            rows, tokens = len(piece.rows), piece.tokens
            prompt, completion = piece.prompt_tokens, piece.completion_tokens
    return bins
