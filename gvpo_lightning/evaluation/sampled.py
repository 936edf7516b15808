"""`SampledEvaluation`: what validation, test and prediction share: completions, their rewards, and means over all."""

import math
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric

from gvpo_lightning.data.rows import rows_of
from gvpo_lightning.evaluation.benchmarks import ProblemBatch
from gvpo_lightning.rewards import reward_columns
from gvpo_lightning.rewards.run import FailureTally
from gvpo_lightning.rollout.groups import RewardsFailed, Sampling, sample_rollout
from gvpo_lightning.rollout.rollout import Rollout, rollout_metrics
from gvpo_lightning.rollout.settings import GenerationSettings
from gvpo_lightning.seeding import derive_seed

# how batches are joined; means are over completions: those that were kept, of fractions all
JOINED: dict[str, type[Metric]] = {
    "reward/mean": MeanMetric,
    "completion/length_mean": MeanMetric,
    "completion/length_min": MinMetric,
    "completion/length_max": MaxMetric,
    "completion/truncated_fraction": MeanMetric,
    "completion/dropped_fraction": MeanMetric,
}
# what changes nothing, so that a rank without completions has something to exchange
NOTHING: dict[type[Metric], tuple[float, ...]] = {
    MeanMetric: (0.0, 0.0),
    MinMetric: (math.inf,),
    MaxMetric: (-math.inf,),
}


