"""Lightning callbacks: what a run shows and leaves behind."""

from gvpo_lightning.callbacks.completions import CompletionsTable, PredictionWriter
from gvpo_lightning.callbacks.estimate import MemoryEstimate
from gvpo_lightning.callbacks.optimality import OptimalityMeter
from gvpo_lightning.callbacks.summary import RunSummary

__all__ = ["CompletionsTable", "MemoryEstimate", "OptimalityMeter", "PredictionWriter", "RunSummary"]
