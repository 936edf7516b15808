"""What a checkpoint says of an adapter beside its weights: how they are applied, and to which model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gvpo_lightning.policy.lora import check_adapter, is_adapted, saves_adapter_alone, trained_names
from gvpo_lightning.policy.weights import frozen_fingerprint

# what changes the function, and neither the names nor the shapes of the adapter's weights
APPLIED = (
    "peft_type",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "r",
    "rank_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "use_qalora",
    "qalora_group_size",
    "alora_invocation_tokens",
)


def adapter_state(model: Any, frozen: str | None) -> dict[str, Any]:
    """For a checkpoint of a peft model: plain values of its adapter's config, and its frozen weights' fingerprint.

    Args:
        frozen: None where the checkpoint holds those weights, or they are not in memory.
    """
    config = model.peft_config[model.active_adapter]
    applied = {name: getattr(config, name, None) for name in APPLIED}
    return {"config": json.loads(json.dumps(applied)), "frozen": frozen}


def check_adapter_state(own: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> None:
    """Raise ValueError where a checkpoint is of another adapter than the policy's, or was trained on another model.

    Either is None without an adapter; a fingerprint that is None is not compared.
    """
    if saved is None:
        return
    if own is None:
        raise ValueError("The checkpoint is an adapter's, the policy has none: set model.lora as in training.")
    for name, value in saved["config"].items():
        if own["config"].get(name) != value:
            raise ValueError(
                f"The checkpoint's adapter was trained with {name}={value}, the policy's has "
                f"{name}={own['config'].get(name)}: set model.lora.{name} as it was."
            )
    if None not in (own["frozen"], saved["frozen"]) and own["frozen"] != saved["frozen"]:
        raise ValueError(
            "The checkpoint's adapter was trained on another model than the policy's (fingerprint "
            f"{own['frozen']}, expected {saved['frozen']}): set model.policy, loading.revision, loading.dtype and "
            "loading.quantization as they were."
        )


@dataclass(frozen=True)
class SavedPolicy:
    """What a checkpoint holds of the policy.

    Attributes:
        trained: the names of the weights that it holds; None: all.
        adapter: what identifies an adapter and the model beneath it; None without one.
    """

    trained: frozenset[str] | None
    adapter: dict[str, Any] | None

    @classmethod
    def of(cls, policy: Any, can_be_reloaded: bool, *, must_be_whole: bool) -> "SavedPolicy":
        """Of an adapted policy the trained weights alone, since the frozen ones are where it came from.

        `must_be_whole`: with FSDP1, which flattens trained and frozen weights together.
        """
        if not is_adapted(policy):
            return cls(None, None)
        if must_be_whole or not saves_adapter_alone(policy, can_be_reloaded=can_be_reloaded):
            return cls(None, adapter_state(policy, None))
        return cls(trained_names(policy), adapter_state(policy, frozen_fingerprint(policy)))

    def check(self, policy: Any, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError where an adapter, or the model beneath it, is not the one of the checkpoint."""
        if self.trained is not None and "state_dict" in checkpoint:  # else of a folder, which its reader checks
            check_adapter(policy, self.trained, checkpoint["state_dict"])
        check_adapter_state(self.adapter, checkpoint.get("adapter"))
