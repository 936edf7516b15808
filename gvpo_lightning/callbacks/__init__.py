"""Lightning callbacks: what a run shows and leaves behind, and how it survives."""

from gvpo_lightning.callbacks.benchmarks import BenchmarkReport
from gvpo_lightning.callbacks.completions import CompletionsTable, PredictionWriter
from gvpo_lightning.callbacks.estimate import MemoryEstimate
from gvpo_lightning.callbacks.optimality import OptimalityMeter
from gvpo_lightning.callbacks.summary import RunSummary
from gvpo_lightning.checkpointing.preemption import Preemption
from gvpo_lightning.checkpointing.resumed_settings import SettingsWin
from gvpo_lightning.checkpointing.run_checkpoint import RunCheckpoint
from gvpo_lightning.checks.error_notes import Whereabouts

__all__ = [
    "BenchmarkReport",
    "CompletionsTable",
    "MemoryEstimate",
    "OptimalityMeter",
    "PredictionWriter",
    "Preemption",
    "RunCheckpoint",
    "RunSummary",
    "SettingsWin",
    "Whereabouts",
]
