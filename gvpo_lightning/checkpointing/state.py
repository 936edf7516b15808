"""`RunState`: where a run is, kept in its checkpoints.

Only tensors, numbers, strings, lists and dicts are saved, so that a checkpoint loads with weights_only=True.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from gvpo_lightning.checkpointing.resumed_epoch import correct_progress
from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.policy.lora import check_adapter, is_adapted, saves_adapter_alone, trained_names
from gvpo_lightning.policy.weights import frozen_fingerprint
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.rollout.collect import Clock
from gvpo_lightning.rollout.epoch import Epoch
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.sources.mixture import SourceMixture

# what changes the function, and neither the names nor the shapes of the adapter's weights
APPLIED = (
    "peft_type",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "r",
    "rank_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "use_qalora",
    "qalora_group_size",
    "alora_invocation_tokens",
    "trainable_token_indices",
)


def adapter_state(model: Any, frozen: str | None) -> dict[str, Any]:
    """For a checkpoint of a peft model: plain values of its adapter's config, and its frozen weights' fingerprint.

    Args:
        frozen: None where the checkpoint holds those weights, or they are not in memory.
    """
    config = model.peft_config[model.active_adapter]
    applied = {name: getattr(config, name, None) for name in APPLIED}
    return {"config": json.loads(json.dumps(applied)), "frozen": frozen}


def check_adapter_state(own: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> None:
    """Raise ValueError where a checkpoint is of another adapter than the policy's, or was trained on another model.

    Either is None without an adapter; a fingerprint that is None is not compared.
    """
    if saved is None:
        return
    if own is None:
        raise ValueError("The checkpoint is an adapter's, the policy has none: set model.lora as in training.")
    for name, value in saved["config"].items():
        if own["config"].get(name) != value:
            raise ValueError(
                f"The checkpoint's adapter was trained with {name}={value}, the policy's has "
                f"{name}={own['config'].get(name)}: set model.lora.{name} as it was."
            )
    if None not in (own["frozen"], saved["frozen"]) and own["frozen"] != saved["frozen"]:
        raise ValueError(
            "The checkpoint's adapter was trained on another model than the policy's (fingerprint "
            f"{own['frozen']}, expected {saved['frozen']}): set model.policy, loading.revision, loading.dtype and "
            "loading.quantization as they were."
        )


# of a module and of a datamodule that call `save_hyperparameters`
HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
PLAIN = {type(None), bool, int, float, str, bytes, torch.Tensor, torch.dtype, torch.device}


def is_plain(value: Any) -> bool:
    """Whether a value comes back from a checkpoint with weights_only=True; a subclass of a plain type does not."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(key) and is_plain(part) for key, part in value.items())
    return type(value) in PLAIN


