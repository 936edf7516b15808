"""Peak memory of a piece of work: the CUDA allocator's, or on Linux this process's resident memory."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(work: Callable[[], object], device: str) -> tuple[int, int]:
    """Run `work`: bytes in use before it, and the most in use during it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what malloc keeps would hide what the work takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    work()
    return before, _resident("VmHWM")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
