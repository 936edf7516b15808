"""What a run will need, before it is paid for: memory per GPU, bytes over the wires, seconds an update.

Arithmetic on a model's sizes and a run's settings; nothing is allocated or measured here. Parameters, gradients,
optimizer state, the reference and the payload of DDP's and FSDP2's collectives are counted, and tested against real
ones; activations follow a dense pre-norm decoder with RMSNorm and are tested to 20%; times stand on assumptions that
`Hardware` names. What a CUDA allocator wastes and what libraries take for themselves is not in any number.

`python -m benchmarks.scaling` makes the tables of docs/scaling.md from these functions.
"""

from gvpo_lightning.estimate.facts import ModelSizes, RunFacts, Workload, model_sizes
from gvpo_lightning.estimate.memory import Memory, describe, estimate_memory
from gvpo_lightning.estimate.times import H100, H200, Collective, Hardware, estimate_seconds, estimate_traffic

__all__ = [
    "H100",
    "H200",
    "Collective",
    "Hardware",
    "Memory",
    "ModelSizes",
    "RunFacts",
    "Workload",
    "describe",
    "estimate_memory",
    "estimate_seconds",
    "estimate_traffic",
    "model_sizes",
]