def plain_hyperparameters(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's hyperparameters as Lightning has put them there, less those that would keep it from being loaded.

    A resumed run has its own; `load_from_checkpoint` is to be given what is left out, or takes the defaults.
    """
    found = {}
    for key in HYPERPARAMETERS:
        saved = checkpoint.get(key, {})
        found[key] = {name: value for name, value in saved.items() if is_plain(value)}
        if left_out := sorted(saved.keys() - found[key].keys()):
            rank_zero_warn(
                f"Hyperparameters that are no plain values are not in the checkpoints: {', '.join(left_out)}. Give "
                "them to load_from_checkpoint."
            )
    return {key: plain for key, plain in found.items() if key in checkpoint}


@dataclass(frozen=True)
class SavedPolicy:
    """What a checkpoint holds of the policy.

    Attributes:
        trained: the names of the weights that it holds; None: all.
        adapter: what identifies an adapter and the model beneath it; None without one.
    """

    trained: frozenset[str] | None
    adapter: dict[str, Any] | None

    @classmethod
    def of(cls, policy: Any, can_be_reloaded: bool, *, must_be_whole: bool) -> "SavedPolicy":
        """Of an adapted policy the trained weights alone, since the frozen ones are where it came from.

        `must_be_whole`: with FSDP1, which flattens trained and frozen weights together.
        """
        if not is_adapted(policy):
            return cls(None, None)
        if must_be_whole or not saves_adapter_alone(policy, can_be_reloaded=can_be_reloaded):
            return cls(None, adapter_state(policy, None))
        return cls(trained_names(policy), adapter_state(policy, frozen_fingerprint(policy)))

    def check(self, policy: Any, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError where the checkpoint is none, or an adapter or the model beneath it is not the one in it.

        Takes out of it what earlier versions had saved twice, of a policy that was given as an object.
        """
        if "gvpo" not in checkpoint:
            raise ValueError("This checkpoint is not one of a GVPOModule: it has no 'gvpo' entry.")
        for name in [name for name in checkpoint.get("state_dict", ()) if name.startswith("policy_source.")]:
            del checkpoint["state_dict"][name]
        if self.trained is not None and "state_dict" in checkpoint:  # else of a folder, which its reader checks
            check_adapter(policy, self.trained, checkpoint["state_dict"])
        check_adapter_state(self.adapter, checkpoint.get("adapter"))


COUNTERS = ("microstep", "num_updates", "num_completion_tokens", "skipped_updates", "consecutive_skips")


@dataclass
class RunState:
    """The run's position and counters, and the rollout that it is training.

    Attributes:
        microstep: micro-batches trained so far, by which everything else finds its place.
        epoch: where the epoch at hand began, and the passes over the prompts.
        num_updates: finished optimizer updates, which references count in.
        num_completion_tokens: of all rollouts, over all ranks.
        skipped_updates, consecutive_skips: updates that were not usable, in all and without a usable one since.
        clock: what the run has spent its time on.
        rollout: the one at hand.
        rollout_length: micro-batches from one rollout to the next, in the last fit.
        units: the settings that the position is measured in.
        is_resumed: the fit at hand goes on from a checkpoint.
    """

    microstep: int = 0
    epoch: Epoch = field(default_factory=Epoch)
    num_updates: int = 0
    num_completion_tokens: int = 0
    skipped_updates: int = 0
    consecutive_skips: int = 0
    clock: Clock = field(default_factory=Clock)
    rollout: Rollout | None = None
    rollout_length: int | None = None
    units: dict[str, int | float] = field(default_factory=dict)
    is_resumed: bool = False

    def count_in(
        self, settings: RolloutSettings, accumulate: int, temperature: float, num_ranks: int, seed: int
    ) -> None:
        """Take up the settings that a fit's position, counted in micro-batches, and kept log-probs are measured in."""
        self.is_resumed = False
        self.units = {
            "prompts_per_rollout": settings.prompts_per_rollout,
            "prompts_per_update": settings.prompts_per_update,
            "epochs_per_rollout": settings.epochs_per_rollout,
            "accumulate_grad_batches": accumulate,
            "temperature": temperature,
            "seed_everything": seed,
            "num_ranks": num_ranks,
            "group_size": settings.group_size,
        }

    def start_fit(self, rollout_length: int) -> None:
        """Go on where a checkpoint was saved; without one start with a rollout, and an epoch, of its own."""
        if not self.is_resumed:
            trained = math.ceil(self.microstep / (self.rollout_length or rollout_length))  # rollouts, or begun ones
            self.microstep, self.rollout = trained * rollout_length, None
            self.epoch = Epoch(start=self.microstep, first_rollout=trained)
            self.clock.restart()
            self.num_completion_tokens = self.skipped_updates = self.consecutive_skips = 0
        self.rollout_length = rollout_length

    def begin(self, rollout: Rollout) -> None:
        """Train this rollout from now on."""
        self.rollout = rollout
        self.num_completion_tokens += int(rollout.batch.lengths.sum())

    def rollout_at(self, index: int) -> Rollout:
        """The one at hand, which must be number `index`."""
        assert self.rollout is not None
        assert self.rollout.index == index
        return self.rollout

    def count_update(self, *, is_usable: bool, is_trained: bool) -> None:
        """One more update is finished."""
        self.num_updates += 1
        if not is_usable:
            self.skipped_updates += 1
            self.consecutive_skips += 1
        elif is_trained:
            self.consecutive_skips = 0

    def metrics(self) -> dict[str, float]:
        """`time/*`, `throughput/*` and `update/skipped` so far."""
        seconds = self.clock.seconds
        return {f"time/{name}": value for name, value in seconds.items()} | {
            "throughput/tokens_per_second": self.num_completion_tokens / max(sum(seconds.values()), 1e-9),
            "update/skipped": float(self.skipped_updates),
        }

    def state_dict(self, rollout_length: int) -> dict[str, Any]:
        """For a checkpoint: counters, the rollout if it is half trained, and the units that both are measured in."""
        unfinished = self.rollout if self.microstep % rollout_length else None
        own = dict(self.units)
        sizes = {name: own.pop(name) for name in ("num_ranks", "group_size")}  # which may change between rollouts
        state: dict[str, Any] = {name: getattr(self, name) for name in COUNTERS}
        return (
            state
            | sizes
            | {
                "units": own,
                "epoch": asdict(self.epoch),
                "seconds": dict(self.clock.seconds),
                "rollout": None if unfinished is None else unfinished.state_dict(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any], objective: Objective) -> None:
        """Go on from what `state_dict` left, with the half-trained rollout if there was one.

        Raises:
            ValueError: settings, an objective or a number of ranks with which the run can't go on from this position,
                or rewards that the objective has no meaning for.
        """
        saved, units = state["units"], self.units
        if "seed_everything" not in saved:
            rank_zero_warn(
                "This checkpoint does not say which seed its run had. The prompts go on in the order of this run's "
                f"seed_everything={units['seed_everything']}: where it was another one, some come twice and some never."
            )
        changed = [name for name in saved if units[name] != saved[name]]
        if changed:
            raise ValueError(
                f"A run can't be resumed with another {changed[0]}: the checkpoint was saved with {saved[changed[0]]}, "
                f"the settings say {units[changed[0]]}. Set it back, or start a new run from the exported policy."
            )
        if state["microstep"] % units["accumulate_grad_batches"]:
            raise ValueError(
                f"This checkpoint was saved within an optimizer update, at micro-batch {state['microstep']} with "
                f"accumulate_grad_batches={units['accumulate_grad_batches']}: the update's first gradients are lost. "
                "Resume from another one."
            )
        self.rollout = None if state["rollout"] is None else _half_trained(state, units, objective)
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.clock.seconds.update(state["seconds"])
        self.epoch, self.is_resumed = Epoch.of(state.get("epoch")), True


def _half_trained(state: Mapping[str, Any], units: Mapping[str, int | float], objective: Objective) -> Rollout:
    num_ranks, now = state["num_ranks"], units["num_ranks"]
    if num_ranks != now:
        raise ValueError(
            f"This checkpoint was saved within a rollout by {num_ranks} data-parallel ranks and can't be resumed by "
            f"{now}: resume it with {num_ranks}, or take one saved at a rollout's end."
        )
    size = state["group_size"]
    if size != units["group_size"]:
        raise ValueError(
            f"This checkpoint was saved within a rollout of group_size={size} and can't be resumed with "
            f"group_size={units['group_size']}: set it back, or take one saved at a rollout's end."
        )
    rollout = Rollout.from_state_dict(state["rollout"])
    if objective.needs_sampler_logprobs and rollout.batch.sampler_logprobs is None:
        raise ValueError(
            f"objective: {objective.settings.kind} needs log-probs of the policy that has sampled a rollout, "
            "and this checkpoint was saved within one of another objective, which has none: set the objective back, or "
            "take a checkpoint saved at a rollout's end."
        )
    objective.check_rewards(rollout.batch)
    return rollout


@dataclass(frozen=True)
class Resumable:
    """All that a checkpoint holds of a run beside Lightning's own state.

    `saved` is None before the policy is loaded; `precision` is the Trainer's, in which log-probs were taken.
    """

    run: RunState
    sources: SourceMixture
    reference: Reference
    reference_kind: str
    saved: SavedPolicy | None
    objective: Objective
    precision: str

    def add_to(self, checkpoint: dict[str, Any], policy: Any, rollout_length: int) -> None:
        """Put it beside what Lightning has put into a checkpoint, and see that both load; every rank must call this."""
        state = self.run.state_dict(rollout_length) | self.sources.state_dict(self.precision)
        state |= {"reference_kind": self.reference_kind, "reference": self.reference.state_dict(policy)}
        adapter = None if self.saved is None else self.saved.adapter
        checkpoint.update({"gvpo": state} if adapter is None else {"gvpo": state, "adapter": adapter})
        checkpoint.update(plain_hyperparameters(checkpoint))

    def load_state_dict(self, checkpoint: Mapping[str, Any], policy: Any) -> None:
        """Take up what `add_to` left, to go on with the run.

        Raises:
            ValueError: another reference, objective or number of ranks than the checkpoint's.
        """
        state = checkpoint["gvpo"]
        if self.reference_kind != state["reference_kind"]:
            raise ValueError(
                f"This checkpoint was trained with reference: {state['reference_kind']}, the settings say "
                f"{self.reference_kind}: set it back, or start a new run from the exported policy."
            )
        self.sources.load_state_dict(state, self.precision)
        self.sources.check_cache(state)
        self.reference.load_state_dict(state["reference"], policy)
        self.run.load_state_dict(state, self.objective)
        if "loops" in checkpoint:  # else Lightning says that there are weights alone
            correct_progress(checkpoint["loops"]["fit_loop"])
