"""`GVPOModule`: GVPO as a LightningModule, with automatic optimization over a buffered rollout.

One batch of the fit loop is one micro-batch. The first of a rollout gets completions from the run's sources, asks for
their rewards and scores them under the reference; all are then trained on, `epochs_per_rollout` times, in the
optimizer updates that `plan_updates` lays out. Accumulation, clipping, precision, schedulers, loggers,
callbacks, limits and checkpoints are therefore Lightning's own.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.checkpointing.state import gvpo_state, load_gvpo_state, load_position
from gvpo_lightning.checks.start import check_start
from gvpo_lightning.checks.trainer import check_trainer, check_training_batches
from gvpo_lightning.data.rows import Row
from gvpo_lightning.distributed.gather import root_stays_gathered
from gvpo_lightning.distributed.load_in_turns import loading_in_turns
from gvpo_lightning.distributed.sharding import is_sharded, shard_model
from gvpo_lightning.objectives.make import make_objective
from gvpo_lightning.objectives.settings import ObjectiveKind, ObjectiveSettings
from gvpo_lightning.policy.compile import check_strategy, compile_layers
from gvpo_lightning.policy.loading import LoadingSettings, load_config
from gvpo_lightning.policy.lora import starts_at_base
from gvpo_lightning.policy.prepare import stop_token_ids
from gvpo_lightning.policy.source import context_length
from gvpo_lightning.reference.cache import CachedReference, check_cache
from gvpo_lightning.reference.make import make_reference
from gvpo_lightning.reference.model import ModelReference
from gvpo_lightning.reference.settings import ReferenceKind, ReferenceSettings
from gvpo_lightning.rewards import Reward
from gvpo_lightning.rewards.settings import RewardSettings
from gvpo_lightning.rollout.collect import collect_rollout
from gvpo_lightning.rollout.plan import Limits, Update, plan_updates
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.sampling_module import SamplingModule
from gvpo_lightning.seeding import derive_seed
from gvpo_lightning.sources.mixture import SourceMixture
from gvpo_lightning.sources.settings import SourceSettings
from gvpo_lightning.updates.failed_update import save_update_of
from gvpo_lightning.updates.gradients import clip_gradients, drop_gradients, gradients_are_finite
from gvpo_lightning.updates.loss import UpdateLoss
from gvpo_lightning.updates.meters import CollectedUpdate, UpdateMeter, measure_update


class GVPOModule(SamplingModule):
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
        reference: a kind, such as "frozen" (the policy as its folder or hub id holds it; of a model object, as
            training finds it) or "previous" (the policy at the start of each rollout, which needs several updates
            a rollout to be more than REINFORCE), or `ReferenceSettings`, which lists them all.
        sources: where completions come from, mixed in every group; fresh ones of the policy by default.
        beta: strength of the implicit reward; the optimum is reference * exp(reward / beta) / Z. Of other objectives
            the KL's coefficient (0: none), and DPO's beta.
        temperature: the log-probs of policy and reference are taken at this temperature.
        rollout: group size, prompts per rollout and per update, epochs, micro-batch.
        generation: how completions are sampled.
        optimizer, lr_scheduler: callables from parameters to an optimizer and from that to a scheduler, which
            is stepped once an update.
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
        super().__init__(policy, reward, reward_settings, tokenizer, generation, rollout.group_size, loading, lora)
        if not isinstance(reference, ReferenceSettings):
            reference = ReferenceSettings(reference)
        if not isinstance(objective, ObjectiveSettings):
            objective = ObjectiveSettings(objective)
        self.objective_settings = objective
        self.objective = make_objective(objective, beta, generation.max_new_tokens)
        for name, value in (("temperature", temperature), ("max_log_ratio", max_log_ratio)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}.")
        self.objective.check_reference(reference.kind)
        self.reference_settings = reference
        self.reference = make_reference(
            reference,
            can_be_reloaded=isinstance(policy, str),
            is_base=lora is not None and starts_at_base(lora),
            loading=self.loading if reference.model is None else self.loading_of(reference.model),
        )
        self.sources = SourceMixture(
            sources,
            rollout.group_size,
            cached=reference.kind == "cached",
            has_reward=reward is not None,
            max_tokens=rollout.max_completion_tokens,
        )
        if reward is None and sources.generates:
            raise ValueError(
                "A reward is needed for completions that are sampled: set model.reward, or train offline on "
                "completions with rewards of their own (sources.policy: 0)."
            )
        if self.objective.needs_sampler_logprobs:
            sources.check_policy_alone(objective.kind)
        self.beta, self.temperature = beta, temperature
        self.rollout_settings = rollout
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.max_skipped_updates, self.max_log_ratio = max_skipped_updates, max_log_ratio
        self.gradient_checkpointing = gradient_checkpointing
        self.padding_free = padding_free
        self.torch_compile = torch_compile
        self.loss_implementation = loss_implementation

        self.microstep = 0  # micro-batches trained so far: the run's only position, saved in checkpoints
        self.num_updates = 0  # finished optimizer updates, which references count in
        self.rollout: Rollout | None = None
        self.updates: list[Update] = []
        self.skipped_updates = self.consecutive_skips = 0
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "train"), 0.0)
        self.num_completion_tokens = self.longest_prompt = 0
        self.phase = "train"  # or what `timed` is timing
        self._meter = UpdateMeter()
        self._update_loss: UpdateLoss | None = None  # of the update that is being trained
        self._token_logprobs: list[Tensor] = []  # of the update's micro-batches so far
        self._is_configured = False
        self._rollout_length: int | None = None  # micro-batches, in the fit before this one

    # -- building and checking ----------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """What one micro-batch may hold."""
        return replace(self.rollout_settings.limits, padding_free=self.padding_free)

    @property
    def micro_batches_per_rollout(self) -> int:
        """Steps of the fit loop from one rollout to the next."""
        settings = self.rollout_settings
        return settings.updates_per_pass * settings.epochs_per_rollout * self.trainer.accumulate_grad_batches

    def configure_callbacks(self) -> list[Callback]:
        """Those that let a run survive SIGTERM and changed settings, and name where errors come from."""
        from gvpo_lightning.callbacks import missing_callbacks  # which know this module

        return missing_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Check what can be checked without the model."""
        if self.torch_compile:
            check_strategy(self.trainer.strategy)
        super().setup(stage)
        if stage == "fit":
            check_trainer(
                self.trainer,
                self.rollout_settings,
                self.generation,
                generates=self.sources.settings.generates,
                largest_group=self.sources.largest_group,
            )

    def check_training_prompts(self, rows: Sequence[Row]) -> None:
        """Raise ValueError for prompts that this module can't be trained on, or can't be given completions."""
        self.longest_prompt = self.check_prompts(rows, sampled=self.sources.settings.generates)
        self.sources.open(self.tokenizer, self.vocab_size())
        context = context_length(self.model_config())
        if isinstance(self.reference, ModelReference):
            context = self._check_reference_model(rows, context)
        self.sources.check(rows, context)

    def _check_reference_model(self, rows: Sequence[Row], context: int | None) -> int | None:
        """Raise ValueError where the reference can't score what the policy says; returns the shorter context."""
        name = self.reference_settings.model
        assert name is not None
        config = load_config(name, self.loading_of(name), setting="reference.model")
        vocab_size = config.get_text_config().vocab_size
        if vocab_size < self.vocab_size():
            raise ValueError(
                f"reference.model={name!r} has {vocab_size} token ids, fewer than the policy's {self.vocab_size()}: it "
                "can't score what the policy says. Take a model of the same family, with the policy's tokenizer."
            )
        own = context_length(config)
        if own is None or (context is not None and own >= context):
            return context
        try:
            self.check_prompts(rows, sampled=self.sources.settings.generates, config=config)
        except ValueError as error:
            raise ValueError(f"reference.model={name!r}: {error}") from error
        return own

    def configure_model(self) -> None:
        """Load the policy, take what the reference needs of it, and shard it if the strategy does not."""
        if self._is_configured:
            self._check_configured_again()
            return
        if self._trainer is None:
            super().configure_model()
            return
        with loading_in_turns(self.trainer.strategy, self.model_config(), self.loading):
            self._load_and_shard()

    def _load_and_shard(self) -> None:
        super().configure_model()
        self.sources.stops = stop_token_ids(self.policy, self.tokenizer)
        strategy, fits = self.trainer.strategy, self.trainer.state.fn == "fit"
        if fits or is_sharded(strategy):  # a fit may follow, and then the policy is not whole any more
            if isinstance(self.reference, CachedReference) and not self.reference.is_checked:
                check_cache(self)
                self.reference.is_checked = True
            self.reference.identify(self.policy)
        if self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.torch_compile:
            compile_layers(self.policy)
        shard_model(self.policy, strategy, self.trainer.precision)
        self._is_configured = is_sharded(strategy)
        if fits and not isinstance(strategy, FSDPStrategy):  # which has yet to shard it
            self.reference.prepare(self.policy, strategy, self.trainer.precision)

    def _check_configured_again(self) -> None:
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "FSDPStrategy wraps a module once: for a second fit, validate, test or predict make a new GVPOModule, "
                "or use FSDP2 (ModelParallelStrategy, configs/strategy/fsdp2.yaml)."
            )

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and the scheduler, stepped every update."""
        self.reference.prepare(self.policy, self.trainer.strategy, self.trainer.precision)
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Hold the fused loss against eager on a few tokens, where the training will run it; wait for the rewards."""
        check_start(self)

    # -- training -----------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Check that updates stay whole, and start at one."""
        check_training_batches(self.trainer)
        accumulate = self.trainer.accumulate_grad_batches
        if self._rollout_length not in (None, self.micro_batches_per_rollout):  # another fit with other settings
            self.microstep = math.ceil(self.microstep / self._rollout_length) * self.micro_batches_per_rollout
        self._rollout_length = self.micro_batches_per_rollout
        self.microstep -= self.microstep % accumulate  # an earlier fit may have stopped within an update
        self._meter.reset()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Roll out at the first micro-batch of a rollout."""
        if batch["slot"] == 0:
            drop_gradients(self)  # which Lightning would keep until the next backward pass
            self.rollout = self._roll_out(batch["rows"], batch["rollout"])
        assert self.rollout is not None
        assert self.rollout.index == batch["rollout"]
        if batch["slot"] == 0 or len(self.updates) * self.trainer.accumulate_grad_batches != self._rollout_length:
            self.updates = self._plan_updates(self.rollout)
        self._train_started = time.perf_counter()

    def _roll_out(self, rows: list[Row], index: int) -> Rollout:
        return collect_rollout(self, rows, index)

    def _plan_updates(self, rollout: Rollout) -> list[Update]:
        """The optimizer updates of a rollout, all passes over it."""
        shapes, ranks = rollout.group_shapes(), self.data_ranks
        return [
            update
            for epoch in range(self.rollout_settings.epochs_per_rollout)
            for update in plan_updates(
                shapes,
                rank=ranks.rank,
                num_ranks=ranks.size,
                num_updates=self.rollout_settings.updates_per_pass,
                accumulate=self.trainer.accumulate_grad_batches,
                seed=derive_seed(self.seed, "update", rollout.index, epoch),
                limits=self.limits,
            )
        ]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the update's gradient is that of one big batch."""
        index, slot = divmod(batch["slot"], self.trainer.accumulate_grad_batches)
        update, rollout = self.updates[index], self.rollout
        assert rollout is not None
        if slot == 0:
            self._start_update(update, rollout)
        assert self._update_loss is not None
        with root_stays_gathered(self.policy):
            result = self._update_loss.micro_batch(slot)
        self._token_logprobs.append(result.token_logprobs)
        self._meter.add(result.log_ratios, result.entropies, result.shares)
        self.microstep += 1
        return result.loss * update.scale

    def _start_update(self, update: Update, rollout: Rollout) -> None:
        """What comes before its micro-batches: where groups are cut, a pass without gradient."""
        self._meter.reset()
        self._token_logprobs = []
        if update.over_limit:
            self.guard.say(
                "over limit",
                f"A micro-batch of this rollout holds more than its {self.limits}: lengths are known "
                f"only now, and its update has only {len(update.micro_batches)} micro-batches a rank. "
                "Raise trainer.accumulate_grad_batches.",
            )
        if update.is_cut and self.objective.couples_groups:
            self.guard.info(
                "two passes",
                "Groups are cut over micro-batches or ranks: each such update makes a pass without gradient first, for "
                "the groups' means. Larger micro-batches (rollout.micro_batch_size, micro_batch_tokens), fewer of them "
                "(trainer.accumulate_grad_batches) or more prompts an update would save it.",
            )
        self._update_loss = UpdateLoss(self, update, rollout)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the update; skip it whole, on every rank, if it is not usable or nothing counts."""
        assert self.rollout is not None
        index = (self.microstep - 1) % self.micro_batches_per_rollout // self.trainer.accumulate_grad_batches
        update = self.updates[index]
        # the update's only wait for the device
        collected = self._meter.collect(update.positions, len(update.rows), gradients_are_finite(self), self.data_ranks)
        self.num_updates += 1
        usable = collected.gradients_are_finite and bool((collected.log_ratios.abs() <= self.max_log_ratio).all())
        if not usable:
            self.skipped_updates += 1
        assert self._update_loss is not None
        self._log_update(self._update_loss, collected, is_first=index == 0)
        if usable and self._update_loss.counts:
            self.consecutive_skips = 0
            return
        stops = not usable and self.consecutive_skips >= self.max_skipped_updates
        saved = save_update_of(self, update, self._token_logprobs) if stops else ""
        drop_gradients(self)
        if usable:
            return
        self.consecutive_skips += 1
        if stops:
            raise RuntimeError(
                f"{self.consecutive_skips} updates in a row had log-ratios or gradients that are not finite, or "
                f"log-ratios beyond max_log_ratio={self.max_log_ratio:g} (max_skipped_updates="
                f"{self.max_skipped_updates}): the policy has diverged. Lower the learning rate, or raise beta, and "
                f"resume from an earlier checkpoint. The last such update: {saved}"
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does; by norm also where the gradients are sharded."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the time."""
        self.seconds["train"] += time.perf_counter() - self._train_started

    def _log_update(self, loss: UpdateLoss, collected: CollectedUpdate, is_first: bool) -> None:
        """Log the metrics of all ranks; none of this waits for the device."""
        assert self.rollout is not None
        update, sources = loss.update, self.sources.names
        metrics: dict[str, Any] = measure_update(self.rollout, update.rows, collected.log_ratios, self.beta, sources)
        if collected.entropy is not None and update.rows:
            metrics["entropy"] = collected.entropy / int(self.rollout.batch.lengths[list(update.rows)].sum())
        metrics |= loss.metrics(collected)
        if self.objective_settings.kind == "gvpo" and not self.objective_settings.length_exponent:
            # of others the residual may be large: it is not what they train
            self.guard.log_ratios(metrics["residual/rms"], metrics["reward/spread"])
        if is_first and "log_ratio/policy/mean" in metrics:  # only then are these the policy's own samples
            self.rollout.metrics["kl/reference"] = float(metrics["log_ratio/policy/mean"])
        metrics |= self.rollout.metrics
        metrics |= {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        metrics["throughput/tokens_per_second"] = self.num_completion_tokens / max(sum(self.seconds.values()), 1e-9)
        metrics["group/dropped"] = float(update.num_dropped)
        metrics["update/skipped"] = float(self.skipped_updates)
        metrics["update/passes"] = 2.0 if loss.needs_two_passes else 1.0
        # in host memory, or progress bar and loggers would wait for the device
        metrics = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in metrics.items()}
        names: list[str] = [name for name in ("reward/mean", "loss", "residual/rms") if name in metrics]
        shown = {name: metrics.pop(name) for name in names}
        self.log_dict(shown, prog_bar=True, batch_size=1)  # these are over all ranks already
        self.log_dict(metrics, batch_size=1)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what is spent inside to `seconds`."""
        start, self.phase = time.perf_counter(), phase
        yield
        self.seconds[phase] += time.perf_counter() - start
        self.phase = "train"  # not where an error has left the phase: it is named in the error's notes

    # -- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position, the rollout if it is half trained, and what identifies the reference."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["gvpo"] = gvpo_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` left."""
        if "gvpo" not in checkpoint:
            raise ValueError("This checkpoint is not one of a GVPOModule: it has no 'gvpo' entry.")
        super().on_load_checkpoint(checkpoint)
        load_gvpo_state(self, checkpoint["gvpo"])
        if self._trainer is not None and self.trainer.state.fn == "fit":
            load_position(self, checkpoint["gvpo"])
