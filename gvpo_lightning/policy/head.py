"""Token log-probs and the loss of a Hugging Face causal LM without its logits.

The model is called as a whole, so that every hook of DDP, FSDP and gradient checkpointing fires; only
its head is overridden. While `completion_logprobs` or `completion_loss` is running, the head turns hidden
states into log-probs or the whole loss itself, and of those only the positions that predict a completion
token: prompt, padding and the [tokens, vocabulary] logits never reach memory.

Some models scale their logits after the head, or cap them softly. What one does is measured once, by letting its
head give known numbers, and becomes part of the fused head; what it then does to log-probs or loss is left aside.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gvpo_kernels import FusedLoss, fused_gvpo_loss, linear_logprob
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.policy.logit_map import _model_output, find_logit_map


def _head_forward(self: Any, hidden: Tensor) -> Tensor:
    answer: Callable[[Tensor], Tensor] | None = self.head_request
    return type(self).forward(self, hidden) if answer is None else answer(hidden)


def install_logprob_head(model: PreTrainedModel) -> None:
    """Let the model's head answer `completion_logprobs`; every other call of the model is unchanged.

    Raises:
        ValueError: the head is not a plain linear layer (an adapter on it, for example, would be ignored).
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise ValueError(
            f"The policy's head must be a plain linear layer, got {type(head).__name__}: "
            "leave lm_head out of the adapter's target_modules and modules_to_save."
        )
    attributes: Any = {"head_request": None, "logit_map": None, "forward": functools.partial(_head_forward, head)}
    vars(head).update(attributes)  # a partial, not a bound method, follows the head into copies and pickles


@dataclass(frozen=True)
class Scoring:
    """How log-probs are taken, of policy and reference alike.

    Attributes:
        temperature: of the distributions that they are log-probs of.
        implementation: of the fused head, as `gvpo_kernels.linear_logprob` takes it.
        padding_free: the model is given one row of all sequences, one after another, instead of padded rows.
    """

    temperature: float = 1.0
    implementation: str = "auto"
    padding_free: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}.")


def completion_logprobs(
    model: PreTrainedModel, batch: CompletionBatch, scoring: Scoring = Scoring(), *, return_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the batch's completion tokens under the model.

    Returns:
        (S, T) float32 log-probs in nats, 0 where completion_mask is 0, differentiable in the weights; and
        the (S, T) entropies of the distributions they were drawn from, or None.
    """
    targets, entropies = batch.completion_ids[batch.completion_mask], None

    def compute(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        nonlocal entropies
        result: Any = linear_logprob(hidden, weight, targets, **head, return_entropy=return_entropy)
        token_logprobs, entropies = result if return_entropy else (result, None)
        return token_logprobs

    token_logprobs = _call_with_head(model, batch, compute, scoring)
    return batch.unpack(token_logprobs), None if entropies is None else batch.unpack(entropies)


def completion_loss(
    model: PreTrainedModel,
    batch: CompletionBatch,
    beta: float,
    scoring: Scoring = Scoring(),
    *,
    num_groups: int | None = None,
    sequence_coefficients: Tensor | None = None,
) -> FusedLoss:
    """GVPO's loss of the batch, fused with the model's head; arguments and record as in `fused_gvpo_loss`.

    The record's `loss` is differentiable in the weights; `token_logprobs` and `entropies` are packed, (N,). With
    `sequence_coefficients`, known from a pass before, there are no entropies.
    """
    record: FusedLoss | None = None

    def compute(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        nonlocal record
        record = fused_gvpo_loss(
            hidden,
            weight,
            batch.completion_ids[batch.completion_mask],
            batch.reference_logprobs[batch.completion_mask],
            batch.cu_seqlens,
            batch.rewards,
            batch.group_ids,
            beta,
            **head,
            num_groups=num_groups,
            sequence_coefficients=sequence_coefficients,
            return_entropy=sequence_coefficients is None,
        )
        return record.loss

    loss = _call_with_head(model, batch, compute, scoring)
    assert record is not None
    return replace(record, loss=loss)  # as it came through the model's own hooks


def _call_with_head(
    model: PreTrainedModel, batch: CompletionBatch, compute: Callable[..., Tensor], scoring: Scoring
) -> Tensor:
    """One forward pass of the model in which its head runs `compute` instead; what that gave.

    Args:
        compute: takes (N, H) hidden states, the weight, and by name `bias` and the head's options.
    """
    head: Any = model.get_output_embeddings()
    assert "head_request" in vars(head), "prepare_policy has not been called"
    if head.logit_map is None:
        head.logit_map = find_logit_map(model)
    inputs, positions = (packed_inputs if scoring.padding_free else padded_inputs)(batch)
    value: Tensor | None = None

    def answer(hidden: Tensor) -> Tensor:
        nonlocal value
        hidden, weight, bias = hidden[positions], head.weight, head.bias
        if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
            # what autocast would do for the layer that this stands in for; float32 matmuls are many times slower
            dtype = torch.get_autocast_dtype("cuda")
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        options = head.logit_map.head_options(scoring.temperature)
        value = compute(hidden, weight, bias=bias, implementation=scoring.implementation, **options)
        return value.reshape(1, 1, -1).clone()

    output = _model_output(model, inputs, answer)
    assert value is not None
    # The model has scaled or capped its output, so the value is taken as the head gave it. The output stays in the
    # graph, with a gradient of 0: hooks on it, such as FSDP's, then still run before the head's backward pass.
    return torch.where(torch.ones_like(value, dtype=torch.bool), value, output.sum().to(value.dtype))


def padded_inputs(batch: CompletionBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs, (S, P + T) each, and which hidden states predict a token that counts."""
    input_ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    attention_mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).to(torch.int64)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    positions[:, batch.prompt_ids.shape[1] - 1 : -1] = batch.completion_mask
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}, positions


def packed_inputs(batch: CompletionBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The same without padding, (1, tokens) each: sequences start where position ids start again at 0.

    There is no attention mask: transformers' attention tells the sequences apart by their position ids.
    """
    inputs, positions = padded_inputs(batch)
    real = inputs.pop("attention_mask").bool()
    return {name: values[real][None] for name, values in inputs.items()}, positions[real][None]
