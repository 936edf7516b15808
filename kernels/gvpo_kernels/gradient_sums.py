"""Gradients of a head's inputs collected over pieces of the tokens, with sums in float32 (float64)."""

import torch
from torch import Tensor

from gvpo_kernels.head import Gradients, HeadCall, Needs, add_matmul_, matmul, operand_dtype


class GradientSums:
    """dHidden row by row; dWeight (V, H) and dBias (V,) as wide sums, rounded once at the end."""

    def __init__(self, call: HeadCall, needs: Needs) -> None:
        self.call = call
        self.operand = call.weight.to(operand_dtype(call))
        make = call.hidden.new_zeros
        # fp16 waits for the upstream gradient before it is rounded: unscaled it would vanish
        self.wide = call.hidden.dtype == torch.float16
        hidden_dtype = call.dtype if self.wide else call.hidden.dtype
        self.hidden = make(call.hidden.shape, dtype=hidden_dtype) if needs.hidden else None
        self.weight = make(call.weight.shape, dtype=call.dtype) if needs.weight else None
        self.bias = make(call.vocab_size, dtype=call.dtype) if needs.bias else None

    def add(self, rows: Tensor | slice, hidden: Tensor, grad_logits: Tensor, gain: float = 1.0) -> None:
        """Add tokens `rows` with their (n, H) `hidden` and (n, V) gradients of raw logits, both times `gain`."""
        operand = grad_logits.to(self.operand.dtype)
        if self.hidden is not None:
            self.hidden[rows] = matmul(operand, self.operand).mul_(gain).to(self.hidden.dtype)
        if self.weight is not None:
            add_matmul_(self.weight, operand.T, hidden, gain)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype), alpha=gain)

    def result(self, *, keep_wide: bool = False) -> Gradients:
        """The gradients in their inputs' dtypes; with `keep_wide` fp16 ones stay float32 until they are scaled."""
        call, wide = self.call, keep_wide and self.wide

        def rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
            return total if total is None or like is None or wide else total.to(like.dtype)

        return Gradients(
            rounded(self.hidden, call.hidden), rounded(self.weight, call.weight), rounded(self.bias, call.bias)
        )
