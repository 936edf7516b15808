"""`PolicySource`: where the policy comes from, and what can be known of it before it is loaded."""

from typing import Any

import torch._dynamo
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.distributed.sharding import layer_classes, shard_model
from gvpo_lightning.policy.adapter_check import check_adapter_fits
from gvpo_lightning.policy.loading import LoadingSettings, adapter_base, empty_model, load_base_model, load_config
from gvpo_lightning.policy.lora import SETTING, add_lora, check_policy_settings, import_peft, starts_at_base
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer, prepare_policy


def compile_layers(policy: Any) -> None:
    """Let every decoder layer be compiled when it is first run, for all sizes of micro-batches; once for all.

    In place, so that names, hooks, checkpoints and exports stay as they are. The layers share their compiled code: a
    deep model compiles no longer than a shallow one. The head is not compiled, as it knows only at run time how many
    tokens count.

    Raises:
        ValueError: the model does not say which its decoder layers are.
    """
    layers: list[Any] = [module for module in policy.modules() if isinstance(module, tuple(layer_classes(policy)))]
    if not layers:
        raise ValueError(
            f"torch_compile=True compiles the decoder layers one by one, but {type(policy).__name__} does not say "
            "which they are (_no_split_modules): set torch_compile=False."
        )
    # with and without gradient, mask and checkpointing, of one sequence and of many: not all fit the usual 8
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 32)
    for layer in layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)


class PolicySource:
    """A run's policy as the user has named or given it; arguments as in `GVPOModule`.

    Attributes:
        given: a hub id, a folder, or a transformers model.
        loading, lora: how it is loaded, and the new adapter on it.
        tokenizer: the policy's own unless another one was given.

    Raises:
        ValueError: there is no such policy or tokenizer, or the settings contradict each other.
    """

    def __init__(
        self,
        given: str | PreTrainedModel,
        loading: LoadingSettings = LoadingSettings(),
        lora: dict[str, Any] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_policy_settings(given, loading, lora)
        self.given, self.loading, self.lora = given, loading, lora
        self._seed = 0  # of the adapter that was drawn last
        # Read the config first: a missing policy must be reported as such, not as a missing tokenizer.
        self._config = load_config(given, loading) if isinstance(given, str) else given.config
        # that an adapter fits is known before data and weights are loaded
        if isinstance(given, str):
            where = SETTING if lora is not None else f"The adapter in {given!r}"
            check_adapter_fits(self.adapted(with_weights=False), where)
        else:
            check_adapter_fits(given, "The policy's adapter")
        if tokenizer is None and not isinstance(given, str):
            raise ValueError("A policy given as a model object needs its tokenizer: pass tokenizer=…")
        named: Any = given if tokenizer is None else tokenizer
        self.tokenizer: PreTrainedTokenizerBase = (
            load_tokenizer(named, self.loading_of(named)) if isinstance(named, str) else named
        )

    @property
    def name(self) -> str:
        """The folder or hub id, or what a model's config calls it."""
        return self.given if isinstance(self.given, str) else self.given.config.name_or_path or self.shown

    @property
    def shown(self) -> str:
        """The folder or hub id, or a model's class."""
        return self.given if isinstance(self.given, str) else type(self.given).__name__

    @property
    def can_be_reloaded(self) -> bool:
        """Whether it lies in a folder or on the hub."""
        return isinstance(self.given, str)

    @property
    def starts_at_base(self) -> bool:
        """Whether the policy without its adapter is what it starts as, and stays that."""
        return self.lora is not None and starts_at_base(self.lora)

    def config(self) -> PretrainedConfig:
        """The model's; of an adapter's folder, that of the model beneath."""
        return self._config

    def vocab_size(self) -> int:
        """Token ids that the policy has."""
        return self._config.get_text_config().vocab_size

    def loading_of(self, name: str) -> LoadingSettings:
        """How a model or tokenizer of this name is loaded."""
        return self.loading if name == self.given else self.loading.elsewhere()

    def bytes(self) -> int:
        """Of the weights in memory, before any is quantized."""
        parameters = empty_model(self._config, self.loading).parameters()
        return self.loading.torch_dtype.itemsize * sum(parameter.numel() for parameter in parameters)

    def adapted(self, *, with_weights: bool) -> Any:
        """The policy beneath an adapter of the run's shape, not quantized; without weights, no memory is taken.

        None where the policy, which is given by name, has no adapter.
        """
        assert isinstance(self.given, str)
        found = adapter_base(self.given, self.loading)
        if found is None and self.lora is None:
            return None
        beneath, loading = found or (self.given, self.loading)
        model = load_base_model(beneath, loading.whole()) if with_weights else empty_model(self._config, loading)
        if found is None:
            assert self.lora is not None
            adapted = add_lora(model, self.lora, seed=0)
        else:
            peft = import_peft(f"policy={self.given!r}, an adapter,")
            adapter = peft.PeftConfig.from_pretrained(self.given, revision=self.loading.revision)
            adapter.inference_mode = False  # as in the folder's file, nothing would be trained
            # without weights some adapters could not be initialised from them, such as PiSSA's
            adapted = peft.get_peft_model(model, adapter, low_cpu_mem_usage=not with_weights)
        config = adapted.peft_config["default"]
        config.base_model_name_or_path, config.revision = beneath, loading.revision
        return adapted

    def load(self, seed: int, loading: LoadingSettings | None = None) -> Any:
        """The model, ready to train; one that was given is made ready in place.

        Args:
            seed: a new adapter is drawn from it.
            loading: instead of the source's own.
        """
        self._seed = seed
        if isinstance(self.given, str):
            return load_policy(self.given, loading or self.loading, self.lora, seed)
        prepare_policy(self.given)
        return self.given

    def load_again(self) -> Any:
        """The policy that `load` gave last, as it was then; one that was given as a model is as it is now."""
        return self.load(self._seed)


def place_policy(model: Any, placement: Placement, checkpoints: bool, compiles: bool) -> None:
    """Shard a policy that is ready, as the strategy says; `checkpoints`: with gradient checkpointing."""
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiles:
        compile_layers(model)
    shard_model(model, placement.strategy, placement.precision)
