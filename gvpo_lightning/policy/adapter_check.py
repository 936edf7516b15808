"""What can't be trained or exported of an adapter: told by the key that says it, before weights and data are loaded."""

from collections.abc import Callable, Iterator
from typing import Any

from gvpo_lightning.policy.lora import SETTING, import_peft, is_adapted, trained_names

# of any adapter, wherever it comes from
UNTRAINABLE = {
    "alora_invocation_tokens": "makes log-probs of tokens depend on the tokens behind them",
    "layer_replication": "gives the model other layers than its config says, and it can't be sampled from",
    "monteclora_config": "draws weights in every pass: two of the same weights differ, and log-ratios are noise",
}
# by the class that peft wraps the head in, where that is not an adapter of its own
HEAD_WRAPPERS = {
    "ModulesToSaveWrapper": "modules_to_save",
    "TrainableTokensWrapper": "trainable_token_indices",
    "ParamWrapper": "target_parameters",
}


def check_adapter_fits(model: Any, setting: str) -> None:
    """Raise ValueError where a model has an adapter that GVPO can't train as it is, or could not export.

    Args:
        model: any; with or without storage.
        setting: where the adapter's keys are: "model.lora" of a new one, else such as "The adapter in 'folder'".
    """
    if type(model).__name__ == "PeftMixedModel":
        raise ValueError("The policy is a PeftMixedModel, which peft can't save: give a PeftModel, without mixed=True.")
    if not is_adapted(model):
        return
    peft = import_peft(setting)
    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning and config.peft_type != peft.PeftType.PREFIX_TUNING:
        raise ValueError(
            f"{setting} is {config.peft_type.value}, which puts tokens in front of all sequences and is not supported: "
            "train LoRA."
        )

    def named(key: str) -> str:
        given = f"{key}={plain(getattr(config, key))!r}"
        return f"{setting}.{given}" if setting == SETTING else f"{setting} has {given}, which"

    for key, reason in UNTRAINABLE.items():
        if getattr(config, key, None):
            raise ValueError(f"{named(key)} {reason}: leave it out.")
    _check_embeddings(model, config, named)
    if setting == SETTING:
        _check_biases(model, config, named)
    if config.peft_type == peft.PeftType.LORA:
        for name in _trained_beside(model):
            raise ValueError(
                f"The policy trains {name!r} beside its adapter, whose export would be without it: freeze it "
                "(requires_grad_(False)), or name its module in the adapter's modules_to_save."
            )


def plain(value: Any) -> Any:
    """As a user has written it: peft makes sets of lists."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _check_embeddings(model: Any, config: Any, named: Callable[[str], str]) -> None:
    """The head stays a plain linear layer; where it is tied, the embeddings may be adapted, but not through it."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None:
        return  # `install_logprob_head` says so
    tied = is_tied(base)
    names = {id(module): name.rpartition(".")[2] for name, module in base.named_modules(remove_duplicate=False)}
    own, of_embedding = names[id(head)], names[id(embedding)]
    if tied and getattr(config, "ensure_weight_tying", False):
        raise ValueError(
            f"{named('ensure_weight_tying')} would adapt the head ({own}), which has to stay a plain linear layer: "
            "leave it out. The head then keeps its weights, and a merged model has embeddings of their own."
        )
    if hasattr(head, "base_layer") or type(head).__name__ in HEAD_WRAPPERS:
        key = HEAD_WRAPPERS.get(type(head).__name__, "target_modules")
        mend = f"leave {own} out of it."
        if key == "trainable_token_indices" and tied and own not in (config.trainable_token_indices or ()):
            mend = f"leave it out, or train the embeddings alone with modules_to_save: [{of_embedding}]."
            own = f"{own}, tied to {of_embedding}"
        raise ValueError(f"{named(key)} would adapt the head ({own}), which has to stay a plain linear layer: {mend}")
    if tied and type(embedding).__name__ == "ParamWrapper":
        raise ValueError(
            f"{named('target_parameters')} would adapt the head ({own}, tied to {of_embedding}), which has to stay a "
            f"plain linear layer: use target_modules: [{of_embedding}]."
        )


def is_tied(base: Any) -> bool:
    """Whether the head of a transformers model, with an adapter in it or without, has the weight of its embeddings."""
    return _weight(base.get_output_embeddings()) is _weight(base.get_input_embeddings())


def _weight(layer: Any) -> Any:
    """The frozen one, beneath whatever peft has put around it."""
    for name in ("original_module", "base_layer"):
        while getattr(layer, name, None) is not None:
            layer = getattr(layer, name)
    parametrized = getattr(layer, "parametrizations", None)
    return layer.weight if parametrized is None else parametrized.weight.original


def _check_biases(model: Any, config: Any, named: Callable[[str], str]) -> None:
    if not getattr(config, "lora_bias", False):
        return
    for name, module in model.get_base_model().named_modules():
        if getattr(module, "lora_B", None) and getattr(module.get_base_layer(), "bias", None) is None:
            raise ValueError(
                f"{named('lora_bias')} needs layers with a bias, which the adapter's is merged into, and {name} has "
                "none: leave it out, or name layers with a bias in target_modules."
            )


def _trained_beside(model: Any) -> Iterator[str]:
    """Parameters that are trained and that peft does not save with the adapter."""
    peft = import_peft("An adapter")
    own = dict(model.named_parameters())
    found = peft.get_peft_model_state_dict(
        model, state_dict=own, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    saved = {id(tensor) for tensor in found.values()}
    return (name for name in sorted(trained_names(model)) if id(own[name]) not in saved)
