"""Exports by the settings of a module that is not loaded."""

from gvpo_lightning.export.folder import export_checkpoint


def export(module, *arguments, **options):
    """`export_checkpoint` for a module's policy; arguments from the checkpoint on."""
    return export_checkpoint(module.source, module.settings, *arguments, **options)
