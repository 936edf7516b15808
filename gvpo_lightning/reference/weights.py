"""References that are the policy with other values of its trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gvpo_lightning.distributed.gather import gather_like, local_tensor, shard_like
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.policy.fingerprint import check_fingerprint, fingerprint
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.reference.settings import ReferenceSettings


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

    def identify(self, policy: Any, placement: Placement) -> None:
        """Take the fingerprint of weights that never change."""
        if self.is_fixed and self.fingerprint is None:
            self.fingerprint = fingerprint(p for p in policy.parameters() if p.requires_grad)

    def prepare(self, policy: Any, placement: Placement) -> None:
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
