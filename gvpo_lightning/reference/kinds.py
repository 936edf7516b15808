"""The references that a run can have: the policy's own weights of some time, another model's, or recorded log-probs."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.distributed.sharding import gather_like, local_tensor, shard_like, shard_model
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.prepare import load_policy
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.policy.weights import check_fingerprint, fingerprint, frozen_fingerprint
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.reference.settings import ReferenceSettings


class CachedReference(Reference):
    """Log-probs that the completions bring along; no model is held, and none can be asked.

    Args:
        model: the hub id or folder that has made them; None: the policy as it is loaded.
        source: the policy's.
        temperature: of the log-probs.
        recorded: gives what the file's rows say of them, and the file's path, once it has been read.
    """

    is_fixed = True

    def __init__(
        self,
        model: str | None,
        source: PolicySource,
        temperature: float,
        recorded: Callable[[], tuple[Sequence[dict[str, Any]], str]],
    ) -> None:
        super().__init__()
        self.model_name, self.source, self.temperature, self.recorded = model, source, temperature, recorded
        self._is_checked = False

    def identify(self, policy: Any, placement: Placement, original: Callable[[], Any]) -> None:
        """Raise ValueError where the log-probs are not those of the reference that the settings name; once."""
        if self._is_checked:
            return
        found, path = self.recorded()
        source, name = self.source, self.model_name
        if name is None:
            name, model = source.shown, original()
        else:
            model = load_policy(name, source.loading_of(name)).cpu()
        expected = cache_identity(model, name, source, self.temperature, placement.precision)
        if not found:
            raise ValueError("The file's rows don't say what made their reference_logprobs: run `gvpo reference`.")
        for identity in found:
            wrong = {key: identity.get(key) for key in expected if identity.get(key) != expected[key]}
            wrong.pop("model", None)
            if wrong:
                raise ValueError(
                    f"The reference log-probs in {path!r} were made by {identity.get('model')!r} with {wrong}, but "
                    f"this run's reference is {name!r} with { {key: expected[key] for key in wrong} }: set "
                    "reference.model or the settings back, or run `gvpo reference` again."
                )
        self._is_checked = True

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """It never changes."""

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """Refused."""
        raise ValueError("reference: cached can't score completions: all of them must bring their log-probs along.")
        yield  # a generator, as its siblings are


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the merges, the special tokens or the chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cache_identity(model: Any, name: str, source: PolicySource, temperature: float, precision: str) -> dict[str, Any]:
    """What log-probs of this model under a run's settings are made by; a new adapter does not count."""
    trains_on = source.can_be_reloaded and source.lora is None  # an adapter that lies in a folder
    weights = [p for key, p in model.named_parameters() if trains_on or "lora_" not in key]
    return {
        "model": name,
        "weights": fingerprint(weights),
        "tokenizer": tokenizer_hash(source.tokenizer),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "precision": precision,
        "temperature": float(temperature),
    }


class FixedReference(Reference):
    """One that never changes, and is known by the fingerprint of its weights."""

    is_fixed = True

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint: str | None = None

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """It never changes."""

    def state_dict(self, policy: Any) -> dict[str, Any]:
        """Its fingerprint."""
        return super().state_dict(policy) | {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any], policy: Any) -> None:
        """ValueError where it is not the checkpoint's."""
        super().load_state_dict(state, policy)
        check_fingerprint(self.fingerprint, state["fingerprint"])


class AdapterOffReference(FixedReference):
    """A LoRA policy without its adapter."""

    def identify(self, policy: Any, placement: Placement, original: Callable[[], Any]) -> None:
        """Check that there is an adapter to switch off, and take the fingerprint of what is beneath."""
        if not hasattr(policy, "disable_adapter") and not getattr(policy, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"reference: adapter_off needs a policy with an adapter, got a plain {type(policy).__name__}: "
                "set model.lora, wrap it with peft.get_peft_model, or use reference: frozen."
            )
        biases = {getattr(config, "bias", "none") for config in policy.peft_config.values()} - {"none"}
        if biases:
            raise ValueError(
                "reference: adapter_off needs a model that is not trained beneath its adapter, and with "
                f"bias={min(biases)!r} its biases are: use reference: frozen."
            )
        if self.fingerprint is None:
            self.fingerprint = frozen_fingerprint(policy)

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """The policy with its adapter off."""
        if hasattr(policy, "disable_adapter"):  # a PeftModel
            with policy.disable_adapter():
                yield policy
            return
        policy.disable_adapters()  # transformers' own integration
        try:
            yield policy
        finally:
            policy.enable_adapters()


