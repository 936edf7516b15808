"""How far apart two float32 results may lie that only the order of their roundings tells apart.

A sum of terms is rounded after each addition, and which sums are rounded depends on the CPU's vector width, on how a
batch is cut and on how many processes add up its parts. Whatever the order, the error stays within

    ROUNDINGS * eps * (the sum of the absolute values of the terms),

which is what the budgets here are: they grow with what is summed, and not with what the sum happens to be.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.head import completion_logprobs, padded_inputs

# A number passes some twenty matrix products, norms and softmaxes on its way forth and back through two layers. Each
# adds up at most 64 terms, pairwise or in a vector's lanes, and so rounds its largest partial sums a few times.
ROUNDINGS = 2**6


def sum_budget(size: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The largest rounding error of a sum whose terms' absolute values add up to `size`; elementwise, in float64."""
    return ROUNDINGS * torch.finfo(dtype).eps * torch.as_tensor(size, dtype=torch.float64)


def weights_budget(weights: Tensor | float, step: Tensor | float, updates: int = 1) -> Tensor:
    """The same of weights after so many steps, whose terms add up to `step` each; each rounds a weight once."""
    rounded = torch.finfo(torch.float32).eps * torch.as_tensor(weights, dtype=torch.float64).abs()
    return updates * (rounded + sum_budget(step))


def logprob_budget(logits: Tensor) -> float:
    """The largest rounding error of one token's float32 log-prob: a logit less the logarithm of a sum over them all.

    `logits` may as well be the log-probs of all tokens, which are logits too.
    """
    return float(sum_budget(1 + logits.detach().abs().max()))


def scores_budget(policy: PreTrainedModel, batch: CompletionBatch) -> float:
    """The same of any of a batch's completion tokens, at temperature 1."""
    with torch.no_grad():
        return logprob_budget(policy(**padded_inputs(batch)[0]).logits)


def assert_within(actual: Tensor | float, expected: Tensor | float, budget: Tensor | float, what: str = "") -> None:
    """No element lies further from the expected one than its budget; NaN lies nowhere."""
    actual, expected, budget = (torch.as_tensor(value).detach().double() for value in (actual, expected, budget))
    assert actual.shape == expected.shape, f"{what} {actual.shape} against {expected.shape}"
    error = (actual - expected).abs()
    used = (error / budget).max() if error.numel() else 0.0  # not a number where both are 0
    assert bool((error <= budget).all()), f"{what} differs by {error.max():.3g}: {used:.3g} of its budget"


@dataclass(frozen=True)
class Update:
    """One update by SGD in float64, and how far one in float32 may lie from it."""

    loss: float
    loss_budget: float
    weights: dict[str, Tensor]
    budgets: dict[str, Tensor]


def sgd_update(
    policy: PreTrainedModel, batch: CompletionBatch, loss_of: Callable[[Tensor, CompletionBatch], Tensor], lr: float
) -> Update:
    """The update of a policy by one big batch.

    The step is lr times a sum over the completions i of c_i * (gradient of log pi(y_i|x)), where c_i is the loss's
    derivative by that log-prob. Its terms are of the size of c_i times that gradient, and c_i itself is rounded: by as
    much as it moves where the rewards and log-probs that it is made of are rounded, one completion's after another's.

    Args:
        policy: the policy before the update; it is not changed.
        batch: the completions that are trained.
        loss_of: the loss of (S, T) log-probs and their batch.
        lr: SGD's.
    """
    exact = copy.deepcopy(policy).double()
    names, parameters = zip(*((n, p) for n, p in exact.named_parameters() if p.requires_grad), strict=True)
    batch = replace(batch, rewards=batch.rewards.double(), reference_logprobs=batch.reference_logprobs.double())
    logprobs, _ = completion_logprobs(exact, batch, implementation="reference")
    with torch.no_grad():
        logprob_size = 1 + float(exact(**padded_inputs(batch)[0]).logits.abs().max())

    def loss_and_coefficients(values: Tensor, batch: CompletionBatch) -> tuple[Tensor, Tensor]:
        leaf = values.detach().clone().requires_grad_()
        loss = loss_of(leaf, batch)
        return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()

    loss, coefficients = loss_and_coefficients(logprobs, batch)
    loss_size, sizes = loss.abs(), coefficients.abs()
    step = 1e-4
    for row in range(len(batch)):
        # the policy's log-probs are rounded, and the reference's as much
        moved_logprobs = logprobs.detach().clone()
        moved_logprobs[row] += step * 2 * logprob_size * batch.completion_mask[row]
        moved_rewards = batch.rewards.clone()
        moved_rewards[row] *= 1 + step
        for values, rewards in ((moved_logprobs, batch.rewards), (logprobs, moved_rewards)):
            other_loss, others = loss_and_coefficients(values, replace(batch, rewards=rewards))
            loss_size = loss_size + (other_loss - loss).abs() / step
            sizes = sizes + (others - coefficients).abs() / step

    terms = [torch.zeros_like(p) for p in parameters]
    for row in batch.completion_mask.any(dim=1).nonzero().flatten().tolist():
        gradients = torch.autograd.grad(logprobs[row].sum(), parameters, retain_graph=True)
        for term, gradient in zip(terms, gradients, strict=True):
            term += sizes[row].max() * gradient.abs()
    steps = torch.autograd.grad((coefficients * logprobs).sum(), parameters)
    weights = {n: p.detach() - lr * g for n, p, g in zip(names, parameters, steps, strict=True)}
    # A gradient is a sum itself. Where its own terms cancel, as in attention's queries, it is small and they are not:
    # the backward pass brings terms of the largest size to every layer.
    largest = lr * max(term.max() for term in terms)
    budgets = {name: weights_budget(p.detach(), largest) for name, p in zip(names, parameters, strict=True)}
    return Update(float(loss), float(sum_budget(loss_size)), weights, budgets)
