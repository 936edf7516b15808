"""The error budgets of what a policy makes of a batch: its log-probs, a loss of these, their gradient, an update."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.policy.head import Scoring, completion_logprobs, padded_inputs
from tests.error_budget import logprob_budget, sum_budget, weights_budget

LossOf = Callable[[Tensor, CompletionBatch], Tensor]


@torch.no_grad()
def own_logits(policy: PreTrainedModel, batch: CompletionBatch) -> Tensor:
    """What the model itself gives for padded rows."""
    return policy(**padded_inputs(batch)[0]).logits


def scores_budget(policy: PreTrainedModel, batch: CompletionBatch, dtype: torch.dtype = torch.float32) -> float:
    """The largest rounding error of the log-prob of any of a batch's completion tokens, at temperature 1."""
    return logprob_budget(own_logits(policy, batch), dtype)


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


def loss_sizes(loss_of: LossOf, logprobs: Tensor, batch: CompletionBatch, logits: Tensor) -> LossSizes:
    """Both are rounded by as much as they move where what they are made of is: rewards, and log-probs of both models.

    How far that is, is seen from moving one completion's after another's, in float64.
    """
    batch = replace(batch, rewards=batch.rewards.double(), reference_logprobs=batch.reference_logprobs.double())
    logprobs, logprob_size = logprobs.detach().double(), 1 + float(logits.abs().max())

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
    logprobs, _ = completion_logprobs(exact, batch, Scoring(implementation="reference"))
    sizes = loss_sizes(loss_of, logprobs, batch, own_logits(exact, batch))
    gradients = torch.autograd.grad((sizes.coefficients * logprobs).sum(), parameters, retain_graph=True)
    step = lr * gradient_size(logprobs, sizes.coefficient_sizes, parameters)
    return Update(
        loss=float(sizes.loss),
        loss_budget=float(sum_budget(sizes.loss_size)),
        weights={n: p.detach() - lr * g for n, p, g in zip(names, parameters, gradients, strict=True)},
        budgets={n: weights_budget(p.detach(), step) for n, p in zip(names, parameters, strict=True)},
    )
