"""Models, batches and losses that `benchmarks.train_step` puts together."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from gvpo_kernels import gvpo_loss
from gvpo_lightning.data.batch import CompletionBatch, collate_completions
from gvpo_lightning.policy.head import completion_loss
from gvpo_lightning.policy.prepare import prepare_policy

BETA, GROUP_SIZE, CLIP = 0.1, 8, 0.2


@dataclass(frozen=True)
class Size:
    """A Qwen2's dimensions; `lora`: only adapters on its linear layers are trained."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    lora: bool = False


SIZES = {
    "tiny": Size(128, 256, 2, 4, 2, 16_000, tied=True),
    "tiny-lora": Size(128, 256, 2, 4, 2, 16_000, tied=False, lora=True),
    "0.5B": Size(896, 4_864, 24, 14, 2, 151_936, tied=True),
    "1.5B": Size(1_536, 8_960, 28, 12, 2, 151_936, tied=True),
    "7B": Size(3_584, 18_944, 28, 28, 4, 152_064, tied=False, lora=True),
}


def build_model(size: Size, install: Callable[[Any], None], dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, the same for every path, and the path's head; gradient checkpointing on."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.tied,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    install(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return with_adapters(model) if size.lora else model


def with_adapters(model: PreTrainedModel) -> Any:
    """LoRA of rank 16 on every linear layer but the head."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0))


def make_batch(completions: int, lengths: tuple[int, int], vocabulary: int, device: str) -> CompletionBatch:
    """Random completions of lengths evenly between the two given, shuffled, after prompts of a quarter of the least."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(completions, generator=generator)
    sizes = torch.linspace(*lengths, completions).long()[order].tolist()

    def ids(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    prompts = [ids(lengths[0] // 4) for _ in sizes]
    groups = [index // GROUP_SIZE for index in range(completions)]
    batch = collate_completions(prompts, [ids(size) for size in sizes], [False] * completions, groups, 0)
    batch.rewards = torch.rand(completions, generator=generator)
    batch.reference_logprobs = torch.where(batch.completion_mask, -math.log(vocabulary), 0.0)
    return batch.to(device)


@dataclass(frozen=True)
class LossPath:
    """One way from a model and a batch to a loss; `install` prepares the model for it."""

    name: str
    implementation: str
    objective: str
    install: Callable[[Any], None]
    loss: Callable[[Any, CompletionBatch], Tensor]


def paths() -> list[LossPath]:
    """All, the heaviest last."""
    return [
        LossPath("ours", "fused", "GVPO", prepare_policy, lambda m, b: completion_loss(m, b, BETA).loss),
        LossPath("TRL", "chunked log-prob", "GRPO", install_trl, trl_loss),
        LossPath("TRL", "Liger's fused GRPO", "GRPO", require_liger, liger_loss),
        LossPath("eager", "all logits", "GVPO", lambda model: None, eager_loss),
    ]


def inputs_of(batch: CompletionBatch) -> dict[str, Any]:
    """The model's arguments."""
    return {
        "input_ids": torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
        "attention_mask": torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).long(),
        "use_cache": False,
    }


def eager_loss(model: Any, batch: CompletionBatch) -> Tensor:
    """Logits of the completions, their log-softmax in float32, GVPO's loss."""
    width = batch.completion_ids.shape[1]
    logits = model(**inputs_of(batch), logits_to_keep=width + 1).logits[:, :-1]
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    columns = (batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids)
    return gvpo_loss(logprobs, *columns, BETA).loss


def advantages_of(batch: CompletionBatch) -> Tensor:
    """(S,) rewards less their group's mean."""
    same = (batch.group_ids[:, None] == batch.group_ids).float()
    return batch.rewards - same @ batch.rewards / same.sum(dim=1)


def install_trl(model: Any) -> None:
    """The head that TRL's GRPOTrainer puts on a model: log-probs and entropies in tiles."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))


def trl_loss(model: Any, batch: CompletionBatch) -> Tensor:
    """The loss of TRL's GRPOTrainer as it is by default (DAPO's normalisation, no KL term), on-policy."""
    inputs, width = inputs_of(batch), batch.completion_ids.shape[1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-width] = -100
    logprobs = model(**inputs, labels=labels, fused_lm_head=True).log_probs[:, -width:]
    ratio, advantages = torch.exp(logprobs - logprobs.detach()), advantages_of(batch)[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return (losses * batch.completion_mask).sum() / batch.completion_mask.sum()


def require_liger(model: Any) -> None:
    """Raise ImportError before anything is measured; Liger's loss needs nothing of the model."""
    import liger_kernel.chunked_loss  # noqa: F401


def liger_loss(model: Any, batch: CompletionBatch) -> Tensor:
    """The same loss by Liger's fused head and loss, as TRL releases before its own chunked head called it."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    inputs, width = inputs_of(batch), batch.completion_ids.shape[1]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model(**inputs).last_hidden_state[:, -width - 1 : -1]
    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=hidden.is_cuda)
    mask = batch.completion_mask.long()
    return function(hidden, base.lm_head.weight, batch.completion_ids, mask, advantages_of(batch))[0]
