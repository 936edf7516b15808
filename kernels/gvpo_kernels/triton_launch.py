"""What every launch of a Triton kernel needs."""

import contextlib

import torch
import triton
from torch import Tensor


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def interpreted() -> bool:
    """Kernels run as Python on the CPU (TRITON_INTERPRET=1); few large blocks are then fastest."""
    return bool(triton.knobs.runtime.interpret)


def tile_launch() -> dict[str, int]:
    """Block sizes of the kernels that walk over tiles of logits."""
    if interpreted():
        return {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128}
    # the largest of those tried that spills no register in any variant of the kernels; 2 and 4 rows do
    return {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 1024, "num_warps": 4}
