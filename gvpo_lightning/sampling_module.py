"""`SamplingModule`: the part of `GVPOModule` that trains nothing: a policy that samples and is rewarded."""

import functools
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.checks import check_prompts
from gvpo_lightning.distributed import DataRanks
from gvpo_lightning.evaluation.loader import ProblemBatch
from gvpo_lightning.export import sample_at_a_temperature, save_model, write_beside
from gvpo_lightning.export_adapter import merged_policy, write_adapter
from gvpo_lightning.guards import Guard
from gvpo_lightning.loading import LoadingSettings, adapter_base, check_attention, load_config
from gvpo_lightning.lora import (
    check_adapter,
    is_adapted,
    leave_frozen_out,
    lora_config,
    saves_adapter_alone,
    trained_names,
)
from gvpo_lightning.model_card import Kind, run_config
from gvpo_lightning.policy import load_policy, load_tokenizer, prepare_policy, stop_token_ids
from gvpo_lightning.rewards import Reward, RewardSettings, reward_columns
from gvpo_lightning.rewards.running import FailureTally, Rewards
from gvpo_lightning.rollout.generation import GenerationSettings
from gvpo_lightning.rollout.loader import Row, rows_of
from gvpo_lightning.rollout.sampling import Rollout, rollout_metrics, sample_rollout
from gvpo_lightning.seeding import derive_seed
from gvpo_lightning.sharding import data_ranks, full_state_dict, gathered, is_sharded

# what is logged of validation and test: the metric, the completions that it is a mean over, how batches are joined
EVALUATION_METRICS: tuple[tuple[str, str, Literal["mean", "min", "max"]], ...] = (
    ("reward/mean", "kept", "mean"),
    ("completion/length_mean", "kept", "mean"),
    ("completion/length_min", "kept", "min"),
    ("completion/length_max", "kept", "max"),
    ("completion/truncated_fraction", "all", "mean"),
    ("completion/dropped_fraction", "all", "mean"),
)


def check_policy_settings(policy: str | PreTrainedModel, loading: LoadingSettings, lora: dict[str, Any] | None) -> None:
    """Raise ValueError for settings of loading and adapter that contradict each other or the policy."""
    if not isinstance(policy, str):
        for name, given in (("loading", loading != LoadingSettings()), ("lora", lora is not None)):
            if given:
                raise ValueError(
                    f"{name} is for a policy given by name, got a {type(policy).__name__}: leave it out and build the "
                    "model so, or give its folder or hub id."
                )
        return
    if lora is not None:
        lora_config(lora)
    elif loading.quantization is not None and adapter_base(policy, loading) is None:
        raise ValueError(
            f"loading.quantization={loading.quantization!r} needs an adapter, quantized weights can't be trained: set "
            "model.lora, for example {r: 16, lora_alpha: 32, target_modules: all-linear}."
        )


