"""What is measured of one run of an experiment, while it trains and at its end."""

import copy
import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.paper.by_length import LengthMeter
from gvpo_lightning.callbacks.optimality import answer_probabilities, optimal_accuracy, validation_rows
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.data.rows import Row
from gvpo_lightning.distributed.sharding import is_sharded
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.head import Scoring, completion_logprobs, score

STEP_METRICS = {
    "loss": "loss",
    "residual_rms": "residual/rms",
    "entropy": "entropy",
    "reward": "reward/mean",
    "replayed": "source/replay/fraction",
}


class PaperMeter(L.Callback):
    """Measures the policy on the validation prompts at the start, `evaluations` times on the way and at the end.

    Writes `output`, JSON: `start` and `end` (see `measure`), `evaluations` (the same with `update`), `trace` (the
    update's own numbers, of gradient norm and log-ratio the largest since the point before), `stopped`, why training
    ended early, or null (of weights that are not finite there is no `end`), and `predicted`, the accuracy of the policy
    that maximises E[R] - beta KL for a 0/1 reward and a frozen reference, p e^(1/beta) / (p e^(1/beta) + 1 - p) for a
    prompt, where probabilities are exact and that policy is what the objective leads to.

    Args:
        output: the file.
        max_points: of the trace.
        evaluations: how often to measure between start and end.
        completions: of each validation prompt, sampled at the module's own temperature, at start and end.
        answers: the column with a prompt's right answer, or the list of all of them, as the reward accepts them; then
            accuracies are exact.
        length_parts: in how many parts, from short completions to long ones, `start` and `end` are also measured, as
            `by_length` (see `LengthMeter`).
        export: a folder for the trained policy.
    """

    def __init__(
        self,
        output: str,
        max_points: int = 25,
        evaluations: int = 0,
        completions: int = 8,
        answers: str | None = None,
        length_parts: int = 0,
        export: str | None = None,
    ) -> None:
        self.output, self.answers = Path(output), answers
        self.max_points, self.num_evaluations, self.completions = max_points, evaluations, completions
        self.record: dict[str, Any] = {"start": None, "end": None, "evaluations": [], "trace": [], "stopped": None}
        self.length_parts, self.export = length_parts, export
        self._lengths: LengthMeter | None = None
        self._base: Any = None
        self._rows: list[Row] = []
        self._gradient_norm = self._log_ratio = 0.0
        self._seen = self._last = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what the policy is now, unless the reference does, and measure it."""
        assert isinstance(pl_module, GVPOModule)
        if is_sharded(trainer.strategy):
            raise ValueError("The paper's experiments compare whole policies: take one device, DDP or LoRA, no FSDP.")
        self._rows = validation_rows(
            trainer.val_dataloaders, getattr(trainer, "datamodule", None), trainer.limit_val_batches
        )
        if not self._rows:
            raise ValueError("The paper's experiments are measured on validation prompts: set data.validation_split.")
        self._last = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        if not pl_module.reference.is_fixed:
            self._base = copy.deepcopy(pl_module.policy)
        self.record["start"] = self._measure(pl_module, self.completions)
        self.record["predicted"] = None
        leads_there = pl_module.objective_settings.kind in ("gvpo", "policy_gradient") and pl_module.beta > 0
        if self.answers is not None and pl_module.reference.is_fixed and leads_there:
            with pl_module.reference.applied(pl_module.policy) as reference:
                p = right_probabilities(pl_module, reference, self._rows, self.answers)
            self.record["predicted"] = float(optimal_accuracy(p, pl_module.beta).mean())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The gradient before it is clipped."""
        squares = [p.grad.double().square().sum() for p in pl_module.parameters() if p.grad is not None]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        self._gradient_norm = max(self._gradient_norm, norm) if norm == norm else float("inf")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update, a point of the trace, or an evaluation, if it is time."""
        update, last = trainer.global_step, self._last
        if update == self._seen:  # accumulating
            return
        self._seen = update
        values = trainer.callback_metrics
        self._log_ratio = max([self._log_ratio, *(float(v) for k, v in values.items() if is_log_ratio(k))])
        if is_time(update, last, self.max_points):
            self.record["trace"].append(
                {"update": update, "gradient_norm": self._gradient_norm, "log_ratio_max": self._log_ratio}
                | {name: float(values[key]) for name, key in STEP_METRICS.items() if key in values}
            )
            self._gradient_norm = self._log_ratio = 0.0
        if update != last and is_time(update, last, self.num_evaluations + 1):
            assert isinstance(pl_module, GVPOModule)
            measured = self._measure(pl_module, max(1, self.completions // 2))
            self.record["evaluations"].append({"update": update} | measured)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and write."""
        assert isinstance(pl_module, GVPOModule)
        self._finish(pl_module)
        if self.export is not None:
            pl_module.export(Path(self.export))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A policy that has diverged is a result, and is measured as it is."""
        if isinstance(exception, RuntimeError) and "the policy has diverged" in str(exception):
            self.record["stopped"] = f"update {trainer.global_step}: {str(exception).split(':')[0]}"
            self._finish(pl_module)

    def _finish(self, module: Any) -> None:
        finite = all(bool(torch.isfinite(p).all()) for p in module.policy.parameters())
        if finite:
            self.record["end"] = self._measure(module, self.completions)
        else:
            self.record["stopped"] = self.record["stopped"] or "weights that are not finite"
        self.record["skipped_updates"] = module.run.skipped_updates
        self.record["seconds"] = dict(module.seconds)
        self.output.write_text(json.dumps(without_nan(self.record), allow_nan=False))

    def _measure(self, module: GVPOModule, completions: int) -> dict[str, Any]:
        base: AbstractContextManager[Any] = module.reference.applied(module.policy)
        batch = sample_kept(module, self._rows, completions)
        measured = measure(module, batch, base if self._base is None else nullcontext(self._base))
        if self.length_parts and self._lengths is None:
            self._lengths = LengthMeter(module, batch, len(self._rows), self.length_parts)
        if self._lengths is not None:
            measured["by_length"] = self._lengths.measure(module, batch)
        if self.answers is not None:
            measured["accuracy"] = float(right_probabilities(module, module.policy, self._rows, self.answers).mean())
        return measured


def without_nan(value: Any) -> Any:
    """The same with null for numbers that are not finite, of which JSON knows nothing."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_log_ratio(name: str) -> bool:
    """Whether this is the metric of a source's largest one."""
    return name.startswith("log_ratio/") and name.endswith("/max")


