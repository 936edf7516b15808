"""What all runs of `benchmarks.sampling` share."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    updates: int = 240
    beta: float = 1.0
    group_size: int = 16
    prompts_per_rollout: int = 32
    prompts_per_update: int = 8
    max_new_tokens: int = 4
    completions_per_prompt: int = 32  # of the files
    learning_rate: float = 5e-4
    final_learning_rate: float = 1e-5
    gradient_clip: float = 1.0
    trace_every: int = 20

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW without decay."""
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear, down to the final learning rate."""
        last = self.final_learning_rate / self.learning_rate
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last, self.updates)
