"""How far apart two float32 results may lie that only the order of their roundings tells apart.

A sum of terms is rounded after each addition, and which sums are rounded depends on the CPU's vector width, on how a
batch is cut and on how many processes add up its parts. Whatever the order, the error stays within

    ROUNDINGS * eps * (the sum of the absolute values of the terms),

which is what the budgets here are: they grow with what is summed, and not with what the sum happens to be.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.head import completion_logprobs, padded_inputs

# Forth and back through a network of two to four layers a number passes some 25 products of matrices, norms and
# softmaxes. Each adds up 16 to 64 terms, and rounds its largest partial sums some ten times.
ROUNDINGS = 2**8


def sum_budget(size: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The largest rounding error of a sum whose terms' absolute values add up to `size`; elementwise, in float64."""
    return ROUNDINGS * torch.finfo(dtype).eps * torch.as_tensor(size, dtype=torch.float64)


def weights_budget(weights: Tensor | float, step: Tensor | float, updates: int = 1) -> Tensor:
    """The same of weights after so many steps, whose terms add up to `step` each; each rounds a weight once."""
    rounded = torch.finfo(torch.float32).eps * torch.as_tensor(weights, dtype=torch.float64).abs()
    return updates * (rounded + sum_budget(step))


def logprob_budget(logits: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The largest rounding error of one token's log-prob: a logit less the logarithm of a sum over them all.

    `logits` may as well be the log-probs of all tokens, which are logits too.
    """
    return float(sum_budget(1 + logits.detach().abs().max(), dtype))


def scores_budget(policy: PreTrainedModel, batch: CompletionBatch, dtype: torch.dtype = torch.float32) -> float:
    """The same of any of a batch's completion tokens, at temperature 1."""
    with torch.no_grad():
        return logprob_budget(policy(**padded_inputs(batch)[0]).logits, dtype)


def assert_within(actual: Tensor | float, expected: Tensor | float, budget: Tensor | float, what: str = "") -> None:
    """No element lies further from the expected one than its budget; NaN lies nowhere."""
    actual, expected, budget = (torch.as_tensor(value).detach().double() for value in (actual, expected, budget))
    assert actual.shape == expected.shape, f"{what} {actual.shape} against {expected.shape}"
    error = (actual - expected).abs()
    used = (error / budget).max() if error.numel() else 0.0  # not a number where both are 0
    assert bool((error <= budget).all()), f"{what} differs by {error.max():.3g}: {used:.3g} of its budget"


LossOf = Callable[[Tensor, CompletionBatch], Tensor]


@dataclass(frozen=True)
class LossSizes:
    """A loss of (S, T) log-probs and their batch, and what adds up to it.

    Attributes:
        loss: its value.
        coefficients: (S, T) its derivatives by the log-probs.
        loss_size, coefficient_sizes: the absolute values of what these are made of; (), and (S,) the largest token's.
    """

    loss: Tensor
    coefficients: Tensor
    loss_size: Tensor
    coefficient_sizes: Tensor


def loss_sizes(loss_of: LossOf, logprobs: Tensor, batch: CompletionBatch, logprob_size: float) -> LossSizes:
    """Both are rounded by as much as they move where what they are made of is: rewards, and log-probs of both models.

    How far that is, is seen from moving one completion's after another's, in float64.
    """
    batch = replace(batch, rewards=batch.rewards.double(), reference_logprobs=batch.reference_logprobs.double())
    logprobs = logprobs.detach().double()

    def evaluate(values: Tensor, batch: CompletionBatch) -> tuple[Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        loss = loss_of(leaf, batch)
        return loss.detach().double(), torch.autograd.grad(loss, leaf)[0]

    loss, coefficients = evaluate(logprobs, batch)
    loss_size, sizes = loss.abs(), coefficients.abs()
    step = 1e-4
    for row in range(len(batch)):
        moved_logprobs, moved_rewards = logprobs.clone(), batch.rewards.clone()
        moved_logprobs[row] += step * 2 * logprob_size * batch.completion_mask[row]  # the policy's and the reference's
        moved_rewards[row] *= 1 + step
        for values, rewards in ((moved_logprobs, batch.rewards), (logprobs, moved_rewards)):
            other_loss, others = evaluate(values, replace(batch, rewards=rewards))
            loss_size = loss_size + (other_loss - loss).abs() / step
            sizes = sizes + (others - coefficients).abs() / step
    return LossSizes(loss, coefficients, loss_size, sizes.amax(dim=1))


def gradient_size(logprobs: Tensor, coefficient_sizes: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The size of the terms of a gradient, sum over the completions i of c_i * (gradient of log pi(y_i|x)).

    One for all parameters. A gradient of a log-prob is a sum itself; where its own terms cancel, as in attention's
    queries, it is small and they are not: the backward pass brings terms of the largest size to every layer.
    """
    terms = [torch.zeros_like(p) for p in parameters]
    for row in coefficient_sizes.nonzero().flatten().tolist():
        gradients = torch.autograd.grad(logprobs[row].sum(), parameters, retain_graph=True, allow_unused=True)
        for term, gradient in zip(terms, gradients, strict=True):
            if gradient is not None:
                term += coefficient_sizes[row] * gradient.abs()
    return torch.stack([term.max() for term in terms]).max()


@dataclass(frozen=True)
class Update:
    """One update by SGD in float64, and how far one in float32 may lie from it."""

    loss: float
    loss_budget: float
    weights: dict[str, Tensor]
    budgets: dict[str, Tensor]


def sgd_update(policy: PreTrainedModel, batch: CompletionBatch, loss_of: LossOf, lr: float) -> Update:
    """The update of a policy, which is not changed, by one big batch."""
    exact = copy.deepcopy(policy).double()
    names, parameters = zip(*((n, p) for n, p in exact.named_parameters() if p.requires_grad), strict=True)
    logprobs, _ = completion_logprobs(exact, batch, implementation="reference")
    with torch.no_grad():
        logprob_size = 1 + float(exact(**padded_inputs(batch)[0]).logits.abs().max())
    sizes = loss_sizes(loss_of, logprobs, batch, logprob_size)
    gradients = torch.autograd.grad((sizes.coefficients * logprobs).sum(), parameters, retain_graph=True)
    step = lr * gradient_size(logprobs, sizes.coefficient_sizes, parameters)
    return Update(
        loss=float(sizes.loss),
        loss_budget=float(sum_budget(sizes.loss_size)),
        weights={n: p.detach() - lr * g for n, p, g in zip(names, parameters, gradients, strict=True)},
        budgets={n: weights_budget(p.detach(), step) for n, p in zip(names, parameters, strict=True)},
    )
