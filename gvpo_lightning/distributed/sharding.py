"""What sharded strategies need of the policy: FSDP1, FSDP2, tensor parallelism and the two together.

Lightning's `FSDPStrategy` wraps the module itself and only has to be told which layers are units;
`ModelParallelStrategy` leaves all to `shard_model`. A sharded model is called as a whole, so that every hook fires;
for a rollout it is gathered once and always resharded, since a root that stays gathered would go on with old weights.
"""

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._flat_param import HandleShardingStrategy
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


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


@contextmanager
def root_stays_gathered(policy: Any) -> Iterator[None]:
    """Inside, a forward pass that will be followed by a backward pass leaves embeddings and head gathered for it."""
    root = base_model(policy)
    if not isinstance(root, FSDPModule):
        yield
        return
    root.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        root.set_reshard_after_forward(True, recurse=False)


@contextmanager
def gathered_fsdp1(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all that FSDP1 has sharded in the model."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False), _kept_after_forward(model):
        yield


@contextmanager
def gathered_units(module: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all that FSDP2 has sharded in the module; nothing where it has not."""
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        for handle in [unit.unshard(async_op=True) for unit in units]:
            if handle is not None:
                handle.wait()
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _kept_after_forward(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP1's units stay gathered after a forward pass, or each pass would gather them anew on all ranks."""
    handles = [u._handle for u in model.modules() if isinstance(u, FullyShardedDataParallel) and u._handle is not None]
    before = [handle._sharding_strategy for handle in handles]
    for handle in handles:
        handle._sharding_strategy = {
            HandleShardingStrategy.FULL_SHARD: HandleShardingStrategy.SHARD_GRAD_OP,
            HandleShardingStrategy.HYBRID_SHARD: HandleShardingStrategy._HYBRID_SHARD_ZERO2,
        }.get(handle._sharding_strategy, handle._sharding_strategy)
    try:
        yield
    finally:
        for handle, strategy in zip(handles, before, strict=True):
            handle._sharding_strategy = strategy


def reshard(model: nn.Module) -> None:
    """Let go of what a pass without gradient has left gathered, FSDP1's root, before sharded values are changed."""
    for unit in model.modules():
        if isinstance(unit, FullyShardedDataParallel):
            handle = unit._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(unit, handle, free_unsharded_flat_param=True)
        elif isinstance(unit, FSDPModule):
            unit.reshard()


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of it, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_like(part: Tensor, parameter: Tensor) -> Tensor | list[Tensor]:
    """The whole of what `part` is this rank's part of, on rank 0's CPU; every rank must call this.

    Of a parameter that FSDP1 has flattened, the list of the ranks' parts.
    """
    if isinstance(parameter, DTensor):
        layout: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        on_device = part.to(parameter.device)
        whole = DTensor.from_local(on_device, parameter.device_mesh, parameter.placements, **layout)
        full = whole.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else torch.empty(0)
    if _is_flattened(parameter):
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(part, parts)
        return parts or []
    return part


def shard_like(whole: Tensor | list[Tensor], parameter: Tensor) -> Tensor:
    """This rank's part of what `gather_like` has gathered.

    Raises:
        ValueError: parts of FSDP1 for another number of ranks.
    """
    if isinstance(whole, list):
        if not _is_flattened(parameter) or len(whole) != dist.get_world_size():
            raise ValueError(
                f"This checkpoint's reference was saved by FSDPStrategy on {len(whole)} ranks, and can only be resumed "
                "so: use FSDP2 (ModelParallelStrategy) to change the number of ranks."
            )
        return whole[dist.get_rank()].clone()
    if isinstance(parameter, DTensor):
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return part.to_local().to("cpu", copy=True)
    return whole.to("cpu", copy=True)


def _is_flattened(parameter: Tensor) -> bool:
    return hasattr(parameter, "_fsdp_flattened")


HEADS_DIMENSION = 2  # of (batch, tokens, heads, head size), where transformers normalises queries and keys


def base_model(policy: Any) -> Any:
    """The transformers model, beneath peft's wrapper if there is one."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def split_tensors(policy: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism by the plan that transformers has for the model's layers; embeddings and head stay whole.

    Of a layer with LoRA, the factor on the split side is split with it.
    """
    model = base_model(policy)
    config, plan = model.config.get_text_config(), model.config.get_text_config().base_model_tp_plan
    if not plan:
        raise ValueError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}: set tensor_parallel_size=1."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % mesh.size():
            raise ValueError(
                f"tensor_parallel_size={mesh.size()} must divide the model's {name}={getattr(config, name)}."
            )
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.base_model.named_modules():
        kind = next((kind for pattern, kind in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if kind is None or isinstance(module, nn.Embedding):
            continue
        if kind not in ("colwise", "rowwise", "replicated_with_grad_allreduce"):
            raise ValueError(
                f"Tensor parallelism of {type(model).__name__} needs '{kind}' for {name}, which is not supported: "
                "set tensor_parallel_size=1."
            )
        if kind == "replicated_with_grad_allreduce":  # a norm of each head, of which every rank has some
            styles[name] = SequenceParallel(sequence_dim=HEADS_DIMENSION, use_local_output=True)
            continue
        style, factor = (ColwiseParallel(), "lora_B") if kind == "colwise" else (RowwiseParallel(), "lora_A")
        if not hasattr(module, "base_layer"):
            styles[name] = style
            continue
        styles[f"{name}.base_layer"] = style
        for adapter in getattr(module, factor):
            styles[f"{name}.{factor}.{adapter}"] = type(style)()
    _check_split(model, styles)
    # every rank has the whole model: nothing has to be sent
    parallelize_module(model.base_model, mesh, styles | _shared_inputs(model.base_model, styles), src_data_rank=None)


def _check_split(model: Any, styles: dict[str, ParallelStyle]) -> None:
    """Raise ValueError where the plan splits nothing of this model, or what parameters of another kind act on."""
    mend = f"Tensor parallelism of {type(model).__name__} is not supported: set tensor_parallel_size=1."
    if not styles:
        raise ValueError(f"transformers' plan fits none of the model's layers. {mend}")
    parents = tuple({f"{name.rpartition('.')[0]}." for name, style in styles.items() if "lora_" not in name})
    for name, module in model.base_model.named_modules():
        known = isinstance(module, nn.Linear) or "Norm" in type(module).__name__ or name in styles
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own and not known and f"{name}.".startswith(parents) and "lora_" not in name:
            raise ValueError(f"{name}.{own[0]} acts on what is split, but is whole on every rank. {mend}")


def _shared_inputs(model: nn.Module, styles: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """For layers that read one tensor together (q, k and v; gate and up), one all-reduce of its gradient for all."""
    readers: dict[str, list[nn.Module]] = {}
    for name, style in styles.items():
        if isinstance(style, ColwiseParallel):
            readers.setdefault(name.rpartition(".")[0], []).append(model.get_submodule(name))
    shared: dict[str, ParallelStyle] = {}
    for name, modules in readers.items():
        parent = model.get_submodule(name)
        if len(modules) < 2 or any(hasattr(part, "base_layer") for part in parent.children()):
            continue  # of LoRA, one factor is whole, and can't take what is prepared for split ones
        first, *others = inspect.signature(parent.forward).parameters
        layouts: dict[str, Any] = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
        if others:  # attention, which transformers calls by keyword
            layouts = {key: {first: Replicate()} for key in ("input_kwarg_layouts", "desired_input_kwarg_layouts")}
        shared[name] = PrepareModuleInput(**layouts, use_local_output=False)
    return shared
