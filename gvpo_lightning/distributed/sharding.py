"""What sharded strategies need of the policy: FSDP1, FSDP2, tensor parallelism and the two together.

Lightning's `FSDPStrategy` wraps the module itself and only has to be told which layers are units;
`ModelParallelStrategy` leaves all to `shard_model`. A sharded model is called as a whole, so that every hook fires;
for a rollout it is gathered once and always resharded, since a root that stays gathered would go on with old weights.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from gvpo_lightning.distributed.tensor_parallel import base_model, split_tensors


def is_sharded(strategy: Strategy) -> bool:
    """Whether ranks hold parts of the parameters."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def layer_classes(policy: Any) -> set[type[nn.Module]]:
    """The classes of the decoder layers: what is gathered at once."""
    names = set(base_model(policy)._no_split_modules or ())
    return {type(module) for module in policy.modules() if type(module).__name__ in names}


def shard_model(policy: Any, strategy: Strategy, precision: str) -> None:
    """Shard the model in place, as the strategy says; FSDP1 is told how to do it when it wraps.

    Raises:
        ValueError: tensor parallelism for a model without a plan for it, or that does not divide its heads.
    """
    if isinstance(strategy, FSDPStrategy):
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(layer_classes(policy)))
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        split_tensors(policy, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1:
        split_parameters(policy, mesh["data_parallel"], mixed=precision == "bf16-mixed")


def split_parameters(policy: Any, mesh: DeviceMesh, *, mixed: bool) -> None:
    """FSDP2, a unit a layer; `mixed`: the weights stay float32, and are gathered and used in bfloat16."""
    dtypes = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    classes, root = tuple(layer_classes(policy)), base_model(policy)
    units = [module for module in root.modules() if isinstance(module, classes)]
    for unit in [*units, root]:  # the root too: what was scored as the reference must not stay gathered
        fully_shard(unit, mesh=mesh, mp_policy=dtypes, reshard_after_forward=True)


@contextmanager
def loading_in_turns(strategy: Strategy, size: Callable[[], int]) -> Iterator[None]:
    """Inside, a rank may load a model of `size()` bytes before it is sharded: as many ranks at once as memory has room.

    Every rank must enter, and must not wait for another inside.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        yield
        return
    room = torch.tensor(max(1, int(0.8 * available_host_memory() // size())), device=strategy.root_device)
    at_once = int(strategy.reduce(room, reduce_op="min"))
    turn, num_turns = strategy.local_rank // at_once, math.ceil(strategy.num_processes / at_once)
    for _ in range(turn):
        strategy.barrier()
    try:
        yield
    finally:
        for _ in range(num_turns - turn):
            strategy.barrier()


def available_host_memory() -> int:
    """Bytes that this machine has left; more than there can be where it does not say."""
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return 2**60
    lines = dict(line.split(":") for line in facts.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
