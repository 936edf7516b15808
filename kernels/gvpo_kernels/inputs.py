"""Checks of what users pass in, the choice of an implementation, and backward passes that can't be differentiated."""

import contextlib
import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    """Raise ValueError for arguments of a language-model head that do not fit each other."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None:
            _check_plain(name, tensor, hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, H) and weight (V, H) with one H, got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if not len(weight):
        raise ValueError(f"weight must have at least one row, got {tuple(weight.shape)}.")
    if targets.shape != hidden.shape[:1] or not is_integer(targets):
        raise ValueError(f"targets must be ({len(hidden)},) integers, got {targets.dtype} {tuple(targets.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}.")
    _check_dtypes(hidden, weight, bias)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0, got {temperature}: 1 is the model's own distribution.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be > 0, got {softcap}: None means no soft cap.")
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= len(weight)):
        raise ValueError(
            f"targets must be token ids in [0, {len(weight)}), got {int(targets.min())} … {int(targets.max())}: "
            "leave padding out rather than marking it with a negative id."
        )


def _check_plain(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):  # a DTensor: its local shard alone would be a wrong head
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor(), or call this inside the "
            "forward of the wrapped module where its parameters are gathered."
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}.")


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(
                f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}: cast one of them "
                f"(for example hidden.to({name}.dtype)), or use autocast."
            )


def is_integer(tensor: Tensor) -> bool:
    """An integer dtype; bool is not one."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def autocast_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands of one dtype as they are; under autocast a mixture in autocast's dtype (autograd casts back)."""
    if all(tensor is None or tensor.dtype == hidden.dtype for tensor in (weight, bias)):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Inside, dtypes are what the code says."""
    return torch.autocast(tensor.device.type, enabled=False)


def choose_implementation(name: str, tensor: Tensor) -> str:
    """`triton`, `torch` or `reference` for what the user named; only `auto` is ever turned into something else.

    Raises:
        ValueError: an unknown name, or `triton` where it cannot run.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}.")
    if name in ("torch", "reference"):
        return name
    obstacle = _triton_obstacle(tensor.device.type, tensor.dtype)
    if name == "triton":
        if obstacle:
            raise ValueError(f"implementation='triton' cannot run here: {obstacle}. Use 'torch' or 'auto'.")
        return name
    if not obstacle and tensor.device.type == "cpu":
        obstacle = "Triton's interpreter is for tests"
    return _announce("torch" if obstacle else "triton", obstacle)


def _triton_obstacle(device: str, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot run, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels compute in float32 and the input is {dtype}"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs a CUDA device and the input is on {device}"
    return ""


@functools.cache
def _announce(name: str, obstacle: str) -> str:
    """Say once what `auto` chose, and why."""
    logger.debug("implementation='auto' uses %s%s", name, f": {obstacle}" if obstacle else "")
    return name


def load_implementation(name: str) -> ModuleType:
    """The module behind a name; triton is imported only here."""
    if name == "triton":
        from gvpo_kernels import triton_head

        return triton_head
    from gvpo_kernels import torch_head

    return torch_head


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError(
            "gradients of gvpo_kernels are once_differentiable, they have no second derivative: "
            "use implementation='reference' for one."
        )


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Decorate `backward(ctx, *grads)`: under create_graph its results raise when they are differentiated.

    torch's `once_differentiable` notices only if an upstream gradient has a graph, and a loss's has none.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        anchors = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        anchors = anchors or [torch.zeros((), requires_grad=True)]
        return tuple(None if result is None else _Refusal.apply(result, *anchors) for result in results)

    return wrapped
