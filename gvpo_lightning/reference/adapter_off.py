"""The reference that is a LoRA policy without its adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.policy.fingerprint import check_fingerprint, frozen_fingerprint
from gvpo_lightning.reference.base import Reference


class AdapterOffReference(Reference):
    """A LoRA policy without its adapter."""

    is_fixed = True

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint: str | None = None

    def identify(self, policy: Any, placement: Placement) -> None:
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
