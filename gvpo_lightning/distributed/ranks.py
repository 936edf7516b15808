"""The ranks that share a rollout, and what they tell each other."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DataRanks:
    """The ranks that have different data: all of them, or with tensor parallelism one of each that hold one model.

    Attributes:
        rank, size: which of them this is, and how many there are.
        process_group: None where there is one rank, or where these are all of the default group.
        model_group: the ranks that hold one model with this one, or None where it holds a whole one.
    """

    rank: int = 0
    size: int = 1
    process_group: "dist.ProcessGroup | None" = None
    model_group: "dist.ProcessGroup | None" = None

    def share(self, count: int) -> range:
        """Which of `count` things this rank has."""
        return rank_share(count, self.rank, self.size)

    @property
    def is_first_of_model(self) -> bool:
        """Of the ranks that hold one model, one asks rewards, which need not be the same twice."""
        return self.model_group is None or dist.get_rank(self.model_group) == 0

    def agree(self, value: Any) -> Any:
        """What the first of the ranks that hold one model has; all of them must call this."""
        if self.model_group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.model_group, group_src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks; every rank must call this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; every rank must call this."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def sum_over_model(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that hold one model, in place; all of them must call this."""
        if self.model_group is not None:
            dist.all_reduce(tensor, group=self.model_group)
        return tensor


def rank_share(count: int, rank: int, world_size: int) -> range:
    """Which of `count` things one rank has, where all have as equal shares as can be."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)
