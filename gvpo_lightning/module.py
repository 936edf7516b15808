"""`GVPOModule`: GVPO as a LightningModule, with automatic optimization over a buffered rollout.

One batch of the fit loop is one micro-batch. The first of a rollout samples completions, asks for their
rewards and scores them under the reference; all are then trained on, `epochs_per_rollout` times, in the
optimizer updates that `plan_updates` lays out. Accumulation, clipping, precision, schedulers, loggers,
callbacks, limits and checkpoints are therefore Lightning's own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_kernels.inputs import choose_implementation
from gvpo_lightning.checkpoint import gvpo_state, load_gvpo_state, load_position
from gvpo_lightning.distributed import gather_objects
from gvpo_lightning.meters import UpdateMeter
from gvpo_lightning.plan import Update, check_batch_sizes, plan_updates
from gvpo_lightning.policy import (
    check_logprob_head,
    completion_loss,
    load_policy,
)
from gvpo_lightning.reference import ReferenceKind, check_reference_kind, frozen_copy, score
from gvpo_lightning.rewards import Reward
from gvpo_lightning.rollout.generation import GenerationSettings
from gvpo_lightning.rollout.loader import RolloutLoader, Row
from gvpo_lightning.rollout.sampling import (
    Rollout,
    RolloutSettings,
    reward_rollout,
    rollout_metrics,
    sample_rollout,
)
from gvpo_lightning.sampling_module import SamplingModule
from gvpo_lightning.seeding import derive_seed


class GVPOModule(SamplingModule):
    """A policy and the reference it is measured against, trained with GVPO.

    Args:
        policy: the causal LM to train: a hub id, a folder, or a transformers model that you built.
        reward: a callable `(prompts, completions, **columns) -> list of float or None`.
        tokenizer: a hub id, a folder or a tokenizer; default: the policy's own (needed for a model object).
        reference: "frozen", a copy of the policy as it is when training starts, or "previous", the policy
            at the start of each rollout (which needs several updates a rollout to be more than REINFORCE).
        beta: strength of the implicit reward; the optimum is reference * exp(reward / beta) / Z.
        temperature: the log-probs of policy and reference are taken at this temperature.
        rollout: group size, prompts per rollout and per update, epochs, micro-batch.
        generation: how completions are sampled.
        optimizer, lr_scheduler: callables from parameters to an optimizer and from that to a scheduler, which
            is stepped once an update.
        max_skipped_updates: consecutive updates with log-ratios that are not finite, each of which is skipped
            whole, before training stops.
        loss_implementation: "triton" (CUDA), "torch" (chunked, any device), "reference" (plain, all logits
            stored) or "auto", "triton" where it can run and else "torch". Compared with eager at start-up.

    The run's seed is Lightning's (`seed_everything`), 0 without one.

    Raises:
        ValueError: settings that contradict each other or the model, before anything is trained.
    """

    reference_model: PreTrainedModel | None  # the frozen one, while training against it

    def __init__(
        self,
        policy: str | PreTrainedModel,
        reward: Reward,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        reference: ReferenceKind = "frozen",
        beta: float = 0.1,
        temperature: float = 1.0,
        rollout: RolloutSettings = RolloutSettings(),
        generation: GenerationSettings = GenerationSettings(),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_updates: int = 5,
        loss_implementation: Literal["auto", "triton", "torch", "reference"] = "auto",
    ) -> None:
        super().__init__(policy, reward, tokenizer, generation, rollout.group_size)
        check_reference_kind(reference)
        for name, value in (("beta", beta), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}.")
        self.reference = reference
        self.beta, self.temperature = beta, temperature
        self.rollout_settings = rollout
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.max_skipped_updates = max_skipped_updates
        self.loss_implementation = loss_implementation

        self.microstep = 0  # micro-batches trained so far: the run's only position, saved in checkpoints
        self.rollout: Rollout | None = None
        self.updates: list[Update] = []
        self.skipped_updates = self.consecutive_skips = 0
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "train"), 0.0)
        self.num_completion_tokens = 0
        self.__dict__["reference_model"] = None  # unregistered: neither trained, nor saved, nor wrapped
        self._meter = UpdateMeter(beta)
        self._finite: Tensor | None = None

    # -- building and checking ----------------------------------------------------------------------------

    @property
    def updates_per_pass(self) -> int:
        """Optimizer updates that one pass over a rollout makes."""
        return self.rollout_settings.prompts_per_rollout // self.rollout_settings.prompts_per_update

    @property
    def micro_batches_per_rollout(self) -> int:
        """Steps of the fit loop from one rollout to the next."""
        accumulate = self.trainer.accumulate_grad_batches
        return self.updates_per_pass * self.rollout_settings.epochs_per_rollout * accumulate

    def setup(self, stage: str) -> None:
        """Check what can be checked without the model."""
        if stage != "fit":
            return
        # the earliest place that shows what `fit` was given; a property that says so comes only much later
        if isinstance(self.trainer.fit_loop._data_source.instance, DataLoader):
            raise ValueError(
                "GVPOModule trains micro-batches of rollouts, so its prompts can't come from a bare DataLoader: "
                "write trainer.fit(module, RolloutLoader(dataloader, module))."
            )
        settings = self.rollout_settings
        check_batch_sizes(
            group_size=settings.group_size,
            prompts_per_rollout=settings.prompts_per_rollout,
            prompts_per_update=settings.prompts_per_update,
            micro_batch_size=settings.micro_batch_size,
            accumulate=self.trainer.accumulate_grad_batches,
            world_size=self.world_size,
        )

    def configure_model(self) -> None:
        """Load the policy and, for training against it, the frozen reference."""
        super().configure_model()
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        if training and self.reference == "frozen" and self.reference_model is None:
            source = self.policy_source
            model: Any = frozen_copy(load_policy(source) if isinstance(source, str) else self.policy)
            model = self.trainer.precision_plugin.convert_module(model)
            self.__dict__["reference_model"] = model.to(self.trainer.strategy.root_device)

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and the scheduler, stepped every update."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Hold the fused loss against eager on a few tokens, where the training will run it."""
        with self.trainer.precision_plugin.forward_context():
            error = check_logprob_head(self.policy, self.loss_implementation)
            name = choose_implementation(self.loss_implementation, next(self.policy.parameters()))
        rank_zero_info(
            f"GVPO's loss runs in the '{name}' implementation (loss_implementation={self.loss_implementation!r}), "
            f"{error:.1g} from eager."
        )

    # -- training -----------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Check the prompts' loader, and that epochs hold whole optimizer updates."""
        if not isinstance(self.trainer.train_dataloader, RolloutLoader):
            raise ValueError("The training prompts must come from RolloutLoader(prompts, module).")
        batches, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches % accumulate and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"An epoch must hold whole optimizer updates: limit_train_batches leaves {batches} micro-batches, not "
                f"a multiple of accumulate_grad_batches={accumulate}."
            )

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Roll out at the first micro-batch of a rollout."""
        if batch["slot"] == 0:
            self.rollout = self._roll_out(batch["rows"], batch["rollout"])
        assert self.rollout is not None
        assert self.rollout.index == batch["rollout"]
        if not self.updates or batch["slot"] == 0:
            self.updates = self._plan_updates(self.rollout)
        self._train_started = time.perf_counter()

    def _roll_out(self, rows: list[Row], index: int) -> Rollout:
        settings = self.rollout_settings
        seed = derive_seed(self.seed, "completions", index, self.global_rank)
        with self._timed("rollout"), self.trainer.precision_plugin.forward_context():
            rollout = sample_rollout(
                self.policy, self.tokenizer, rows, settings.group_size, self.generation, seed=seed, index=index
            )
        with self._timed("reward"):
            reward_rollout(rollout, self.reward, rows)
        if settings.truncated == "drop":
            rollout.batch.drop(rollout.batch.truncated)
        with self._timed("reference"), self.trainer.precision_plugin.forward_context():
            rollout.batch.reference_logprobs = score(
                self.reference_model or self.policy,
                rollout.batch,
                temperature=self.temperature,
                batch_size=settings.micro_batch_size or self.generation.batch_size,
            )
        self.num_completion_tokens += int(rollout.batch.lengths.sum())
        rollout.metrics = rollout_metrics(rollout.batch)
        return rollout

    def _plan_updates(self, rollout: Rollout) -> list[Update]:
        """The optimizer updates of a rollout, all passes over it, the same on every rank."""
        return [
            update
            for epoch in range(self.rollout_settings.epochs_per_rollout)
            for update in plan_updates(
                gather_objects(rollout.group_sizes),
                rank=self.global_rank,
                prompts_per_update=self.rollout_settings.prompts_per_update,
                accumulate=self.trainer.accumulate_grad_batches,
                seed=derive_seed(self.seed, "update", rollout.index, epoch),
            )
        ]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the update's gradient is that of one big batch."""
        index, slot = divmod(batch["slot"], self.trainer.accumulate_grad_batches)
        update, rollout = self.updates[index], self.rollout
        assert rollout is not None
        part = rollout.micro_batch(update.micro_batches[slot])
        result = completion_loss(
            self.policy,
            part,
            self.beta,
            num_groups=max(update.num_groups, 1),
            temperature=self.temperature,
            implementation=self.loss_implementation,
        )
        finite = torch.isfinite(result.log_ratios).all()
        self._finite = finite if slot == 0 or self._finite is None else self._finite & finite
        self._meter.add(part, result)
        if slot == len(update.micro_batches) - 1:
            self._log_update(update, is_first=index == 0)
        self.microstep += 1
        return result.loss * update.scale

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip the whole update, on every rank, if one of its log-ratios is not finite."""
        if self.trainer.strategy.reduce_boolean_decision(bool(self._finite), all=True):
            self.consecutive_skips = 0
            return
        for parameter in self.parameters():
            parameter.grad = None  # an optimizer passes over parameters without gradient
        self.skipped_updates += 1
        self.consecutive_skips += 1
        if self.consecutive_skips > self.max_skipped_updates:
            raise RuntimeError(
                f"{self.consecutive_skips} updates in a row had log-ratios that are not finite and were skipped "
                f"(max_skipped_updates={self.max_skipped_updates}): the policy has diverged. Lower the learning rate, "
                "or raise beta, and resume from an earlier checkpoint."
            )

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the time."""
        self.seconds["train"] += time.perf_counter() - self._train_started

    def _log_update(self, update: Update, is_first: bool) -> None:
        assert self.rollout is not None
        metrics: dict[str, Any] = self._meter.compute(update.num_groups, self.world_size)
        if is_first:  # the rollout's completions are the policy's own samples only before its first update
            self.rollout.metrics["kl/reference"] = metrics["log_ratio/policy/mean"]
        metrics |= self.rollout.metrics
        metrics |= {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        metrics["throughput/tokens_per_second"] = self.num_completion_tokens / max(sum(self.seconds.values()), 1e-9)
        metrics["update/skipped"] = float(self.skipped_updates)
        shown = {name: metrics.pop(name) for name in ("reward/mean", "loss", "residual/rms")}
        self.log_dict(shown, prog_bar=True, sync_dist=self.world_size > 1, batch_size=1)
        self.log_dict(metrics, sync_dist=self.world_size > 1, batch_size=1)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    # -- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position, the rollout if it is half trained, and what identifies the reference."""
        checkpoint["gvpo"] = gvpo_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` left."""
        load_gvpo_state(self, checkpoint["gvpo"])
        if self._trainer is not None and self.trainer.state.fn == "fit":
            load_position(self, checkpoint["gvpo"])
