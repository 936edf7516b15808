"""`SamplingModule`: the part of `GVPOModule` that trains nothing: a policy that samples and is rewarded."""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.checks.prompts import check_prompts
from gvpo_lightning.data.rows import Row, rows_of
from gvpo_lightning.distributed.gather import gathered
from gvpo_lightning.evaluation.loader import ProblemBatch
from gvpo_lightning.guard import Guard
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy_module import PolicyModule
from gvpo_lightning.rewards import Reward, RewardSettings, reward_columns
from gvpo_lightning.rewards.run import Rewards
from gvpo_lightning.rewards.tally import FailureTally
from gvpo_lightning.rollout.groups import sample_rollout
from gvpo_lightning.rollout.metrics import rollout_metrics
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import GenerationSettings
from gvpo_lightning.seeding import derive_seed

# what is logged of validation and test: the metric, the completions that it is a mean over, how batches are joined
EVALUATION_METRICS: tuple[tuple[str, str, Literal["mean", "min", "max"]], ...] = (
    ("reward/mean", "kept", "mean"),
    ("completion/length_mean", "kept", "mean"),
    ("completion/length_min", "kept", "min"),
    ("completion/length_max", "kept", "max"),
    ("completion/truncated_fraction", "all", "mean"),
    ("completion/dropped_fraction", "all", "mean"),
)


