"""The reference of a run's settings."""

from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.reference.adapter_off import AdapterOffReference
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.reference.cache import CachedReference
from gvpo_lightning.reference.model import ModelReference
from gvpo_lightning.reference.settings import ReferenceSettings
from gvpo_lightning.reference.weights import WeightsReference


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
