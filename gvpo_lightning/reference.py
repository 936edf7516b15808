"""The reference, what the implicit reward is measured against: which weights, when they are refreshed.

| kind            | in memory beside the policy            | a checkpoint holds            | refreshed                |
|-----------------|----------------------------------------|-------------------------------|--------------------------|
| `frozen`        | the trained weights' first values (2)  | their fingerprint (1)         | never                    |
| `previous`      | nothing                                | nothing                       | every rollout            |
| `every_n_steps` | one copy of the trained weights        | that copy                     | after n updates or more  |
| `ema`           | one copy of the trained weights        | that copy                     | every rollout, by average|
| `adapter_off`   | nothing                                | the fingerprint of the rest   | never                    |
| `cached`        | nothing                                | the cache's fingerprint       | never                    |

(1) and the values themselves where the policy was a model object, which can't be loaded again. (2) nothing with an
adapter from the run's settings (`lora`): without it the policy is what it started as, as in `adapter_off`. Another
`model` is held whole beside the policy: in host memory while it is not asked, or under FSDP2 on the device, sharded.

Copies hold the weights that are trained and no others, so with LoRA only the adapter's, sharded as the policy is,
and lie in host memory: their values take the place of the policy's while it is asked as the reference. A reference
changes only at the start of a rollout, so all completions of a group are measured against one version of it;
log-probs are computed once a completion, with the training forward, and kept with it.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from gvpo_lightning.batch import CompletionBatch, dropped_completion
from gvpo_lightning.head import completion_logprobs
from gvpo_lightning.loading import LoadingSettings
from gvpo_lightning.plan import rank_share
from gvpo_lightning.policy import load_policy
from gvpo_lightning.rollout.generation import evaluating
from gvpo_lightning.sharding import gather_like, is_sharded, local_tensor, shard_like, shard_model

ReferenceKind = Literal["frozen", "previous", "every_n_steps", "ema", "adapter_off", "cached"]


@dataclass(frozen=True)
class ReferenceSettings:
    """What the reference is.

    Attributes:
        kind: "frozen", the policy as training found it; "previous", the policy at the start of each rollout;
            "every_n_steps", the policy as it was n or more updates ago; "ema", an average of the policies at the
            rollouts' starts; "adapter_off", a LoRA policy without its adapter; "cached", log-probs that the
            completions bring along.
        model: for "frozen" and "cached", a hub id or folder of another model than the policy's own start.
        every_n_steps: optimizer updates; the reference is renewed at the first rollout after as many.
        decay: in (0, 1); at each rollout's start, reference = decay * reference + (1 - decay) * policy.
    """

    kind: ReferenceKind = "frozen"
    model: str | None = None
    every_n_steps: int | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ReferenceKind):
            raise ValueError(f"reference must be one of {get_args(ReferenceKind)}, got {self.kind!r}.")
        for name, owners in (
            ("model", ("frozen", "cached")),
            ("every_n_steps", ("every_n_steps",)),
            ("decay", ("ema",)),
        ):
            if getattr(self, name) is not None and self.kind not in owners:
                raise ValueError(
                    f"reference.{name} belongs to the kinds {owners}, got {getattr(self, name)!r} with {self.kind!r}."
                )
        if self.kind == "every_n_steps" and not (self.every_n_steps and self.every_n_steps >= 1):
            raise ValueError(
                f"reference.every_n_steps must be at least 1, got {self.every_n_steps}: "
                "write reference: {kind: every_n_steps, every_n_steps: 64}."
            )
        if self.kind == "ema" and not (self.decay is not None and 0 < self.decay < 1):
            raise ValueError(
                f"reference.decay must be in (0, 1), got {self.decay}: write reference: {{kind: ema, decay: 0.9}}."
            )


class Reference:
    """Scores completions as the reference would; this one is the policy itself, at the start of each rollout.

    `version` changes with every refresh: log-probs of another version are out of date.
    """

    is_fixed = False

    def __init__(self) -> None:
        self.version = 0

    def identify(self, policy: Any) -> None:
        """Note which weights the whole policy, not yet sharded, starts from; called again, it does nothing."""

    def prepare(self, policy: Any, strategy: Strategy, precision: str) -> None:
        """Take what is needed of the policy, as it is sharded, before it is trained; called again, it does nothing."""

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """At the start of a rollout, after so many updates."""
        self.version = rollout

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """Inside, the model that the reference is; the policy must not be trained there."""
        yield policy

    def state_dict(self, policy: Any) -> dict[str, Any]:
        """What a checkpoint holds of it: tensors, numbers and strings; every rank must call this."""
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any], policy: Any) -> None:
        """Take up what `state_dict` left; ValueError where it belongs to another reference."""
        self.version = state["version"]


class AdapterOffReference(Reference):
    """A LoRA policy without its adapter."""

    is_fixed = True

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint: str | None = None

    def identify(self, policy: Any) -> None:
        """Check that there is an adapter to switch off, and take the fingerprint of what is beneath."""
        if not hasattr(policy, "disable_adapter") and not getattr(policy, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"reference: adapter_off needs a policy with an adapter, got a plain {type(policy).__name__}: "
                "set model.lora, wrap it with peft.get_peft_model, or use reference: frozen."
            )
        if self.fingerprint is None:
            self.fingerprint = frozen_fingerprint(policy)

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """It never changes."""

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

    def state_dict(self, policy: Any) -> dict[str, Any]:
        """Its fingerprint."""
        return super().state_dict(policy) | {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any], policy: Any) -> None:
        """ValueError where it is not the checkpoint's."""
        super().load_state_dict(state, policy)
        check_fingerprint(self.fingerprint, state["fingerprint"])


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

    def identify(self, policy: Any) -> None:
        """Take the fingerprint of weights that never change."""
        if self.is_fixed and self.fingerprint is None:
            self.fingerprint = fingerprint(p for p in policy.parameters() if p.requires_grad)

    def prepare(self, policy: Any, strategy: Strategy, precision: str) -> None:
        """Copy the weights that will be trained, of those on other ranks nothing."""
        if self.weights:
            return
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                self.weights[name] = local_tensor(parameter.detach()).to("cpu", copy=True)
                if self.settings.kind == "ema" and parameter.dtype.itemsize < 4:
                    self.weights[name] = self.weights[name].float()  # an average's steps are below bf16's

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
            state["weights"] = {
                name: gather_like(self.weights[name], parameter)
                for name, parameter in policy.named_parameters()
                if name in self.weights
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


class ModelReference(Reference):
    """Another model than the policy's own start, frozen and held beside it."""

    is_fixed = True

    def __init__(self, source: str, loading: LoadingSettings) -> None:
        super().__init__()
        self.source, self.loading = source, loading
        self.model: Any = None  # a PreTrainedModel, once there is a policy
        self.stays = False  # on the device

    def identify(self, policy: Any) -> None:
        """Load it."""
        if self.model is None:
            self.model = load_policy(self.source, self.loading).requires_grad_(False).cpu()
            self.fingerprint = fingerprint(self.model.parameters())

    def prepare(self, policy: Any, strategy: Strategy, precision: str) -> None:
        """Cast and shard it like the policy; a sharded one stays on the device, a whole one waits in host memory.

        Raises:
            ValueError: FSDP1, which shards what Lightning wraps and nothing beside it.
        """
        strategy.precision_plugin.convert_module(nn.ModuleList([self.model]))  # transformers refuses if it is quantized
        if self.stays or not is_sharded(strategy):
            return
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "reference.model holds a second model, which FSDPStrategy can't shard: use FSDP2 "
                "(ModelParallelStrategy, configs/strategy/fsdp2.yaml)."
            )
        shard_model(self.model, strategy, precision)
        self.model.to(strategy.root_device)
        self.stays = True

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """It never changes."""

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

    def state_dict(self, policy: Any) -> dict[str, Any]:
        """Its fingerprint."""
        return super().state_dict(policy) | {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any], policy: Any) -> None:
        """ValueError where it is not the checkpoint's."""
        super().load_state_dict(state, policy)
        check_fingerprint(self.fingerprint, state["fingerprint"])


