"""`GVPOModule`: GVPO as a LightningModule, with automatic optimization over a buffered rollout.

One batch of the fit loop is one micro-batch. The first of a rollout gets completions from the run's sources, asks for
their rewards and scores them under the reference; all are then trained on, `epochs_per_rollout` times, in the
optimizer updates that `plan_updates` lays out. Accumulation, clipping, precision, schedulers, loggers,
callbacks, limits and checkpoints are therefore Lightning's own.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.checkpointing.preemption import Preemption
from gvpo_lightning.checkpointing.resumed_epoch import begin_epoch
from gvpo_lightning.checkpointing.resumed_settings import DueValidation, SettingsWin
from gvpo_lightning.checkpointing.state import Resumable, RunState, SavedPolicy
from gvpo_lightning.checks import trainer as checks
from gvpo_lightning.checks.callbacks import check_callbacks
from gvpo_lightning.checks.error_notes import Whereabouts
from gvpo_lightning.checks.prompts import PromptCheck
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.distributed.sharding import loading_in_turns
from gvpo_lightning.evaluation.sampled import SampledEvaluation
from gvpo_lightning.export.folder import export_policy
from gvpo_lightning.export.model_card import Origin, run_config
from gvpo_lightning.guard import Guard
from gvpo_lightning.objectives import make_objective
from gvpo_lightning.objectives.settings import ObjectiveKind, ObjectiveSettings
from gvpo_lightning.policy.head import Scoring
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.lora import do_without_frozen, leave_frozen_out
from gvpo_lightning.policy.prepare import prepare_policy, stop_token_ids
from gvpo_lightning.policy.source import PolicySource, place_policy
from gvpo_lightning.reference.kinds import make_reference
from gvpo_lightning.reference.settings import ReferenceKind, ReferenceSettings
from gvpo_lightning.rewards import Reward
from gvpo_lightning.rewards.run import Rewards
from gvpo_lightning.rewards.settings import RewardSettings
from gvpo_lightning.rollout.collect import Collector
from gvpo_lightning.rollout.groups import Sampling
from gvpo_lightning.rollout.plan import Update
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.seeding import derive_seed, run_seed
from gvpo_lightning.sources.mixture import SourceMixture
from gvpo_lightning.sources.settings import SourceSettings
from gvpo_lightning.updates import optimizers
from gvpo_lightning.updates.loss import UpdateRules
from gvpo_lightning.updates.step import UpdateStep, clip_sharded, drop_gradients

SHOWN_SETTINGS = ("beta", "temperature", "loading", "lora", "generation")  # on a model card, beside those of the parts


class GVPOModule(L.LightningModule):
    """A policy and the reference it is measured against, trained with GVPO.

    Args:
        policy: the causal LM to train: a hub id, a folder, or a transformers model that you built.
        reward: a callable `(prompts, completions, **columns) -> list of float or None`, or a list of such
            (docs/rewards.md); None where every completion brings its own and nothing is validated.
        reward_settings: weights, worker processes, time limit, how many may fail.
        tokenizer: a hub id, a folder or a tokenizer; default: the policy's own (needed for a model object).
        loading: dtype, attention, revision and quantization of a policy given by name, and of models beside it.
        lora: arguments of peft.LoraConfig: a new adapter on the policy is trained, and the policy's own weights are
            frozen. None trains all weights, or of an adapter's folder that adapter.
        reference: a kind, such as "frozen" (the policy as its folder or hub id holds it; of a model object, as the
            first fit finds it) or "previous" (the policy at the start of each rollout, which needs several updates
            a rollout to be more than REINFORCE), or `ReferenceSettings`, which lists them all.
        sources: where completions come from, mixed in every group; fresh ones of the policy by default.
        beta: strength of the implicit reward; the optimum is reference * exp(reward / beta) / Z. Of other objectives
            the KL's coefficient (0: none), and DPO's beta.
        temperature: the log-probs of policy and reference are taken at this temperature.
        rollout: group size, prompts per rollout and per update, epochs, micro-batch.
        generation: how completions are sampled.
        optimizer, lr_scheduler: callables from parameters to an optimizer and from that to a scheduler, which is
            stepped once an update, or if it takes a metric, as ReduceLROnPlateau does, once a validation.
        max_skipped_updates: consecutive updates that are skipped whole before training stops and saves the last of
            them for `gvpo debug-batch`.
        max_log_ratio: an update is skipped if a completion's |log pi - log pi'| is beyond it, or is not finite, or a
            gradient is not; no healthy run gets there.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        padding_free: give the model each micro-batch as one row of sequences end to end, instead of padded rows. It
            saves what padding costs where attention takes the sequences apart (flash_attention_2 or 3,
            flex_attention); "sdpa" and "eager" make a mask of all pairs of the row's tokens.
        torch_compile: compile the decoder layers with torch.compile, for training and scoring; the first steps are
            slow, later ones faster. Sampling is not compiled. Not with FSDPStrategy or tensor parallelism.
        objective: what is minimised: "gvpo", or for comparison "grpo", "dr_grpo", "policy_gradient", "dpo" or "sft" on
            the same rollouts; or `ObjectiveSettings`, which has their settings.
        loss_implementation: "triton" (CUDA), "torch" (chunked, any device), "reference" (plain, all logits
            stored) or "auto", "triton" where it can run and else "torch". Compared with eager at start-up.

    The run's seed is Lightning's (`seed_everything`), 0 without one.

    Raises:
        ValueError: settings that contradict each other or the model, before anything is trained.
    """

    def __init__(
        self,
        policy: str | PreTrainedModel,
        reward: list[Reward] | Reward | None = None,  # in this order jsonargparse can write a list down
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        loading: LoadingSettings = LoadingSettings(),
        lora: dict[str, Any] | None = None,
        reference: ReferenceKind | ReferenceSettings = "frozen",
        sources: SourceSettings = SourceSettings(),
        beta: float = 0.1,
        temperature: float = 1.0,
        rollout: RolloutSettings = RolloutSettings(),
        generation: GenerationSettings = GenerationSettings(),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_updates: int = 5,
        max_log_ratio: float = 1e4,
        gradient_checkpointing: bool = False,
        padding_free: bool = False,
        torch_compile: bool = False,
        loss_implementation: Literal["auto", "triton", "torch", "reference"] = "auto",
        reward_settings: RewardSettings = RewardSettings(),
        objective: ObjectiveKind | ObjectiveSettings = "gvpo",
    ) -> None:
        super().__init__()
        self.source = PolicySource(policy, loading, lora, tokenizer)
        self.policy: Any = None if isinstance(policy, str) else policy  # a PreTrainedModel after `configure_model`
        self.tokenizer, self.generation, self.group_size = self.source.tokenizer, generation, rollout.group_size
        self.rewards = None if reward is None else Rewards(reward, reward_settings)
        self.objective_settings = ObjectiveSettings.of(objective)
        against = self.reference_settings = ReferenceSettings.of(reference)
        self.rollout_settings = rollout
        self.objective = make_objective(self.objective_settings, beta, generation.max_new_tokens)
        self.objective.check_reference(against.kind)
        self.scoring = Scoring(temperature, loss_implementation, padding_free)
        recorded: dict[str, Any] = {"cached": against.kind == "cached", "max_tokens": rollout.max_completion_tokens}
        self.sources = SourceMixture(sources, self.group_size, has_reward=reward is not None, **recorded)
        self.reference = make_reference(against, self.source, temperature, self.sources.recorded_references)
        if self.objective.needs_sampler_logprobs:
            sources.check_policy_alone(self.objective_settings.kind)
        if not max_log_ratio > 0:
            raise ValueError(f"max_log_ratio must be > 0, got {max_log_ratio}.")
        self.beta, self.temperature, self.loading, self.lora = beta, temperature, loading, lora
        self.optimizer, self.lr_scheduler, self.max_log_ratio = optimizer, lr_scheduler, max_log_ratio
        self.gradient_checkpointing, self.torch_compile = gradient_checkpointing, torch_compile

        self.run, self.guard, self.seed, self.max_skipped_updates = RunState(), Guard(), run_seed(), max_skipped_updates
        self.updates: list[Update] = []  # of the rollout at hand, all passes over it
        self.prompts = PromptCheck(self.source, generation, self.rewards, self.sources, against.model)
        self._saved: SavedPolicy | None = None  # what checkpoints hold of the policy, once it is loaded
        self._is_sharded = False

    # -- what scripts, loaders and callbacks read

    policy_source = property(lambda self: self.source.given, doc="What was given as the policy.")
    microstep = property(lambda self: self.run.microstep, doc="Micro-batches trained so far.")
    epoch = property(lambda self: self.run.epoch, doc="Where the epoch at hand began.")
    rollout = property(lambda self: self.run.rollout, doc="The one at hand, or None.")
    seconds = property(lambda self: self.run.clock.seconds, doc="What the run has spent, by phase.")
    phase = property(lambda self: self.run.clock.phase, doc='"train", or a part of collecting a rollout.')

    _fits = property(lambda self: self._trainer is not None and self.trainer.state.fn == "fit")

    @property
    def micro_batches_per_rollout(self) -> int:
        """Steps of the fit loop from one rollout to the next."""
        return self.rollout_settings.updates_per_rollout * self.trainer.accumulate_grad_batches

    @property
    def settings(self) -> dict[str, Any]:
        """What the policy is trained with, for its model card."""
        names = (*SHOWN_SETTINGS, "objective_settings", "reference_settings", "rollout_settings")
        return {"policy": self.source.shown} | {n.removesuffix("_settings"): getattr(self, n) for n in names}

    def sample(self, batch: Any, *purpose: int | str, **options: Any) -> Rollout:
        """Completions and rewards for a batch of prompts, as `SampledEvaluation.sample` gives them."""
        return self.evaluation.sample(self.policy, batch, *purpose, **options)

    def export(
        self, folder: str | Path, *, merge_adapter: bool = False, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Write the policy as a Hugging Face folder with a model card; every rank must call this.

        `merge_adapter`: of a policy with an adapter, the whole model with the adapter merged in, not it alone;
        ValueError where that can't be. `summary`: the run's results, for the model card.
        """
        state = self.placement.full_state_dict(self.policy) if hasattr(self, "placement") else None
        if self.global_rank:
            return
        callbacks: list[Callback] = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        origin = Origin(self.settings, run_config(callbacks), summary)
        export_policy(Path(folder), self.policy, self.source, state, origin, merge_adapter=merge_adapter)

    def configure_callbacks(self) -> list[Callback]:
        """Those that let a run survive SIGTERM and changed settings, and name where errors come from."""
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        check_callbacks(present, self.trainer.strategy, is_loaded=self.policy is not None)
        needed = (SettingsWin, DueValidation, Whereabouts, Preemption)
        return [kind() for kind in needed if not any(isinstance(callback, kind) for callback in present)]

    def setup(self, stage: str) -> None:
        """Check what can be checked without the model, and start the processes that rewards run in."""
        trainer: Any = self.trainer
        placement = self.placement = Placement(self)
        self.seed = run_seed()
        checks.check_strategy(placement, self.source, compiles=self.torch_compile)
        sampling = Sampling(self.source, self.generation, self.rewards, placement, self.guard, self.seed)
        self.evaluation = SampledEvaluation(sampling, self.group_size, stage)
        sampling.start_rewards(ranks_here=trainer.num_devices, has_bar=trainer.progress_bar_callback is not None)
        settings, accumulate = self.rollout_settings, trainer.accumulate_grad_batches
        if stage == "fit" or not self.run.units:
            self.run.count_in(settings, accumulate, self.temperature, placement.ranks.size, self.seed)
        if stage != "fit":
            return
        # the earliest place that shows what `fit` was given; a property that says so comes only much later
        checks.check_fit(trainer.fit_loop._data_source.instance, trainer.overfit_batches)
        longest = self.generation.max_new_tokens if self.sources.settings.generates else 0
        checks.check_batch_sizes(settings, self.sources.largest_group, longest, accumulate, placement.ranks.size)
        trained = (self.sources, self.reference, self.scoring, self.objective)
        self.collector = Collector(sampling, *trained, settings, self.run.clock)
        self.rules = UpdateRules(self.objective, self.scoring, placement, self.max_log_ratio, self.guard)

    def teardown(self, stage: str) -> None:
        """End the rewards' processes."""
        if self.rewards is not None:
            self.rewards.close()

    def configure_model(self) -> None:
        """Load the policy, note what the reference needs of it while it is whole, and shard it if no one else does."""
        if self._trainer is None or self.trainer.lightning_module is not self:
            return self._load()
        placement = self.placement = Placement.of(self)  # weight averaging calls this before `setup`
        is_new = self.policy is None
        with loading_in_turns(self.trainer.strategy, self.source.bytes):
            if self._is_sharded:
                placement.check_again()
            else:
                self._load()
            if self._fits or (placement.is_sharded and not self.source.can_be_reloaded):
                original = (lambda: self.policy) if is_new else self.source.load_again
                self.reference.identify(self.policy, placement, original)
            if not self._is_sharded:
                place_policy(self.policy, placement, self.gradient_checkpointing, self.torch_compile)
        self._is_sharded = placement.is_sharded
        if self._fits and not placement.is_fsdp1:  # which has yet to shard it
            self.reference.prepare(self.policy, placement)

    def _load(self) -> None:
        """Load the policy and check that its completions can end."""
        if self.policy is None:
            self.policy = self.source.load(derive_seed(self.seed, "lora"))
        else:
            prepare_policy(self.policy)
        if self._saved is None:
            is_fsdp1 = hasattr(self, "placement") and self.placement.is_fsdp1
            self._saved = SavedPolicy.of(self.policy, self.source.can_be_reloaded, must_be_whole=is_fsdp1)
            if self._saved.trained is not None:
                self.strict_loading = False
                self.register_state_dict_post_hook(functools.partial(leave_frozen_out, self._saved.trained))
                self.register_load_state_dict_post_hook(functools.partial(do_without_frozen, self._saved.trained))
        self.sources.end_with(stop_token_ids(self.policy, self.tokenizer))

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and the scheduler."""
        checks.check_own_fit(is_own=self.trainer.lightning_module is self)
        self.reference.prepare(self.policy, self.placement)
        trainer: Any = self.trainer
        validation = trainer.fit_loop.epoch_loop.val_loop._data_source if trainer.enable_validation else None
        facts = (self.placement, validation, bool(trainer.gradient_clip_val))
        return optimizers.configured(self.parameters(), self.optimizer, self.lr_scheduler, *facts)

    def on_fit_start(self) -> None:
        """Probe the policy where the training will run it, and warn of what bends the objective."""
        generation = self.generation if self.sources.settings.generates else None
        checks.check_start(self.policy, self.scoring, self.placement, self.reference, self.rewards, generation)
        facts = (self.source, self.placement.precision, self.objective, self.temperature)
        checks.warn_of_settings(self.guard, *facts, generation, self.rollout_settings)

    def on_train_start(self) -> None:
        """Check that updates stay whole, and start, or go on, at one."""
        trainer: Any = self.trainer
        batches = 0 if trainer.fast_dev_run else trainer.num_training_batches
        validation = trainer.val_check_batch if trainer.enable_validation else None
        checks.check_training_batches(trainer.train_dataloader, batches, validation, trainer.accumulate_grad_batches)
        self.run.start_fit(self.micro_batches_per_rollout)
        begin_epoch(trainer.fit_loop, self.epoch, self.microstep, trainer.train_dataloader.num_prompts)
        self.updates = []  # or those of another fit's rollout would be taken for those of the one at hand

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Roll out at the first micro-batch of a rollout."""
        accumulate, index = self.trainer.accumulate_grad_batches, batch["rollout"]
        if batch["slot"] == 0:
            drop_gradients(self.parameters())  # which Lightning would keep until the next backward pass
            self.run.begin(self.collector.collect(self.policy, batch["rows"], index, self.run.num_updates))
        rollout = self.run.rollout_at(index)
        if batch["slot"] == 0 or len(self.updates) * accumulate != self.run.rollout_length:
            self.updates = self.collector.plan(rollout, accumulate)
        self._train_started = time.perf_counter()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the update's gradient is that of one big batch."""
        checks.check_own_fit(is_own=self.trainer.lightning_module is self)
        index, slot = divmod(batch["slot"], self.trainer.accumulate_grad_batches)
        if slot == 0:
            self.step = UpdateStep(self.policy, self.updates[index], self.rollout, self.rules)
        loss = self.step.micro_batch(slot)
        self.run.microstep += 1
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the update; skip it whole, on every rank, if it is not usable or nothing counts."""
        outcome = self.step.finish(list(self.parameters()), is_first=self.step.update is self.updates[0])
        self.run.count_update(is_usable=outcome.is_usable, is_trained=outcome.is_trained)
        self._log(outcome.metrics | self.run.metrics())
        if not outcome.is_usable and self.run.consecutive_skips > self.max_skipped_updates:
            self.step.give_up(Path(self.trainer.default_root_dir), self.run.num_updates, self.run.consecutive_skips)
        if not outcome.is_trained:
            drop_gradients(self.parameters())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning does; by norm also where the gradients are sharded."""
        if gradient_clip_val and gradient_clip_algorithm != "value" and self.placement.is_sharded:
            clip_sharded(self.parameters(), gradient_clip_val, self.placement)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the time."""
        self.run.clock.seconds["train"] += time.perf_counter() - self._train_started

    def _log(self, metrics: Mapping[str, Any]) -> None:
        """Log what is over all ranks already; in host memory, or progress bar and loggers would wait for the device."""
        values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in metrics.items()}
        names = [name for name in ("reward/mean", "loss", "residual/rms") if name in values]
        self.log_dict({str(name): values.pop(name) for name in names}, prog_bar=True, batch_size=1)
        self.log_dict(values, batch_size=1)

    # -- evaluation: FSDP1 can gather the policy at a batch's start, but not within a step

    def on_validation_epoch_start(self) -> None:
        """Gather the policy once."""
        self.evaluation.begin()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample and reward completions of each prompt: `group_size`, or what a benchmark says."""
        self.evaluation.sample_batch(self.policy, batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Count what was sampled, and give it to callbacks."""
        checks.check_own_fit(is_own=self.trainer.lightning_module is self)
        return {"rollout": self.evaluation.count()}

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One dict a prompt in the offline format, with the prompt's other columns."""
        return self.evaluation.predictions(batch)

    def on_validation_epoch_end(self) -> None:
        """Shard the policy again, log what was sampled, and step a scheduler that waits for it."""
        self.evaluation.end()
        self.log_dict(self.evaluation.metrics())
        self.evaluation.report()
        trainer, absent = self.trainer, self.evaluation.absent
        for due in optimizers.due(trainer.state, trainer.lr_scheduler_configs, trainer.callback_metrics, absent):
            self.lr_scheduler_step(*due)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise what a reward has raised, now that callbacks have saved what was sampled."""
        self.evaluation.raise_error()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    test_step = validation_step
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    # -- checkpoints

    @property
    def _resumable(self) -> Resumable:
        kind, precision = self.reference_settings.kind, self.placement.precision
        return Resumable(self.run, self.sources, self.reference, kind, self._saved, self.objective, precision)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position, the rollout if it is half trained, and what identifies adapter and reference."""
        self._resumable.add_to(checkpoint, self.policy, self.micro_batches_per_rollout)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In `fit`, take up what `on_save_checkpoint` left; otherwise a checkpoint brings weights and no position."""
        assert self._saved is not None, "configure_model comes first"
        self._saved.check(self.policy, checkpoint)
        if self._fits:
            self._resumable.load_state_dict(checkpoint, self.policy)
