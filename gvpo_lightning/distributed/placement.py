"""`Placement`: where the weights are and who has the data; `DataRanks`: who shares a rollout."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from gvpo_lightning.distributed.sharding import gathered_fsdp1, gathered_units, is_sharded, reshard


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


class Placement:
    """Where a Trainer has put a Lightning module's weights, and which ranks have which data.

    Made of the module whenever a Trainer takes it up, and asked by everyone who is not Lightning's own.

    Attributes:
        strategy, precision: the Trainer's.
        ranks: the ranks that have different data.
        rank, num_ranks: this process, and how many there are.
        device: this rank's.
        is_sharded: ranks hold parts of the parameters.
        scales_losses: gradients that are infinite are a loss scaler's affair, as in float16.
        is_fsdp1: by FSDP1, which wraps the module and gathers in every forward pass outside of `gathered`.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._module = module
        self.strategy: Any = module.trainer.strategy
        self.precision = str(module.trainer.precision)
        self.ranks: DataRanks = data_ranks(self.strategy)
        self.rank, self.num_ranks = module.trainer.global_rank, module.trainer.world_size
        self.device: torch.device = self.strategy.root_device
        self.is_sharded = is_sharded(self.strategy)
        self.is_fsdp1 = isinstance(self.strategy, FSDPStrategy)
        self.scales_losses = getattr(self.strategy.precision_plugin, "scaler", None) is not None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Inside, a forward pass runs in the Trainer's precision."""
        context: AbstractContextManager[Any] = self.strategy.precision_plugin.forward_context()
        return context

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank holds the whole policy, and calls of it need no other rank."""
        # evaluation's inference tensors must not stay in what is gathered: training would fail on them later
        with torch.inference_mode(False), torch.no_grad():
            if not self.is_sharded:
                yield
                return
            with gathered_fsdp1(self.strategy.model) if self.is_fsdp1 else gathered_units(self._module):
                yield

    def callable(self) -> AbstractContextManager[None]:
        """Inside, the policy can be called where the strategy has not called a step: FSDP1's is gathered for it."""
        return self.gathered() if self.is_fsdp1 else nullcontext()

    def check_again(self) -> None:
        """Raise ValueError where a module that has been placed can't be taken up by another Trainer."""
        if self.is_fsdp1:
            raise ValueError(
                "FSDPStrategy wraps a module once: for a second fit, validate, test or predict make a new GVPOModule, "
                "or use FSDP2 (ModelParallelStrategy, configs/strategy/fsdp2.yaml)."
            )

    def reshard(self) -> None:
        """Let go of what a pass without gradient has left gathered, before sharded values are changed."""
        if self.is_sharded:
            reshard(self.strategy.model)

    def full_state_dict(self, policy: Any) -> dict[str, Tensor] | None:
        """The whole policy's, on rank 0's CPU, or None where it is not sharded; every rank must call this."""
        if isinstance(self.strategy, ModelParallelStrategy):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole: dict[str, Any] = get_model_state_dict(policy, options=options)
            return whole
        if not self.is_fsdp1:
            return None
        with self.gathered():
            if self.rank:
                return {}
            own = policy.named_parameters(remove_duplicate=False)  # a tied weight under both names, as elsewhere
            return {name.replace("_fsdp_wrapped_module.", ""): p.detach().to("cpu", copy=True) for name, p in own}


def data_ranks(strategy: Strategy) -> DataRanks:
    """The ranks that have different data."""
    if isinstance(strategy, ModelParallelStrategy):
        data, model = (strategy.device_mesh[name] for name in ("data_parallel", "tensor_parallel"))
        of_model = model.get_group() if model.size() > 1 else None
        return DataRanks(data.get_local_rank(), data.size(), data.get_group(), of_model)
    if isinstance(strategy, ParallelStrategy):
        return DataRanks(strategy.global_rank, strategy.world_size)
    return DataRanks()
