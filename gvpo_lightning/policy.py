"""The policy: loading a Hugging Face causal LM, and its token log-probs without its logits.

The model is called as a whole, so that every hook of DDP, FSDP and gradient checkpointing fires; only
its head is overridden. While `completion_logprobs` or `completion_loss` is running, the head turns hidden
states into log-probs or the whole loss itself, and of those only the positions that predict a completion
token: prompt, padding and the [tokens, vocabulary] logits never reach memory.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_kernels import FusedLoss, fused_gvpo_loss, gvpo_loss, linear_logprob
from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.loading import (
    UNLOADABLE,
    LoadingSettings,
    adapter_base,
    hub_arguments,
    load_base_model,
    not_loaded,
)
from gvpo_lightning.lora import add_lora, load_adapter


def load_policy(
    name: str, loading: LoadingSettings = LoadingSettings(), lora: Mapping[str, Any] | None = None, seed: int = 0
) -> Any:
    """A causal LM from a hub id or a folder, ready to train; with an adapter of these `lora` arguments on it.

    Where an adapter lies there, the model beneath it with that adapter.

    Raises:
        ValueError: nothing that transformers can load is there, or the adapter does not fit.
    """
    base = adapter_base(name, loading)
    if base is None:
        model: Any = load_base_model(name, loading)
        if lora is not None:
            model = add_lora(model, lora, seed)
            model.peft_config["default"].revision = loading.revision  # of the model beneath, for who loads the adapter
    else:
        if lora is not None:
            raise ValueError(
                f"policy={name!r} is an adapter already, of {base[0]!r}: leave model.lora out to train it further, or "
                f"set model.policy={base[0]!r} to train a new one."
            )
        model = load_adapter(load_base_model(*base), name, loading)
    prepare_policy(model)
    return model


def load_tokenizer(name: str, loading: LoadingSettings = LoadingSettings()) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **hub_arguments(name, loading))
    except UNLOADABLE as error:
        raise not_loaded("tokenizer", name, loading, error) from error


def prepare_policy(model: PreTrainedModel) -> None:
    """Put the model into the state that GVPO needs: training mode, no dropout, the log-prob head."""
    model.train()
    _zero_dropout(model.config.get_text_config())  # some models look it up there in every forward pass
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # with dropout, two passes over the same weights differ and log-ratios are noise
        _zero_dropout(module)
    install_logprob_head(model)


def _zero_dropout(holder: Any) -> None:
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends a completion; empty where neither model nor tokenizer knows one."""
    found: list[int] = []
    for eos in (
        model.generation_config.eos_token_id,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        found += eos if isinstance(eos, list) else [eos] if eos is not None else []
    vocab_size = model.get_output_embeddings().weight.shape[0]  # a tokenizer's default may lie beyond it
    return tuple(dict.fromkeys(token for token in found if token < vocab_size))


@dataclass
class _HeadRequest:
    """What the head is to do instead of logits: `compute` gets (N, H) hidden states, the weight and the bias."""

    positions: Tensor  # (S, L) bool: hidden states that predict a completion token
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _head_forward(self: Any, hidden: Tensor) -> Tensor:
    request: _HeadRequest | None = self.head_request
    if request is None:
        return type(self).forward(self, hidden)
    hidden, weight, bias = hidden[request.positions], self.weight, self.bias
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        # what autocast would do for the layer that this stands in for; float32 matmuls are many times slower
        dtype = torch.get_autocast_dtype("cuda")
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return request.compute(hidden, weight, bias)


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
    attributes: Any = {"head_request": None, "forward": functools.partial(_head_forward, head)}
    vars(head).update(attributes)  # a partial, not a bound method, follows the head into copies and pickles


def completion_logprobs(
    model: PreTrainedModel,
    batch: CompletionBatch,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the batch's completion tokens under the model.

    Returns:
        (S, T) float32 log-probs in nats, 0 where completion_mask is 0, differentiable in the weights; and
        the (S, T) entropies of the distributions they were drawn from, or None.
    """
    targets, entropies = batch.completion_ids[batch.completion_mask], None

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal entropies
        result: Any = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            return_entropy=return_entropy,
            implementation=implementation,
        )
        token_logprobs, entropies = result if return_entropy else (result, None)
        return token_logprobs

    token_logprobs = _call_with_head(model, batch, compute)
    return batch.unpack(token_logprobs), None if entropies is None else batch.unpack(entropies)


def completion_loss(
    model: PreTrainedModel,
    batch: CompletionBatch,
    beta: float,
    *,
    num_groups: int | None = None,
    sequence_coefficients: Tensor | None = None,
    temperature: float = 1.0,
    implementation: str = "auto",
) -> FusedLoss:
    """GVPO's loss of the batch, fused with the model's head; arguments and record as in `fused_gvpo_loss`.

    The record's `loss` is differentiable in the weights; `token_logprobs` and `entropies` are packed, (N,). With
    `sequence_coefficients`, known from a pass before, there are no entropies.
    """
    record: FusedLoss | None = None

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
            bias=bias,
            temperature=temperature,
            num_groups=num_groups,
            sequence_coefficients=sequence_coefficients,
            implementation=implementation,
            return_entropy=sequence_coefficients is None,
        )
        return record.loss

    loss = _call_with_head(model, batch, compute)
    assert record is not None
    return replace(record, loss=loss)  # as it came through the model's own hooks


def _call_with_head(
    model: PreTrainedModel, batch: CompletionBatch, compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Tensor:
    """One forward pass of the model in which its head runs `compute` instead; what that gave."""
    input_ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    attention_mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).to(torch.int64)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    positions[:, batch.prompt_ids.shape[1] - 1 : -1] = batch.completion_mask
    head: Any = model.get_output_embeddings()
    assert "head_request" in vars(head), "prepare_policy has not been called"
    head.head_request = _HeadRequest(positions, compute)
    try:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    finally:
        head.head_request = None


def check_logprob_head(model: PreTrainedModel, implementation: str = "auto") -> float:
    """Compare the fused head with the model's own logits on a few tokens: log-probs, loss and a gradient.

    Returns:
        the largest difference, relative to 1 + the largest value.

    Raises:
        ValueError: they differ (the model scales or caps its logits after the head), or the implementation
            can't run here.
    """
    batch = _example_batch(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad][-1:]
    record = completion_loss(model, batch, beta=1.0, implementation=implementation)
    attention_mask = torch.ones((2, 8), dtype=torch.int64, device=model.device)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, 3:-1]
    own_logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 4:, None]).squeeze(-1)
    own_loss = gvpo_loss(
        own_logprobs, batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids, beta=1.0
    ).loss
    # log-probs that went through whatever the model does after its head: large numbers, so a cap shows
    logprobs, _ = completion_logprobs(model, batch, implementation=implementation)
    pairs = [(logprobs, own_logprobs), (record.loss, own_loss)]
    if trainable and torch.is_grad_enabled():
        pairs += zip(torch.autograd.grad(record.loss, trainable), torch.autograd.grad(own_loss, trainable), strict=True)
    error = max(float(((ours - own).abs().max() / (1 + own.abs().max())).detach()) for ours, own in pairs)
    tolerance = 1e-4 if logits.dtype.itemsize >= 4 else 0.05
    if not error <= tolerance:
        raise ValueError(
            f"The log-probs, loss or gradient from the policy's head differ by {error:.2g} from those of its own "
            f"logits: {type(model).__name__} scales or caps its logits after the head, which is not supported yet."
        )
    return error


def _example_batch(model: PreTrainedModel) -> CompletionBatch:
    """One group of two random completions of four tokens."""
    head: Any = model.get_output_embeddings()
    ids = torch.randint(len(head.weight), (2, 8), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return CompletionBatch(
        prompt_ids=ids[:, :4],
        prompt_mask=mask[:, :4],
        completion_ids=ids[:, 4:],
        completion_mask=mask[:, 4:],
        rewards=torch.tensor([0.0, 1.0], device=model.device),
        group_ids=torch.zeros(2, dtype=torch.int64, device=model.device),
        truncated=~mask[:, 0],
        source_ids=torch.zeros(2, dtype=torch.int64, device=model.device),
        reference_logprobs=torch.zeros((2, 4), dtype=torch.float32, device=model.device),
    )
