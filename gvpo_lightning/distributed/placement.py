"""`Placement`: where the weights are and who has the data."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.distributed.sharding import gathered_fsdp1, gathered_units, is_sharded, reshard


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

    @classmethod
    def of(cls, module: L.LightningModule) -> "Placement":
        """The module's own, if it is that of its present Trainer, else a new one."""
        own = getattr(module, "placement", None)
        return own if isinstance(own, cls) and own.strategy is module.trainer.strategy else cls(module)

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

    @contextmanager
    def kept_gathered(self) -> Iterator[None]:
        """The same of FSDP2's units, from one hook to another: between them torch's modes are as Lightning has them.

        An error that ends the hooks between leaves this open, and modes that were set here would stay for good.
        """
        units = gathered_units(self._module)
        with torch.inference_mode(False), torch.no_grad():
            units.__enter__()
        try:
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                units.__exit__(None, None, None)

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
