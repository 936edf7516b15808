"""Backward passes that refuse to be differentiated themselves, rather than count as constants."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
