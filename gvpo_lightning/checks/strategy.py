"""What a strategy can hold and run."""

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.policy import compile
from gvpo_lightning.policy.loading import check_attention
from gvpo_lightning.policy.source import PolicySource


def check_strategy(placement: Placement, source: PolicySource, *, compiles: bool) -> None:
    """Raise ValueError for a policy, loaded or compiled as the settings say, that the Trainer's strategy can't have."""
    strategy, loading = placement.strategy, source.loading
    if compiles:
        compile.check_strategy(strategy)
    check_attention(loading, placement.device, placement.precision)
    if loading.quantization is not None and placement.is_sharded:
        raise ValueError(
            f"loading.quantization={loading.quantization!r} can't be sharded, got {type(strategy).__name__}: "
            "use one device or DDP, or loading.dtype=bfloat16 without quantization."
        )
    if source.lora is not None and loading.dtype != "float32" and placement.is_fsdp1:
        raise ValueError(
            f"FSDPStrategy can't hold a float32 adapter beside weights in loading.dtype={loading.dtype}: use "
            "FSDP2 (ModelParallelStrategy, configs/strategy/fsdp2.yaml), or leave loading.dtype out."
        )
