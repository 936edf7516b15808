"""Adapters: LoRA from a run's settings, by peft, and policies whose folder holds an adapter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gvpo_lightning.policy.loading import LoadingSettings, adapter_base, is_quantized
from gvpo_lightning.policy.weights import policy_name

SETTING = "model.lora"
# with the first two the policy starts as the model beneath it; with others peft changes that model
INITIALIZATIONS = (True, "gaussian", False)
# what a new adapter can't have
UNUSABLE = {
    "inference_mode": "leaves nothing to train",
    "arrow_config": "routes between adapters that are there already, and this is the first",
    "kasa_config": "would change the model beneath the adapter, which checkpoints leave out",
}


def check_policy_settings(policy: str | PreTrainedModel, loading: LoadingSettings, lora: dict[str, Any] | None) -> None:
    """Raise ValueError for settings of loading and adapter that contradict each other or the policy."""
    if not isinstance(policy, str):
        for name, given in (("loading", loading != LoadingSettings()), ("lora", lora is not None)):
            if given:
                raise ValueError(
                    f"{name} is for a policy given by name, got a {type(policy).__name__}: leave it out and build the "
                    "model so, or give its folder or hub id."
                )
        return
    if lora is not None:
        lora_config(lora)
        base = adapter_base(policy, loading)
        if base is not None:
            raise ValueError(
                f"policy={policy!r} is an adapter already, of {base[0]!r}: leave model.lora out to train it further, "
                f"or set model.policy={base[0]!r} to train a new one."
            )
    elif loading.quantization is not None and adapter_base(policy, loading) is None:
        raise ValueError(
            f"loading.quantization={loading.quantization!r} needs an adapter, quantized weights can't be trained: set "
            "model.lora, for example {r: 16, lora_alpha: 32, target_modules: all-linear}."
        )


def lora_config(lora: Mapping[str, Any]) -> Any:
    """peft's LoraConfig of these arguments, for a causal LM.

    Raises:
        ValueError: peft is missing, or it does not know a key or value.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    peft = import_peft(SETTING)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(peft.LoraConfig)
    unknown = sorted(lora.keys() - {action.dest for action in parser._actions})
    if unknown:
        raise ValueError(f"model.lora.{unknown[0]} is no argument of peft.LoraConfig: see its documentation.")
    if lora.get("init_lora_weights", True) not in INITIALIZATIONS:  # for some of which peft needs other packages
        raise ValueError(
            f"model.lora.init_lora_weights must be one of {INITIALIZATIONS}, got {lora['init_lora_weights']!r}: it "
            "would change the model beneath the adapter, which checkpoints leave out."
        )
    try:
        parsed = parser.parse_object(dict(lora))
        # numbers and switches that were given as text, such as "16", are what they say
        read = {key: parsed[key] for key, value in lora.items() if isinstance(value, str)}
        config = peft.LoraConfig(**({"task_type": "CAUSAL_LM"} | dict(lora) | read))
    except (ArgumentError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model.lora={dict(lora)} is not what peft.LoraConfig takes: {reason}") from error
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        if not all(number > 0 for number in (value.values() if isinstance(value, dict) else [value])):
            raise ValueError(f"model.lora.{name} must be > 0, got {value}.")
    for name, reason in UNUSABLE.items():
        if getattr(config, name, None):
            raise ValueError(f"model.lora.{name}={lora[name]!r} {reason}: leave it out.")
    if config.task_type != "CAUSAL_LM":
        raise ValueError(f"model.lora.task_type must be CAUSAL_LM, got {config.task_type!r}: leave it out.")
    if config.lora_dropout:
        raise ValueError(
            f"model.lora.lora_dropout must be 0, got {config.lora_dropout}: with dropout two passes over the same "
            "weights differ, and log-ratios are noise."
        )
    return config


def import_peft(setting: str) -> Any:
    """The package, or ValueError that says which extra brings it."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{setting} needs peft: pip install 'gvpo-lightning[peft]'.") from error
    return peft


def starts_at_base(lora: Mapping[str, Any]) -> bool:
    """Whether the policy starts as the model beneath its adapter, and is that model again without it."""
    return lora.get("init_lora_weights", True) in INITIALIZATIONS[:2] and lora.get("bias", "none") == "none"


def add_lora(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> Any:
    """The model with a new adapter, float32 whatever the model's dtype; the same one for the same seed everywhere.

    Raises:
        ValueError: the model has none of the target modules, or peft can't build what the arguments ask for.
    """
    peft, config = import_peft(SETTING), lora_config(lora)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # or a GPU would draw other values
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except Exception as error:  # peft's own are of every kind, such as IndexError
            reason = " ".join(str(error).split())
            raise ValueError(f"model.lora={dict(lora)} does not fit {type(model).__name__}: {reason}") from error


def load_adapter(model: PreTrainedModel, name: str, loading: LoadingSettings) -> Any:
    """The model with the adapter in a folder or hub id, to be trained on."""
    peft = import_peft(f"policy={name!r}, an adapter,")
    return peft.PeftModel.from_pretrained(model, name, is_trainable=True, revision=loading.revision)


def is_adapted(model: Any) -> bool:
    """Whether this is a peft model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def saves_adapter_alone(model: Any, *, can_be_reloaded: bool) -> bool:
    """Whether checkpoints leave the frozen weights out: they are where the policy was loaded from.

    A quantized model's could not be loaded from a checkpoint.
    """
    return is_adapted(model) and (can_be_reloaded or is_quantized(model))


def trained_names(model: nn.Module) -> frozenset[str]:
    """Of the parameters that are trained."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def leave_frozen_out(trained: frozenset[str], module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take from a Lightning module's state dict what of its policy is not trained."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = policy_name(key.removeprefix(prefix))
        if name is not None and name not in trained:
            del state[key]


def do_without_frozen(trained: frozenset[str], module: nn.Module, incompatible: Any) -> None:
    """Let a Lightning module, or a copy in a wrapper that averages it, load what `leave_frozen_out` has left of it."""
    names = {key: policy_name(key.removeprefix("module.")) for key in incompatible.missing_keys}
    incompatible.missing_keys[:] = [key for key, name in names.items() if name is None or name in trained]


def check_adapter(model: nn.Module, trained: frozenset[str], state: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint's weights of the policy are not these, by name and shape."""
    saved = {policy_name(key): tensor for key, tensor in state.items()}
    own = model.state_dict()
    for name in sorted(trained):
        if name not in saved or saved[name].shape != own[name].shape:
            found = tuple(saved[name].shape) if name in saved else "nothing"
            raise ValueError(
                f"The checkpoint's adapter is another one: it has {found} for {name!r}, the policy has "
                f"{tuple(own[name].shape)}. Set model.lora as it was."
            )
    others = sorted(name for name in saved if name is not None and "lora_" in name and name not in trained)
    if others:
        raise ValueError(f"The checkpoint's adapter has {others[0]!r}, the policy has not. Set model.lora as it was.")
