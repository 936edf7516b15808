"""torch.compile of the decoder layers, one by one and in place: names, hooks, checkpoints and exports stay as they are.

The layers share their compiled code, so a deep model compiles no longer than a shallow one. The rest of the model is
not compiled: the head knows only at run time how many tokens count.
"""

from typing import Any

import torch._dynamo
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from gvpo_lightning.distributed.sharding import layer_classes


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError for a strategy under which compiled layers don't train."""
    tensor_parallel = isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1
    if isinstance(strategy, FSDPStrategy) or tensor_parallel:
        raise ValueError(
            f"torch_compile=True works on one device, under DDP and under FSDP2 (ModelParallelStrategy), not with "
            f"{'tensor parallelism' if tensor_parallel else 'FSDPStrategy'}: set torch_compile=False."
        )


def compile_layers(policy: Any) -> None:
    """Let every decoder layer be compiled when it is first run, for all sizes of micro-batches; once for all.

    Raises:
        ValueError: the model does not say which its decoder layers are.
    """
    layers: list[Any] = [module for module in policy.modules() if isinstance(module, tuple(layer_classes(policy)))]
    if not layers:
        raise ValueError(
            f"torch_compile=True compiles the decoder layers one by one, but {type(policy).__name__} does not say "
            "which they are (_no_split_modules): set torch_compile=False."
        )
    # with and without gradient, mask and checkpointing, of one sequence and of many: not all fit the usual 8
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 32)
    for layer in layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)
