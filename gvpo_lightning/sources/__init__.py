"""Where completions come from, and how they are mixed in one group."""

from gvpo_lightning.sources.settings import (
    DemonstrationSettings,
    FileSettings,
    ReplaySettings,
    SourceSettings,
)

__all__ = ["DemonstrationSettings", "FileSettings", "ReplaySettings", "SourceSettings"]