class SamplingModule(PolicyModule):
    """Validates, tests and predicts by sampling from the policy. Arguments as in `GVPOModule`."""

    def __init__(
        self,
        policy: str | PreTrainedModel,
        reward: list[Reward] | Reward | None,
        reward_settings: RewardSettings,
        tokenizer: str | PreTrainedTokenizerBase | None,
        generation: GenerationSettings,
        group_size: int,
        loading: LoadingSettings = LoadingSettings(),
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(policy, tokenizer, loading, lora)
        self.rewards = None if reward is None else Rewards(reward, reward_settings)
        self.generation = generation
        self.group_size = group_size
        self._sampled: Rollout | None = None  # for the batch at hand
        self._failures = FailureTally()  # since the evaluation began
        self._components: dict[str, list[float]] = {}  # of each reward, what it has given since then
        self.guard = Guard()
        self._evaluated: list[tuple[dict[str, float], int, int]] = []  # metrics, completions kept and all, by batch
        self._gathering: ExitStack | None = None

    def setup(self, stage: str) -> None:
        """Check what can be checked without the model, and start the processes that rewards run in."""
        super().setup(stage)
        if self.rewards is not None:
            self.rewards.ranks_here = self.trainer.num_devices
            self.rewards.shows_progress = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
            self.rewards.to(self.trainer.strategy.root_device)
            if self.data_ranks.is_first_of_model:
                self.rewards.start()

    def teardown(self, stage: str) -> None:
        """End them."""
        if self.rewards is not None:
            self.rewards.close()

    def check_prompts(
        self, rows: Iterable[Row], *, sampled: bool = True, config: PretrainedConfig | None = None
    ) -> int:
        """Raise ValueError, naming the row, for prompts that this module, or the `config`'s, can't be given.

        Returns:
            the longest prompt's tokens.
        """
        return check_prompts(
            rows,
            tokenizer=self.tokenizer,
            config=config or self.model_config(),
            rewards=self.rewards,
            max_new_tokens=self.generation.max_new_tokens if sampled else 1,
        )

    def sample(
        self,
        batch: Any,
        *purpose: int | str,
        generation: GenerationSettings | None = None,
        num_completions: int | None = None,
    ) -> Rollout:
        """Completions and rewards for a batch of prompts; the same `purpose` draws the same samples.

        What a reward raises ends all ranks that hold one model.
        """
        rows = rows_of(batch)
        seed = derive_seed(self.seed, *purpose, self.data_ranks.rank)
        ranks = self.data_ranks
        rollout: Rollout | None = None
        error: Exception | None = None
        try:
            with self.trainer.precision_plugin.forward_context(), self._gathered_for_batch():
                rollout = sample_rollout(
                    self.policy,
                    self.tokenizer,
                    rows,
                    num_completions or self.group_size,
                    generation or self.generation,
                    self.rewards if ranks.is_first_of_model else None,
                    seed=seed,
                )
        except Exception as raised:
            error = raised
        rollout, message = ranks.agree((rollout, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if rollout is None:  # or this rank would wait for one that has ended
            raise RuntimeError(f"Sampling or a reward failed on the first rank that holds this model: {message}")
        self._failures += rollout.failures
        return rollout

    def report_failures(self, failures: FailureTally) -> None:
        """RewardError where rewards have failed too often, else a warning; over all ranks, which must all call this."""
        if self.rewards is not None:
            failures.check(self.rewards.settings.max_failed_fraction)
        for name, description in failures.descriptions():
            self.guard.say(f"reward {name}", description)

    def _gathered_for_batch(self) -> Any:
        return nullcontext() if self._gathering is not None else gathered(self)

    def _start_epoch(self) -> None:
        """Gather the policy once for all batches, of which ranks may have other numbers; FSDP1 must do it in each."""
        self._failures, self._components = FailureTally(), {}
        if not isinstance(self.trainer.strategy, FSDPStrategy):
            self._gathering = ExitStack()
            self._gathering.enter_context(gathered(self))

    def _end_epoch(self) -> FailureTally:
        """Shard the policy again; returns how often rewards have failed, over all ranks."""
        if self._gathering is not None:
            self._gathering.close()
            self._gathering = None
        return sum(self.data_ranks.gather(self._failures), FailureTally())

    def _evaluate(self, stage: str) -> None:
        if self.rewards is None:
            raise ValueError(f"{stage} measures the reward of sampled completions: set model.reward, or leave it out.")
        rollout, self._sampled = self._sampled, None
        assert rollout is not None
        for name, values in rollout.kept_components().items():
            self._components.setdefault(name, []).extend(values)
        self._evaluated.append((rollout_metrics(rollout.batch), int(rollout.batch.kept.sum()), len(rollout.batch)))

    def _log_evaluation(self, stage: str, failures: FailureTally) -> None:
        """Over all batches and ranks; what nothing was kept for is not logged."""
        batches = [batch for of_rank in self.data_ranks.gather(self._evaluated) for batch in of_rank]
        self._evaluated = []
        for name, weight, reduction in EVALUATION_METRICS:
            weighted = [(metrics[name], kept if weight == "kept" else total) for metrics, kept, total in batches]
            counted = [(value, count) for value, count in weighted if count]
            if not counted:
                continue
            values, counts = zip(*counted, strict=True)
            mean = sum(value * count for value, count in counted) / sum(counts)
            self.log(f"{stage}/{name}", {"mean": mean, "min": min(values), "max": max(values)}[reduction])
        self._log_components(stage, failures)
        self.report_failures(failures)

    def _log_components(self, stage: str, failures: FailureTally) -> None:
        """Each reward's own; of one that has applied to nothing only how often it has failed."""
        parts = self.data_ranks.gather(self._components)
        for name in self.rewards.functions if self.rewards is not None else ():
            values = torch.tensor([value for part in parts for value in part.get(name, ())])
            if len(values):
                self.log(f"{stage}/reward/{name}/mean", float(values.mean()))
                self.log(f"{stage}/reward/{name}/std", float(values.std(correction=0)))
            self.log(f"{stage}/reward/{name}/failed_fraction", failures.fraction(name))

    # FSDP1 can gather the policy here, but not within a step
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample and reward `group_size` completions of each prompt."""
        self._sampled = self.sample(batch, "validation", batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Gather the policy once."""
        self._start_epoch()

    def on_validation_epoch_end(self) -> None:
        """Log what was sampled."""
        self._log_evaluation("validation", self._end_epoch())

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation, on the test prompts; a benchmark says how many completions its problems get."""
        if not isinstance(batch, ProblemBatch):
            self._sampled = self.sample(batch, "test", batch_idx)
        else:
            self._sampled = self.sample(batch, "test", batch.name, batch.first, num_completions=batch.num_samples)

    def on_test_epoch_start(self) -> None:
        """Gather the policy once."""
        self._start_epoch()

    def on_test_epoch_end(self) -> None:
        """Log what was sampled."""
        self._log_evaluation("test", self._end_epoch())

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation, on the prompts to predict for."""
        self._sampled = self.sample(batch, "predict", batch_idx)

    def on_predict_epoch_start(self) -> None:
        """Gather the policy once."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "predict gives ranks different numbers of batches, for each of which FSDPStrategy would gather the "
                "policy: use one device, DDP or FSDP2 (ModelParallelStrategy)."
            )
        self._start_epoch()

    def on_predict_epoch_end(self) -> None:
        """Shard it again."""
        self.report_failures(self._end_epoch())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count what was sampled."""
        self._evaluate("validation")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """As validation, on the test prompts; gives callbacks what was sampled."""
        sampled = self._sampled
        self._evaluate("test")
        return {"rollout": sampled}

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One dict a prompt in the offline format, with the prompt's other columns."""
        rows = rows_of(batch)
        assert self._sampled is not None
        sampled, self._sampled = self._sampled.rows(), None
        if self.rewards is None:
            for row in sampled:
                del row["rewards"]  # not asked for, rather than none given
        return [
            {"prompt": row["prompt"]} | {name: row[name] for name in reward_columns(row)} | recorded
            for row, recorded in zip(rows, sampled, strict=True)
        ]
