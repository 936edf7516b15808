"""The reference that is another model than the policy's own start."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.distributed.sharding import shard_model
from gvpo_lightning.policy.fingerprint import check_fingerprint, fingerprint
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.prepare import load_policy
from gvpo_lightning.reference.base import Reference


class ModelReference(Reference):
    """Another model than the policy's own start, frozen and held beside it."""

    is_fixed = True

    def __init__(self, source: str, loading: LoadingSettings) -> None:
        super().__init__()
        self.source, self.loading = source, loading
        self.model: Any = None  # a PreTrainedModel, once there is a policy
        self.stays = False  # on the device

    def identify(self, policy: Any, placement: Placement) -> None:
        """Load it."""
        if self.model is None:
            self.model = load_policy(self.source, self.loading).requires_grad_(False).cpu()
            self.fingerprint = fingerprint(self.model.parameters())

    def prepare(self, policy: Any, placement: Placement) -> None:
        """Cast and shard it like the policy; a sharded one stays on the device, a whole one waits in host memory.

        Raises:
            ValueError: FSDP1, which shards what Lightning wraps and nothing beside it.
        """
        placement.strategy.precision_plugin.convert_module(
            nn.ModuleList([self.model])
        )  # transformers refuses if it is quantized
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