class CachedReference(Reference):
    """Log-probs that the completions bring along; no model is held, and none can be asked."""

    is_fixed = True
    is_checked = False  # that the log-probs are those of the model that the settings name

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """It never changes."""

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """Refused."""
        raise ValueError("reference: cached can't score completions: all of them must bring their log-probs along.")
        yield  # a generator, as its siblings are


def make_reference(
    settings: ReferenceSettings, *, can_be_reloaded: bool, is_base: bool, loading: LoadingSettings
) -> Reference:
    """The reference of these settings.

    Args:
        can_be_reloaded: the policy comes from a hub id or a folder.
        is_base: without its adapter the policy is what it started as, so that "frozen" needs no copy.
        loading: of a model of its own.
    """
    if settings.kind == "previous":
        return Reference()
    if settings.kind == "adapter_off":
        return AdapterOffReference()
    if settings.kind == "cached":
        return CachedReference()
    if settings.model is not None:
        return ModelReference(settings.model, loading)
    if settings.kind == "frozen" and is_base:
        return AdapterOffReference()
    return WeightsReference(settings, can_be_reloaded=can_be_reloaded)


def score(
    model: PreTrainedModel,
    batch: CompletionBatch,
    *,
    temperature: float,
    batch_size: int,
    num_parts: int | None = None,
    implementation: str = "auto",
    padding_free: bool = False,
) -> Tensor:
    """(S, T) float32 log-probs of the whole batch under the model, `batch_size` completions at a time.

    Args:
        num_parts: forward passes to make, of equal sizes; ranks that share one model must make the same number.
    """
    num_parts = math.ceil(len(batch) / batch_size) if num_parts is None else num_parts
    # evaluation's inference tensors must not stay in what a sharded model has gathered: training would fail on them
    token_logprobs = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=batch.rewards.device)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        for number in range(num_parts):
            rows = torch.tensor(rank_share(len(batch), number, num_parts), dtype=torch.int64)
            part = batch.select(rows) if len(rows) else dropped_completion()
            values, _ = completion_logprobs(
                model,
                part.to(model.device),
                temperature=temperature,
                implementation=implementation,
                padding_free=padding_free,
            )
            token_logprobs[rows, : values.shape[1]] = values[: len(rows)].to(token_logprobs)
    return token_logprobs


@torch.no_grad()
def fingerprint(weights: Iterable[Tensor]) -> str:
    """A checksum of the weights' bits, exact and independent of the order of summation within one of them."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    checksum = 0
    for index, weight in enumerate(weights):
        flat = weight.detach().contiguous().view(integers[weight.element_size()]).flatten()
        for part in flat.split(2**20):  # as 64-bit numbers a whole weight would be many times its size
            bits = part.to(torch.int64)
            checksum = (checksum + (index + 1) * int((bits * bits + bits).sum())) % 2**63
    return f"{checksum:016x}"


def frozen_fingerprint(policy: Any) -> str:
    """Of the weights beneath an adapter, as they are when first asked for: they never change."""
    found: str | None = getattr(policy, "frozen_fingerprint", None)
    if found is None:
        found = policy.frozen_fingerprint = fingerprint(p for p in policy.parameters() if not p.requires_grad)
    return found


def check_fingerprint(found: str | None, expected: str | None) -> None:
    """Raise ValueError where the reference at hand is not the one that a checkpoint was trained against."""
    if found != expected:
        raise ValueError(
            "The reference is not the one that this checkpoint was trained against (fingerprint "
            f"{found}, expected {expected}): its files, its dtype or `reference` have changed."
        )
