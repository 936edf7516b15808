"""Where a run stands against its optimum, on tasks with one right answer string."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.data.rows import Row, encode_behind, encode_prompt, rows_of
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.prepare import stop_token_ids
from gvpo_lightning.rewards.values import as_text


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
        self._answers: RightAnswers | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The prediction, from the reference; none against one that moves, is no model at hand or does not pull."""
        assert isinstance(pl_module, GVPOModule)
        self.predicted = self.reached = self._answers = None  # or those of an earlier fit would be taken for this one's
        datamodule = getattr(trainer, "datamodule", None)
        rows = validation_rows(trainer.val_dataloaders, datamodule, trainer.limit_val_batches)
        if not rows:
            rank_zero_warn("OptimalityMeter predicts nothing: the trainer has no validation prompts at its start.")
            return
        self._answers = RightAnswers(
            [row["prompt"] for row in rows],
            [as_text(row[self.answer_column]) for row in rows],
            pl_module.tokenizer,
            pl_module.temperature,
            pl_module.generation.batch_size,
            pl_module.placement,
        )
        objective = pl_module.objective_settings
        if not (objective.is_gvpo or objective.kind in ("policy_gradient", "dr_grpo")):
            return
        if not (pl_module.beta and pl_module.reference.is_fixed) or pl_module.reference_settings.kind == "cached":
            return
        pl_module.placement.reshard()
        with pl_module.reference.applied(pl_module.policy) as reference:
            p = self._answers.accuracy_of(reference)
        self.predicted = float(optimal_accuracy(p, pl_module.beta).mean())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log how far the policy has come."""
        if self.predicted is None:  # not training yet, or nothing is predicted
            return
        self.measure(pl_module.policy)
        assert self.reached is not None
        pl_module.log_dict({"optimum/predicted": self.predicted, "optimum/reached": self.reached})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The policy as it is now."""
        self.measure(pl_module.policy)

    def measure(self, policy: Any) -> None:
        """Take the accuracy that the policy has reached, where there are prompts; every rank must call this."""
        if self._answers is not None:
            self.reached = float(self._answers.accuracy_of(policy).mean())


def validation_rows(loaders: Any, datamodule: Any, limit: int | float) -> list[Row]:
    """The rows of a Trainer's validation loaders, within its limit_val_batches; none without any.

    `datamodule`: makes the loaders where the Trainer has not yet, since the first validation is far away.
    """
    if loaders is None and isinstance(datamodule, PromptDataModule):
        loaders = datamodule.val_dataloader()
    loaders = [] if loaders is None else loaders if isinstance(loaders, list) else [loaders]
    return [
        row
        for loader in loaders
        for batch in islice(loader, limit if isinstance(limit, int) else int(limit * len(loader)))
        for row in rows_of(batch)
    ]


def optimal_accuracy(p: Tensor, beta: float) -> Tensor:
    """Accuracy of the optimal policy where the reference is right with probability p; any shape."""
    p = p.double()
    return torch.sigmoid(torch.logit(p) + 1.0 / beta)


@torch.no_grad()
def answer_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    answers: list[str],
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Tensor:
    """(num_prompts,) exact probabilities, float64, of completing each prompt with its answer and an end token."""
    stops = stop_token_ids(model, tokenizer)
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    answer_ids = [encode_behind(prompt, answer, tokenizer) for prompt, answer in zip(prompts, answers, strict=True)]
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for stop in stops:
        completions = [[*ids, stop] for ids in answer_ids]
        batch = collate_completions(prompt_ids, completions, [False] * len(prompts), [0] * len(prompts), stop)
        token_logprobs = score(model, batch.to(model.device), Scoring(temperature), batch_size=batch_size)
        total += token_logprobs.double().sum(dim=1).exp().cpu()
    assert not math.isnan(float(total.sum()))
    return total


@dataclass(frozen=True)
class RightAnswers:
    """Prompts of this rank with the one right answer of each.

    Attributes:
        prompts, answers: texts or messages, and texts.
        tokenizer, temperature, batch_size: how their probabilities are taken.
        placement: where the models are.
    """

    prompts: list[Any]
    answers: list[str]
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    batch_size: int
    placement: Placement

    def accuracy_of(self, model: PreTrainedModel) -> Tensor:
        """(num_prompts,) of the prompts of all ranks: the exact probability of the right answer; all must call this."""
        options: dict[str, Any] = {"temperature": self.temperature, "batch_size": self.batch_size}
        with self.placement.forward_context(), self.placement.callable():
            own = answer_probabilities(model, self.tokenizer, self.prompts, self.answers, **options)
        return torch.cat(self.placement.ranks.gather(own))