class WeightsReference(Reference):
    """The policy with other values of its trained weights: `frozen`, `every_n_steps` or `ema`."""

    def __init__(self, settings: ReferenceSettings, *, can_be_reloaded: bool) -> None:
        super().__init__()
        self.settings = settings
        self.is_fixed = settings.kind == "frozen"
        self.can_be_reloaded = can_be_reloaded  # from where the policy comes from
        self.weights: dict[str, Tensor] = {}
        self.last_refresh = 0  # in updates
        self.fingerprint: str | None = None  # of weights that never change
        self._original: dict[str, Tensor] = {}  # whole, between `identify` and `prepare`

    def identify(self, policy: Any, placement: Placement, original: Callable[[], Any]) -> None:
        """Take weights that never change from where they come from, and their fingerprint."""
        if not self.is_fixed or self.fingerprint is not None:
            return
        model = original()
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.fingerprint = fingerprint(trained.values())
        if model is policy:
            return
        if placement.is_fsdp1:
            raise ValueError(
                "reference: frozen is the policy as its folder or hub id holds it, but this GVPOModule had been loaded "
                "before, and FSDPStrategy can't cut weights beside the policy's: fit a new GVPOModule, or use FSDP2 "
                "(ModelParallelStrategy, configs/strategy/fsdp2.yaml)."
            )
        self._original = trained

    def prepare(self, policy: Any, placement: Placement) -> None:
        """Copy the weights that will be trained, of those on other ranks nothing."""
        self.weights = self.weights or self._taken_from(policy)
        self._original = {}

    def _taken_from(self, policy: Any) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                whole = self._original.get(name)
                own = local_tensor(parameter.detach()) if whole is None else shard_like(whole, parameter)
                weights[name] = own.to("cpu", copy=True)
                if self.settings.kind == "ema" and parameter.dtype.itemsize < 4:
                    weights[name] = weights[name].float()  # an average's steps are below bf16's
        return weights

    @torch.no_grad()
    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """Renew or average the weights, if it is time."""
        kind, every = self.settings.kind, self.settings.every_n_steps
        if (
            kind == "frozen"
            or (every is not None and update - self.last_refresh < every)
            or update == self.last_refresh
        ):
            return
        share = 1.0 if self.settings.decay is None else 1.0 - self.settings.decay
        for name, parameter in policy.named_parameters():
            if name in self.weights:
                own = self.weights[name]
                own.lerp_(local_tensor(parameter.detach()).to(own.device, own.dtype), share)
        self.last_refresh = update
        self.version += 1

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """The policy with these values in place of its own, which lie in host memory meanwhile."""
        parts = {name: local_tensor(p.detach()) for name, p in policy.named_parameters() if name in self.weights}
        own: dict[str, Tensor] = {}
        try:
            for name, part in parts.items():
                own[name] = part.to("cpu", copy=True)
                part.copy_(self.weights[name])
            yield policy
        finally:
            for name, values in own.items():
                parts[name].copy_(values)

    def state_dict(self, policy: Any) -> dict[str, Any]:
        """A fingerprint where the weights can be loaded again, else the weights too."""
        state = super().state_dict(policy) | {"last_refresh": self.last_refresh, "fingerprint": self.fingerprint}
        if not (self.is_fixed and self.can_be_reloaded):
            weights = self.weights or self._taken_from(policy)  # before any training: what training would find
            state["weights"] = {
                name: gather_like(weights[name], parameter)
                for name, parameter in policy.named_parameters()
                if name in weights
            }
        return state

    def load_state_dict(self, state: dict[str, Any], policy: Any) -> None:
        """ValueError where the weights are not the checkpoint's."""
        super().load_state_dict(state, policy)
        self.last_refresh = state["last_refresh"]
        if "weights" in state:
            self.weights = {
                name: shard_like(state["weights"][name], parameter)
                for name, parameter in policy.named_parameters()
                if name in state["weights"]
            }
            self.fingerprint = state["fingerprint"]
        else:
            check_fingerprint(self.fingerprint, state["fingerprint"])


class ModelReference(FixedReference):
    """Another model than the policy's own start, frozen and held beside it."""

    def __init__(self, source: str, loading: LoadingSettings) -> None:
        super().__init__()
        self.source, self.loading = source, loading
        self.model: Any = None  # a PreTrainedModel, once there is a policy
        self.stays = False  # on the device

    def identify(self, policy: Any, placement: Placement, original: Callable[[], Any]) -> None:
        """Load it."""
        if self.model is None:
            self.model = load_policy(self.source, self.loading).requires_grad_(False).cpu()
            self.fingerprint = fingerprint(self.model.parameters())

    def prepare(self, policy: Any, placement: Placement) -> None:
        """Cast and shard it like the policy; a sharded one stays on the device, a whole one waits in host memory.

        Raises:
            ValueError: FSDP1, which shards what Lightning wraps and nothing beside it.
        """
        # in a list, as transformers refuses it of a quantized model itself
        placement.strategy.precision_plugin.convert_module(nn.ModuleList([self.model]))
        if self.stays or not placement.is_sharded:
            return
        if placement.is_fsdp1:
            raise ValueError(
                "reference.model holds a second model, which FSDPStrategy can't shard: use FSDP2 "
                "(ModelParallelStrategy, configs/strategy/fsdp2.yaml)."
            )
        shard_model(self.model, placement.strategy, placement.precision)
        self.model.to(placement.device)
        self.stays = True

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """The model, on the policy's device while it is used."""
        assert self.model is not None
        if self.stays:
            yield self.model
            return
        self.model.to(next(policy.parameters()).device)
        try:
            yield self.model
        finally:
            self.model.to("cpu")


def make_reference(
    settings: ReferenceSettings,
    source: PolicySource,
    temperature: float,
    recorded: Callable[[], tuple[Sequence[dict[str, Any]], str]],
) -> Reference:
    """The reference of these settings, for a policy from this source, with log-probs at this temperature.

    `recorded`: see `CachedReference`.
    """
    if settings.kind == "previous":
        return Reference()
    if settings.kind == "cached":
        return CachedReference(settings.model, source, temperature, recorded)
    if settings.model is not None:
        return ModelReference(settings.model, source.loading_of(settings.model))
    # without a new adapter the policy is what it started as, so that "frozen" needs no copy
    if settings.kind == "adapter_off" or (settings.kind == "frozen" and source.starts_at_base):
        return AdapterOffReference()
    return WeightsReference(settings, can_be_reloaded=source.can_be_reloaded)
