"""Token log-probs and the loss of a Hugging Face causal LM without its logits.

The model is called as a whole, so that every hook of DDP, FSDP and gradient checkpointing fires; only
its head is overridden. While `completion_logprobs` or `completion_loss` is running, the head turns hidden
states into log-probs or the whole loss itself, and of those only the positions that predict a completion
token: prompt, padding and the [tokens, vocabulary] logits never reach memory.

Some models scale their logits after the head, or cap them softly. What one does is measured once, by letting its
head give known numbers, and becomes part of the fused head; what it then does to log-probs or loss is left aside.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gvpo_kernels import FusedLoss, fused_gvpo_loss, linear_logprob
from gvpo_lightning.data.batch import CompletionBatch, dropped_completion
from gvpo_lightning.distributed.ranks import rank_share


@dataclass(frozen=True)
class LogitMap:
    """What a model does to what its head gives: logit = softcap * tanh(scale * raw / softcap), or scale * raw."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits of raw ones."""
        scaled = raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def head_options(self, temperature: float) -> dict[str, float | None]:
        """The temperature and cap of raw logits, as the kernels take them, at which the model has `temperature`."""
        return {
            "temperature": temperature / self.scale,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
        }


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
    options = head.logit_map.head_options(scoring.temperature)
    value: Tensor | None = None

    def answer(hidden: Tensor) -> Tensor:
        nonlocal value
        hidden, weight, bias = hidden[positions], head.weight, head.bias
        if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
            # what autocast would do for the layer that this stands in for; float32 matmuls are many times slower
            dtype = torch.get_autocast_dtype("cuda")
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
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


def _model_output(model: PreTrainedModel, inputs: dict[str, Tensor], answer: Callable[[Tensor], Tensor]) -> Tensor:
    """What the model makes of what its head gives instead of logits."""
    head: Any = model.get_output_embeddings()
    head.head_request = answer
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        head.head_request = None


@torch.no_grad()
def find_logit_map(model: PreTrainedModel) -> LogitMap:
    """What the model does to its logits after the head, from what it makes of known numbers; one token is run.

    Raises:
        ValueError: it does more than to scale them and to cap them softly.
    """
    small, large = 2.0**-24, 2.0**60
    raw = torch.tensor([small, large, 0.0, *(sign * x for x in (0.5, 2, 8, 32, 128, 512) for sign in (1, -1))])
    raw = raw.to(torch.float32 if model.device.type == "mps" else torch.float64)
    inputs = {
        name: torch.zeros((1, 1), dtype=torch.int64, device=model.device) for name in ("input_ids", "position_ids")
    }
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled for one token
        logits = _model_output(model, inputs, lambda hidden: raw.to(hidden.device)[None, None].clone())
    logits = logits.flatten().to(raw)
    scale, limit = float(logits[0]) / small, float(logits[1])
    # a cap holds `large` back, far below scale * large
    found = LogitMap(scale, None if abs(limit) > 0.5 * abs(scale) * large else limit)
    if not (scale > 0 and limit > 0 and torch.allclose(found(raw), logits, rtol=1e-5, atol=1e-5)):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head in a way that is not supported, neither a "
            f"scale nor a soft cap: of {raw[2:].tolist()} it makes {logits[2:].tolist()}."
        )
    return found


def score(
    model: PreTrainedModel, batch: CompletionBatch, scoring: Scoring, *, batch_size: int, num_parts: int | None = None
) -> Tensor:
    """(S, T) float32 log-probs of the whole batch under the model, `batch_size` completions at a time.

    Args:
        num_parts: forward passes to make, of equal sizes; ranks that share one model must make the same number.
    """
    num_parts = math.ceil(len(batch) / batch_size) if num_parts is None else num_parts
    # evaluation's inference tensors must not stay in what a sharded model has gathered: training would fail on them
    token_logprobs = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=batch.rewards.device)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        for number in range(num_parts):
            rows = torch.tensor(rank_share(len(batch), number, num_parts), dtype=torch.int64)
            part = batch.select(rows) if len(rows) else dropped_completion()
            values, _ = completion_logprobs(model, part.to(model.device), scoring)
            token_logprobs[rows, : values.shape[1]] = values[: len(rows)].to(token_logprobs)
    return token_logprobs


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside (gradient checkpointing would switch the key-value cache off), then as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
