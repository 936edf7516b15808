"""The policy: loading a Hugging Face causal LM and its tokenizer, and making it ready to train."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.policy.config_check import all_configs
from gvpo_lightning.policy.head import install_logprob_head
from gvpo_lightning.policy.loading import (
    UNLOADABLE,
    LoadingSettings,
    adapter_base,
    hub_arguments,
    load_base_model,
    not_loaded,
)
from gvpo_lightning.policy.lora import add_lora, load_adapter


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
        assert lora is None, "check_policy_settings refuses it"
        model = load_adapter(load_base_model(*base), name, loading)
    prepare_policy(model)
    return model


def load_tokenizer(name: str, loading: LoadingSettings = LoadingSettings()) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a folder.

    Raises:
        ValueError: there is none.
    """
    arguments = hub_arguments(name, loading)
    try:
        return AutoTokenizer.from_pretrained(name, **arguments)
    except UNLOADABLE as error:
        raise not_loaded("tokenizer", name, loading, error) from error


# what transformers' models and the layers of others call the strength of their noise: all kinds of dropout and drop
# path, routers' jitter, noisy gates, and the masking of tokens or features
NOISE = re.compile(r"drop|jitter|nois[ey]|stochastic|perturb|spec_?aug|mask_(time|feature|token)s?_prob", re.IGNORECASE)
STRENGTHS = ("p", "prob", "rate", "std", "sigma")  # of a layer whose own name says that it is noise


def prepare_policy(model: PreTrainedModel) -> None:
    """Put the model into the state that GVPO needs: training mode, no noise, the log-prob head."""
    model.train()
    for config in all_configs(model.config):
        _switch_noise_off(config)  # some models look it up there in every forward pass
    for module in model.modules():
        _switch_noise_off(module)  # with noise two passes over the same weights differ, and so do log-ratios
    install_logprob_head(model)


def _switch_noise_off(holder: Any) -> None:
    """Of a config or a layer."""
    is_noise = bool(NOISE.search(type(holder).__name__))
    for name, value in vars(holder).items():
        if isinstance(value, float) and (NOISE.search(name) or (is_noise and name in STRENGTHS)):
            setattr(holder, name, 0.0)
        elif value is True and NOISE.search(name) and "drop" not in name:  # such as noisy_gate
            setattr(holder, name, False)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends a completion; empty where neither model nor tokenizer knows one."""
    found: list[int] = []
    for eos in (
        model.generation_config.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found += eos if isinstance(eos, list) else [eos] if eos is not None else []
    vocab_size = model.get_output_embeddings().weight.shape[0]  # a tokenizer's default may lie beyond it
    return tuple(dict.fromkeys(token for token in found if token < vocab_size))
