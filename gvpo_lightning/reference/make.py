"""The reference of a run's settings."""

from collections.abc import Callable, Sequence
from typing import Any

from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.reference.adapter_off import AdapterOffReference
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.reference.cache import CachedReference
from gvpo_lightning.reference.model import ModelReference
from gvpo_lightning.reference.settings import ReferenceSettings
from gvpo_lightning.reference.weights import WeightsReference


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
