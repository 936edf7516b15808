"""Where a run stands against its optimum, on tasks with one right answer string."""

from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.data.rows import Row, rows_of
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.distributed.gather import callable_outside_steps, reshard
from gvpo_lightning.evaluation.optimality import answer_probabilities, optimal_accuracy
from gvpo_lightning.module import GVPOModule


class OptimalityMeter(L.Callback):
    """Compares the policy's accuracy with the one that GVPO's theory predicts, both exact (not sampled).

    For a reward of 1 for the right answer string and 0 for all else, and a frozen reference that gives the
    right answer with probability p, the optimal policy gives it with p e^(1/beta) / (p e^(1/beta) + 1 - p).
    That is the optimum of E[reward] - beta KL(policy || reference), which GVPO and policy_gradient have, and dr_grpo
    loosely: its pull is as strong, but to another divergence. For all else nothing is predicted: grpo divides by the
    rewards' deviation and by lengths, so its pull differs between prompts; dpo pushes pairs of one sign without end;
    GVPO without a term or with a length exponent, and sft, have other optima; and with beta 0 nothing pulls.
    Both probabilities are teacher-forced, per validation prompt, and then averaged. Logged at every
    validation as `optimum/predicted` and `optimum/reached`; the run's summary takes both up.

    Args:
        answer_column: the dataset's column with the one right answer, written as the reward accepts it.
    """

    def __init__(self, answer_column: str = "answer") -> None:
        self.answer_column = answer_column
        self.predicted: float | None = None
        self.reached: float | None = None
        self._rows: list[Row] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The prediction, from the reference; none against one that moves, is no model at hand or does not pull."""
        assert isinstance(pl_module, GVPOModule)
        self._rows = validation_rows(trainer)
        if not self._rows:
            rank_zero_warn("OptimalityMeter predicts nothing: the trainer has no validation prompts at its start.")
            return
        objective = pl_module.objective_settings
        if not (objective.is_gvpo or objective.kind in ("policy_gradient", "dr_grpo")):
            return
        if not (pl_module.beta and pl_module.reference.is_fixed) or pl_module.reference_settings.kind == "cached":
            return
        reshard(pl_module)
        with pl_module.reference.applied(pl_module.policy) as reference:
            p = self._probabilities(pl_module, reference)
        self.predicted = float(optimal_accuracy(p, pl_module.beta).mean())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log how far the policy has come."""
        if self.predicted is None:  # not training yet, or nothing is predicted
            return
        self._measure(pl_module)
        assert self.reached is not None
        pl_module.log_dict({"optimum/predicted": self.predicted, "optimum/reached": self.reached})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The policy as it is now."""
        if self._rows:
            self._measure(pl_module)

    def _measure(self, module: Any) -> None:
        self.reached = float(self._probabilities(module, module.policy).mean())

    def _probabilities(self, module: GVPOModule, model: PreTrainedModel) -> Tensor:
        """Of the prompts of all ranks."""
        with module.trainer.precision_plugin.forward_context(), callable_outside_steps(module):
            own = answer_probabilities(
                model,
                module.tokenizer,
                [row["prompt"] for row in self._rows],
                [str(row[self.answer_column]) for row in self._rows],
                temperature=module.temperature,
                batch_size=module.generation.batch_size,
            )
        return torch.cat(module.data_ranks.gather(own))


def validation_rows(trainer: L.Trainer) -> list[Row]:
    """The run's validation prompts, within limit_val_batches; empty without any."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    loaders = trainer.val_dataloaders
    if loaders is None and isinstance(datamodule, PromptDataModule):  # the first validation is far away
        loaders = datamodule.val_dataloader()
    if loaders is None:
        return []
    loaders = loaders if isinstance(loaders, list) else [loaders]
    limit = trainer.limit_val_batches  # batches, or a fraction of them
    return [
        row
        for loader in loaders
        for batch in islice(loader, limit if isinstance(limit, int) else int(limit * len(loader)))
        for row in rows_of(batch)
    ]
