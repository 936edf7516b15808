"""The start-up check: the fused head and padding-free rows against the model's own logits, on a few tokens."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from gvpo_kernels import gvpo_loss
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.policy.head import Scoring, completion_logprobs, completion_loss

PRECISE, COARSE = 1e-4, 0.05  # tolerances: float32, and 16 bits


def check_logprob_head(model: PreTrainedModel, scoring: Scoring = Scoring()) -> float:
    """Compare the fused head with the model's own logits on a few tokens: log-probs, loss and a gradient.

    It makes 3 passes, and 3 more with `padding_free`.

    Returns:
        the largest difference, relative to 1 + the largest value.

    Raises:
        ValueError: they differ (the model does something else to its logits after the head), the implementation
            can't run here, or the model does not keep the sequences of a padding-free row apart.
    """
    return compare_head(model, scoring)[0]


def compare_head(model: PreTrainedModel, scoring: Scoring) -> tuple[float, float]:
    """The same; with it the tolerance, relative to 1 + the largest value, for the precision the model computes in."""
    batch, plain = _example_batch(model), Scoring(implementation=scoring.implementation)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad][-1:]
    record = completion_loss(model, batch, 1.0, plain)
    attention_mask = torch.ones((2, 8), dtype=torch.int64, device=model.device)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    own_logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if not own_logprobs.isfinite().all():
        raise ValueError(
            f"The log-probs of {type(model).__name__}'s own logits are not finite: its weights are not, or they "
            "overflow float16, which ends at 65504: repair the weights, or use bfloat16 or float32 (loading.dtype, "
            "trainer.precision)."
        )
    # log-probs that went through whatever the model does after its head: large numbers, so a cap shows
    logprobs, _ = completion_logprobs(model, batch, plain)
    # the loss at the same numbers, with the gradient of its own logits: it takes differences of sums of log-probs, and
    # where those about cancel, what 16 bits round would be most of it
    compared = own_logprobs + (logprobs - own_logprobs).detach()
    own_loss = gvpo_loss(
        compared, batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids, beta=1.0
    ).loss
    pairs = [(logprobs, own_logprobs), (record.loss, own_loss)]
    if trainable and torch.is_grad_enabled():
        pairs += zip(torch.autograd.grad(record.loss, trainable), torch.autograd.grad(own_loss, trainable), strict=True)
    error = max(_difference(ours, own) for ours, own in pairs)
    tolerance = COARSE if _rounds_to_16_bits(model, logits) else PRECISE
    if not error <= tolerance:
        raise ValueError(
            f"The log-probs, loss or gradient from the policy's head differ by {error:.2g} from those of its own "
            f"logits: {type(model).__name__} changes its logits after the head in a way that is not supported, or does "
            "not count positions from 0."
        )
    if scoring.padding_free:
        _check_padding_free(model, batch, plain, tolerance)
    return error, tolerance


def _check_padding_free(model: PreTrainedModel, batch: CompletionBatch, plain: Scoring, tolerance: float) -> None:
    """Raise ValueError where a sequence of a padding-free row sees the one before it, or has not its own positions."""

    def logprobs(*rows: int, padding_free: bool) -> torch.Tensor:
        part = batch.select(torch.tensor(rows))
        return completion_logprobs(model, part, replace(plain, padding_free=padding_free))[0]

    with torch.no_grad():
        packed = logprobs(0, 1, padding_free=True)
        error = _difference(packed, logprobs(0, 1, padding_free=False))
        # the second sequence and all shapes stay the same: where it sees nothing else, it has the same log-probs
        leak = _difference(logprobs(1, 1, padding_free=True)[1], packed[1])
    if not (error <= tolerance and leak <= (1e-5 if tolerance < 1e-3 else 1e-3)):
        raise ValueError(
            f"padding_free=True needs a model that keeps the sequences of one row apart by their position ids, but "
            f"the log-probs of {type(model).__name__} (attention: {attention_of(model)}) differ by {error:.2g} from "
            f"those of padded rows, and by {leak:.2g} with what stands before a sequence: set padding_free=False."
        )


def attention_of(model: PreTrainedModel) -> str:
    """The name of the model's attention implementation, such as "sdpa"."""
    return str(model.config.get_text_config()._attn_implementation)


def _rounds_to_16_bits(model: PreTrainedModel, logits: torch.Tensor) -> bool:
    """Whether logits were computed in 16 bits or fewer: some models make float32 of them afterwards.

    "int8" by bitsandbytes rounds what it multiplies, too, by the largest of a batch, and so do TF32's matmuls.
    """
    dtypes = [logits.dtype, model.get_output_embeddings().weight.dtype]
    if torch.is_autocast_enabled(logits.device.type):
        dtypes.append(torch.get_autocast_dtype(logits.device.type))
    is_int8 = any(parameter.dtype == torch.int8 for parameter in model.parameters())
    is_tf32 = logits.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return is_int8 or is_tf32 or min(dtype.itemsize for dtype in dtypes) < 4


def _difference(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float(((ours - own).abs().max() / (1 + own.abs().max())).detach())


def _example_batch(model: PreTrainedModel) -> CompletionBatch:
    """One group of two random completions of seven tokens, with prompts of one."""
    head = model.get_output_embeddings()
    ids = torch.randint(len(head.weight), (2, 8), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return CompletionBatch(
        prompt_ids=ids[:, :1],
        prompt_mask=mask[:, :1],
        completion_ids=ids[:, 1:],
        completion_mask=mask[:, 1:],
        rewards=torch.tensor([0.0, 1.0], device=model.device),
        group_ids=torch.zeros(2, dtype=torch.int64, device=model.device),
        truncated=~mask[:, 0],
        source_ids=torch.zeros(2, dtype=torch.int64, device=model.device),
        reference_logprobs=torch.zeros((2, 7), dtype=torch.float32, device=model.device),
    )
