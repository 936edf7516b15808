"""The policy: loading a Hugging Face causal LM, and its token log-probs without its logits.

The model is called as a whole, so that every hook of DDP, FSDP and gradient checkpointing fires; only
its head is overridden. While `completion_logprobs` is running, the head turns hidden states into
log-probs itself, and of those only the positions that predict a completion token: prompt, padding and
the [tokens, vocabulary] logits never reach memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_kernels import linear_logprob
from gvpo_lightning.batch import CompletionBatch


def load_policy(name_or_path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM from a hub id or a folder, in `dtype` whatever the file's, ready to train.

    Raises:
        ValueError: nothing that transformers can load is there.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"policy={name_or_path!r} is neither a folder with a model nor a hub id: {error}") from error
    prepare_policy(model)
    return model


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={name_or_path!r} has no tokenizer that transformers loads: {error}") from error


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
class _LogprobRequest:
    positions: Tensor  # (S, L) bool: hidden states that predict a completion token
    targets: Tensor  # (N,)
    temperature: float
    return_entropy: bool
    entropy: Tensor | None = None


def _head_forward(self: Any, hidden: Tensor) -> Tensor:
    request: _LogprobRequest | None = self.logprob_request
    if request is None:
        return type(self).forward(self, hidden)
    result: Any = linear_logprob(
        hidden[request.positions],
        self.weight,
        request.targets,
        bias=self.bias,
        temperature=request.temperature,
        return_entropy=request.return_entropy,
    )
    if not request.return_entropy:
        return result
    token_logprobs, request.entropy = result
    return token_logprobs


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
    attributes: Any = {"logprob_request": None, "forward": functools.partial(_head_forward, head)}
    vars(head).update(attributes)  # a partial, not a bound method, follows the head into copies and pickles


def completion_logprobs(
    model: PreTrainedModel, batch: CompletionBatch, *, temperature: float = 1.0, return_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the batch's completion tokens under the model.

    Returns:
        (S, T) float32 log-probs in nats, 0 where completion_mask is 0, differentiable in the weights; and
        the (S, T) entropies of the distributions they were drawn from, or None.
    """
    input_ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    attention_mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).to(torch.int64)
    num_prompt_columns = batch.prompt_ids.shape[1]
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    positions[:, num_prompt_columns - 1 : -1] = batch.completion_mask
    request = _LogprobRequest(positions, batch.completion_ids[batch.completion_mask], temperature, return_entropy)

    head: Any = model.get_output_embeddings()
    head.logprob_request = request
    try:
        flat = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    finally:
        head.logprob_request = None

    def unflatten(values: Tensor) -> Tensor:
        return values.new_zeros(batch.completion_mask.shape).masked_scatter(batch.completion_mask, values)

    return unflatten(flat), None if request.entropy is None else unflatten(request.entropy)


@torch.no_grad()
def check_logprob_head(model: PreTrainedModel) -> None:
    """Compare the log-prob head with the model's own logits on a few tokens.

    Raises:
        ValueError: they differ: the model scales or caps its logits after the head.
    """
    vocab_size, device = model.get_output_embeddings().weight.shape[0], model.device
    ids = torch.randint(vocab_size, (2, 8), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    zeros = torch.zeros(2, device=device)
    batch = CompletionBatch(
        ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:], zeros, zeros.long(), zeros.bool(), zeros[:, None]
    )
    ours, _ = completion_logprobs(model, batch)
    logits = model(input_ids=ids, attention_mask=mask.to(torch.int64), use_cache=False).logits[:, 3:-1]
    own = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 4:, None]).squeeze(-1)
    error, tolerance = float((ours - own).abs().max()), 1e-4 if logits.dtype.itemsize >= 4 else 0.05
    if not error <= tolerance * (1 + float(logits.abs().max())):
        raise ValueError(
            f"The log-probs from the policy's head differ from those of its own logits by {error:.2g} nat: "
            f"{type(model).__name__} scales or caps its logits after the head, which is not supported yet."
        )