class SampledEvaluation:
    """Samples and rewards `group_size` completions of each prompt, and adds up what came of them.

    `stage`: Lightning's name of the function that is run; within `fit` it is validated too.
    """

    def __init__(self, sampling: Sampling, group_size: int, stage: str) -> None:
        self.sampling, self.group_size = sampling, group_size
        # text, of which seeds are made, and not Lightning's constant of the same value
        self.stage = next((name for name in ("test", "predict") if stage == name), "validation")
        self.failures = FailureTally()
        self.absent: set[str] = set()  # names that `metrics` has no completion for
        self.error: Exception | None = None  # what rewards have raised on the batch at hand
        self._gathering: ExitStack | None = None

    def begin(self) -> None:
        """Gather the policy once for all batches, of which ranks may have other numbers; FSDP1 must do it in each.

        Raises:
            ValueError: there is no reward to measure, or FSDP1's ranks would not have equally many batches.
        """
        if self.sampling.placement.is_fsdp1 and self.stage == "predict":
            raise ValueError(
                "predict gives ranks different numbers of batches, for each of which FSDPStrategy would gather the "
                "policy: use one device, DDP or FSDP2 (ModelParallelStrategy)."
            )
        if self.sampling.rewards is None and self.stage != "predict":
            raise ValueError(
                f"{self.stage} measures the reward of sampled completions: set model.reward, or leave it out."
            )
        placement, ranks = self.sampling.placement, self.sampling.placement.ranks
        self.failures, self.error = FailureTally(), None
        self._components: dict[str, list[float]] = {}  # of each reward, what it has given
        # torchmetrics would take ranks that hold one model for ranks with different completions
        synced = {"sync_on_compute": ranks.size > 1, "process_group": ranks.process_group}
        self._metrics = {name: kind(**synced).to(placement.device) for name, kind in JOINED.items()}
        for metric in self._metrics.values():
            metric.set_dtype(torch.float64).update(*NOTHING[type(metric)])
        if not placement.is_fsdp1:
            self._gathering = ExitStack()
            self._gathering.enter_context(placement.kept_gathered())

    def end(self) -> None:
        """Shard the policy again, and learn of the failures on other ranks."""
        self._shard_again()
        self.failures = sum(self.sampling.placement.ranks.gather(self.failures), FailureTally())

    def _shard_again(self) -> None:
        if self._gathering is not None:
            self._gathering.close()
            self._gathering = None

    def sample(self, policy: Any, batch: Any, *purpose: int | str, **options: Any) -> Rollout:
        """Completions and rewards for a batch of prompts; the same `purpose` draws the same samples.

        What a reward raises ends all ranks that hold one model.
        """
        rollout = self._sample(policy, batch, *purpose, **options)
        self.raise_error()
        return rollout

    def _sample(
        self,
        policy: Any,
        batch: Any,
        *purpose: int | str,
        generation: GenerationSettings | None = None,
        num_completions: int | None = None,
    ) -> Rollout:
        """The same, but what a reward raises is kept as `error`."""
        sampling, placement = self.sampling, self.sampling.placement
        ranks = placement.ranks
        rollout: Rollout | None = None
        error: Exception | None = None
        try:
            with placement.forward_context(), nullcontext() if self._gathering is not None else placement.gathered():
                rollout = sample_rollout(
                    policy,
                    sampling.source.tokenizer,
                    rows_of(batch),
                    num_completions or self.group_size,
                    generation or sampling.generation,
                    sampling.rewards if ranks.is_first_of_model else None,
                    seed=derive_seed(sampling.seed, *purpose, ranks.rank),
                )
        except RewardsFailed as failed:
            rollout, error = failed.rollout, failed.error
        except Exception as raised:
            error = raised
        rollout, message = ranks.agree((rollout, None if error is None else f"{type(error).__name__}: {error}"))
        if error is None and message is not None:
            # A peer has failed: without this error, this rank would hang in the next collective.
            error = RuntimeError(f"Sampling or a reward failed on the first rank that holds this model: {message}")
        self.error = error
        if rollout is None:
            self.raise_error()
        assert rollout is not None
        self.failures += rollout.failures
        return rollout

    def sample_batch(self, policy: Any, batch: Any, number: int) -> None:
        """Those for a loader's batch of this number; a benchmark says how many completions its problems get.

        What a reward raises waits for `raise_error`, so that what was sampled can be saved before.
        """
        purpose: tuple[int | str, ...] = (self.stage, number)
        num_completions = None
        if isinstance(batch, ProblemBatch):
            purpose, num_completions = (self.stage, batch.name, batch.first), batch.num_samples
        self.rollout = self._sample(policy, batch, *purpose, num_completions=num_completions)

    def raise_error(self) -> None:
        """Raise what rewards have raised on the last batch, if they have; the evaluation ends with that."""
        if self.error is not None:
            self._shard_again()
            raise self.error

    def count(self) -> Rollout:
        """Add the last batch, and give it back; what nothing was kept for adds nothing."""
        rollout, batch = self.rollout, self.rollout.batch
        kept = batch.kept
        for name, values in rollout.components_of(kept).items():
            self._components.setdefault(name, []).extend(values)
        for name, value in rollout_metrics(batch, kept, batch.lengths).items():
            count = len(batch) if name.endswith("fraction") else int(kept.sum())
            if name in self._metrics and count:
                weight = (count,) if JOINED[name] is MeanMetric else ()
                self._metrics[name].update(value, *weight)
        return rollout

    def metrics(self) -> dict[str, float]:
        """By their logged names, over all batches and ranks; of a reward that applied to nothing its failures alone.

        Nothing is logged of predictions.
        """
        if self.stage == "predict":
            return {}
        found: dict[str, float] = {}
        self.absent = set()
        for name, metric in self._metrics.items():
            value = float(metric.compute())
            if math.isfinite(value):
                found[name] = value
            else:
                self.absent.add(name)
        parts = self.sampling.placement.ranks.gather(self._components)
        for name in self.sampling.rewards.functions if self.sampling.rewards is not None else ():
            values = torch.tensor([value for part in parts for value in part.get(name, ())])
            if len(values):
                found[f"reward/{name}/mean"] = float(values.mean())
                found[f"reward/{name}/std"] = float(values.std(correction=0))
            else:
                self.absent |= {f"reward/{name}/mean", f"reward/{name}/std"}
            found[f"reward/{name}/failed_fraction"] = self.failures.fraction(name)
        return {f"{self.stage}/{name}": value for name, value in found.items()}

    def report(self) -> None:
        """RewardError where rewards have failed too often, else a warning."""
        self.sampling.report([self.failures])

    def predictions(self, batch: Any) -> list[dict[str, Any]]:
        """One dict a prompt of the last batch in the offline format, with the prompt's other columns."""
        sampled = self.rollout.rows()
        if self.sampling.rewards is None or self.error is not None:
            for row in sampled:
                del row["rewards"]  # not asked for, rather than none given
        return [
            {"prompt": row["prompt"]} | {name: row[name] for name in reward_columns(row)} | recorded
            for row, recorded in zip(rows_of(batch), sampled, strict=True)
        ]
