"""`Placement`: where the weights are and who has the data."""

from typing import Any, cast

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from gvpo_lightning.distributed.gather import gathered
from gvpo_lightning.distributed.ranks import DataRanks


def data_ranks(strategy: Strategy) -> DataRanks:
    """The ranks that have different data."""
    if isinstance(strategy, ModelParallelStrategy):
        data, model = (strategy.device_mesh[name] for name in ("data_parallel", "tensor_parallel"))
        of_model = model.get_group() if model.size() > 1 else None
        return DataRanks(data.get_local_rank(), data.size(), data.get_group(), of_model)
    if isinstance(strategy, ParallelStrategy):
        return DataRanks(strategy.global_rank, strategy.world_size)
    return DataRanks()


def full_state_dict(module: L.LightningModule) -> dict[str, Tensor] | None:
    """The whole policy's, on rank 0's CPU, or None where it is not sharded; every rank must call this."""
    strategy, policy = module.trainer.strategy, cast(Any, module.policy)
    if isinstance(strategy, ModelParallelStrategy):
        whole: Any = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return whole
    if not isinstance(strategy, FSDPStrategy):
        return None
    with gathered(module):
        if module.global_rank:
            return {}
        own = policy.named_parameters(remove_duplicate=False)  # a tied weight under both names, as elsewhere
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().to("cpu", copy=True) for name, p in own}
