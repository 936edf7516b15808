"""How far apart two float32 results may lie that only the order of their roundings tells apart.

A sum of terms is rounded after each addition, and which sums are rounded depends on the CPU's vector width, on how a
batch is cut and on how many processes add up its parts. Whatever the order, the error stays within

    ROUNDINGS * eps * (the sum of the absolute values of the terms),

which is what the budgets here are: they grow with what is summed, and not with what the sum happens to be.
"""

import torch
from torch import Tensor

# Forth and back through a network of two to four layers a number passes some 25 products of matrices, norms and
# softmaxes. Each adds up 16 to 64 terms, and rounds its largest partial sums some ten times.
ROUNDINGS = 2**8


def sum_budget(size: Tensor | float, dtype: torch.dtype = torch.float32, *, roundings: int = ROUNDINGS) -> Tensor:
    """The largest rounding error of a sum whose terms' absolute values add up to `size`; elementwise, in float64."""
    return roundings * torch.finfo(dtype).eps * torch.as_tensor(size, dtype=torch.float64)


def weights_budget(weights: Tensor | float, step: Tensor | float, updates: int = 1) -> Tensor:
    """The same of weights after so many steps, whose terms add up to `step` each; each rounds a weight once."""
    rounded = torch.finfo(torch.float32).eps * torch.as_tensor(weights, dtype=torch.float64).abs()
    return updates * (rounded + sum_budget(step))


def logprob_budget(logits: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The largest rounding error of one token's log-prob: a logit less the logarithm of a sum over them all.

    `logits` may as well be the log-probs of all tokens, which are logits too.
    """
    return float(sum_budget(1 + logits.detach().abs().max(), dtype, roundings=ROUNDINGS // 2))  # on the way forth alone


def assert_within(actual: Tensor | float, expected: Tensor | float, budget: Tensor | float, what: str = "") -> None:
    """No element lies further from the expected one than its budget; NaN lies nowhere."""
    actual, expected, budget = (torch.as_tensor(value).detach().double() for value in (actual, expected, budget))
    assert actual.shape == expected.shape, f"{what} {actual.shape} against {expected.shape}"
    error = (actual - expected).abs()
    used = (error / budget).max() if error.numel() else 0.0  # not a number where both are 0
    assert bool((error <= budget).all()), f"{what} differs by {error.max():.3g}: {used:.3g} of its budget"