def is_time(update: int, last: int, points: int) -> bool:
    """Whether `update` is one of `points` that are spread evenly over `last` updates, the last among them."""
    return points > 0 and update * points // last != (update - 1) * points // last


def sample_kept(module: GVPOModule, rows: list[Row], completions: int) -> CompletionBatch:
    """Completions of each prompt, at the module's temperature, from the whole distribution; group ids count `rows`."""
    generation = replace(module.generation, temperature=module.temperature, top_k=0, top_p=1.0, min_p=0.0)
    batch = module.sample(rows, "paper", num_completions=completions, generation=generation).batch
    return batch.select(batch.kept.nonzero().squeeze(-1))


@torch.no_grad()
def measure(module: GVPOModule, batch: CompletionBatch, base: AbstractContextManager[Any]) -> dict[str, Any]:
    """A policy, from completions that it has just sampled.

    Returns:
        `accuracy` and `sampled_reward`, both their mean reward; `kl`, KL(policy || base) in nats a completion, and
        `entropy` in nats a token, both estimated from them;
        `length` in tokens; `truncated`, a share.
    """
    scoring, size = Scoring(module.temperature), module.generation.batch_size
    with module.placement.forward_context():
        own, entropy = score(module.policy, batch, scoring, batch_size=size), mean_entropy(module, batch)
        with base as model:
            log_ratios = (own - score(model, batch, scoring, batch_size=size)).double().sum(dim=1)
    reward = float(batch.rewards.double().mean())
    return {
        "accuracy": reward,
        "sampled_reward": reward,
        "kl": float(log_ratios.mean()),
        "entropy": entropy,
        "length": float(batch.lengths.double().mean()),
        "truncated": float(batch.truncated.double().mean()),
    }


def mean_entropy(module: GVPOModule, batch: CompletionBatch) -> float:
    """Nats a token, over the batch's tokens."""
    total = 0.0
    for rows in torch.arange(len(batch)).split(module.generation.batch_size):
        part = batch.select(rows).to(module.policy.device)
        _, entropies = completion_logprobs(module.policy, part, Scoring(module.temperature), return_entropy=True)
        assert entropies is not None
        total += float(entropies.double().sum())
    return total / max(int(batch.lengths.sum()), 1)


@torch.no_grad()
def right_probabilities(module: GVPOModule, model: Any, rows: list[Row], column: str) -> Tensor:
    """(num_prompts,) float64, the exact probabilities that a model answers each prompt rightly."""
    answers = [[row[column]] if isinstance(row[column], str) else row[column] for row in rows]
    owners = [number for number, texts in enumerate(answers) for _ in texts]
    probabilities = answer_probabilities(
        model,
        module.tokenizer,
        [rows[number]["prompt"] for number in owners],
        [text for texts in answers for text in texts],
        temperature=module.temperature,
        batch_size=module.generation.batch_size,
    )
    total = torch.zeros(len(rows), dtype=torch.float64)
    return total.index_add(0, torch.tensor(owners), probabilities)
