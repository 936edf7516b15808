"""The policy: loading a Hugging Face causal LM and its tokenizer, and making it ready to train."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.head import install_logprob_head


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
