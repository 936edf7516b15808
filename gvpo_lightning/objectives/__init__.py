"""Objectives: one file each, its loss as a function and how a run trains with it."""

from gvpo_lightning.objectives.gvpo import gvpo_loss

__all__ = ["gvpo_loss"]