class SamplingModule(L.LightningModule):
    """Loads and checks a policy; validates, tests and predicts by sampling. Arguments as in `GVPOModule`."""

    policy: Any  # a PreTrainedModel once `configure_model` has run

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
        super().__init__()
        check_policy_settings(policy, loading, lora)
        self.policy_source = policy
        self.loading, self.lora = loading, lora
        self.policy = None if isinstance(policy, str) else policy
        self.rewards = None if reward is None else Rewards(reward, reward_settings)
        self.tokenizer = self._resolve_tokenizer(tokenizer)
        self.generation = generation
        self.group_size = group_size
        self._sampled: Rollout | None = None  # for the batch at hand
        self._failures = FailureTally()  # since the evaluation began
        self._components: dict[str, list[float]] = {}  # of each reward, what it has given since then
        self.guard = Guard()
        self._evaluated: list[tuple[dict[str, float], int, int]] = []  # metrics, completions kept and all, by batch
        self._gathering: ExitStack | None = None
        self._saved_names: frozenset[str] | None = None  # of the policy's weights, where not all are saved

    def _resolve_tokenizer(self, tokenizer: str | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        if tokenizer is None and not isinstance(self.policy_source, str):
            raise ValueError("A policy given as a model object needs its tokenizer: pass tokenizer=…")
        source: Any = self.policy_source if tokenizer is None else tokenizer
        return load_tokenizer(source, self.loading_of(source)) if isinstance(source, str) else source

    def loading_of(self, name: str) -> LoadingSettings:
        """How a model or tokenizer of this name is loaded."""
        return self.loading if name == self.policy_source else self.loading.elsewhere()

    @property
    def data_ranks(self) -> DataRanks:
        """The ranks that share a rollout."""
        return data_ranks(self.trainer.strategy)

    @property
    def seed(self) -> int:
        """The run's seed, as set by `lightning.seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def setup(self, stage: str) -> None:
        """Check what can be checked without the model, and start the processes that rewards run in."""
        strategy = self.trainer.strategy
        check_attention(self.loading, strategy.root_device, str(self.trainer.precision))
        if self.loading.quantization is not None and is_sharded(strategy):
            raise ValueError(
                f"loading.quantization={self.loading.quantization!r} can't be sharded, got {type(strategy).__name__}: "
                "use one device or DDP, or loading.dtype=bfloat16 without quantization."
            )
        if self.lora is not None and self.loading.dtype != "float32" and isinstance(strategy, FSDPStrategy):
            raise ValueError(
                f"FSDPStrategy can't hold a float32 adapter beside weights in loading.dtype={self.loading.dtype}: use "
                "FSDP2 (ModelParallelStrategy, configs/strategy/fsdp2.yaml), or leave loading.dtype out."
            )
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

    def configure_model(self) -> None:
        """Load the policy and check that its completions can end."""
        if self.policy is None:
            assert isinstance(self.policy_source, str)
            self.policy = load_policy(self.policy_source, self.loading, self.lora, derive_seed(self.seed, "lora"))
        else:
            prepare_policy(self.policy)
        self._save_trained_alone()
        if not stop_token_ids(self.policy, self.tokenizer):
            raise ValueError(
                "The policy has no end-of-sequence token: set generation_config.eos_token_id or tokenizer.eos_token."
            )

    def _save_trained_alone(self) -> None:
        """Leave the frozen weights beneath an adapter out of checkpoints: they are where the policy came from.

        Not with FSDP1, which flattens trained and frozen weights together.
        """
        if self._saved_names is not None or (self._trainer and isinstance(self.trainer.strategy, FSDPStrategy)):
            return
        if saves_adapter_alone(self.policy, can_be_reloaded=isinstance(self.policy_source, str)):
            self._saved_names = trained_names(self.policy)
            self.strict_loading = False
            self.register_state_dict_post_hook(functools.partial(leave_frozen_out, self._saved_names))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError where an adapter is not the one that is trained here."""
        if self._saved_names is not None and "state_dict" in checkpoint:  # else of a folder, which its reader checks
            check_adapter(self.policy, self._saved_names, checkpoint["state_dict"])

    def model_config(self) -> PretrainedConfig:
        """The policy's, also before it is loaded."""
        source = self.policy_source if self.policy is None else self.policy
        return load_config(source, self.loading) if isinstance(source, str) else source.config

    def vocab_size(self) -> int:
        """Token ids that the policy has."""
        return self.model_config().get_text_config().vocab_size

    def check_prompts(self, rows: Iterable[Row], *, sampled: bool = True) -> None:
        """Raise ValueError, naming the row, for prompts that this module can't be trained or evaluated on."""
        check_prompts(
            rows,
            tokenizer=self.tokenizer,
            config=self.model_config(),
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
        """Completions and rewards for a batch of prompts; the same `purpose` draws the same samples."""
        rows = rows_of(batch)
        seed = derive_seed(self.seed, *purpose, self.data_ranks.rank)
        ranks = self.data_ranks
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
        rollout = ranks.agree(rollout)
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

    def export(
        self, folder: str | Path, *, merge_adapter: bool = False, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Write the policy as a Hugging Face folder with a model card; every rank must call this.

        Args:
            merge_adapter: of a policy with an adapter, the whole model with the adapter merged in, not it alone.
            summary: the run's results, for the model card.

        Raises:
            ValueError: there is no adapter to merge, or it can't be done with this policy.
        """
        state = None if self._trainer is None else full_state_dict(self)
        if self.global_rank:
            return
        kind: Kind = "merged" if merge_adapter else "adapter" if is_adapted(self.policy) else "model"
        Path(folder).mkdir(parents=True, exist_ok=True)
        sample_at_a_temperature(self.policy.generation_config)
        if merge_adapter:
            save_model(merged_policy(self, state), Path(folder))
        elif is_adapted(self.policy):
            write_adapter(self.policy, dict(self.policy.named_parameters()) if state is None else state, Path(folder))
        else:
            self.policy.save_pretrained(folder, state_dict=state)
        write_beside(self, self.policy.generation_config, Path(folder), kind, run_config(self._trainer), summary)
