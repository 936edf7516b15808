"""One rollout: completions of some prompts, sampled or recorded, their text and their rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_kernels import group_statistics
from gvpo_lightning.batch import Completion, CompletionBatch, collate_completions, dropped_completion
from gvpo_lightning.plan import GroupShape, Limits
from gvpo_lightning.rewards import reward_columns
from gvpo_lightning.rewards.protocol import COMPONENT, REASONS
from gvpo_lightning.rewards.running import FailureTally, Rewards
from gvpo_lightning.rollout.generation import GenerationSettings, encode_prompt, generate_completions
from gvpo_lightning.rollout.loader import Row


@dataclass(frozen=True)
class RolloutSettings:
    """How much is sampled, and how it is cut into optimizer updates.

    Attributes:
        group_size: completions of one prompt; at least 2, since a group's variance is what is trained on. Groups
            that a file fills are as large as it has them.
        prompts_per_rollout: prompts sampled at once, over all ranks.
        prompts_per_update: the most prompts in one optimizer update, over all ranks; a rollout is cut into as few
            updates as that allows, as equal as can be, and each update into `trainer.accumulate_grad_batches`
            micro-batches. Nothing has to divide anything.
        epochs_per_rollout: times that a rollout is trained on.
        micro_batch_size: the most completions that one micro-batch may hold (checked before training).
        micro_batch_tokens: the most tokens, prompts included and padding too unless the module is `padding_free`, that
            one micro-batch should hold; lengths are only known when they have been sampled, so more is warned of, not
            refused. Where whole groups exceed either limit they are cut, which costs a second forward pass; without
            limits they are cut only where there are more micro-batches than groups.
        truncated: what becomes of completions without an EOS: "keep" with their reward, or "drop", which
            takes them out of their group. Counted either way.
        max_completion_tokens: longer completions from demonstrations or a file are cut, and are then truncated.
        zero_variance: "drop" leaves out groups whose rewards are all equal. That changes the objective: such
            groups have a gradient, towards the reference, as soon as the policy has moved.
    """

    group_size: int = 8
    prompts_per_rollout: int = 32
    prompts_per_update: int = 8
    epochs_per_rollout: int = 1
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    truncated: Literal["keep", "drop"] = "keep"
    max_completion_tokens: int | None = None
    zero_variance: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"rollout.group_size must be at least 2, got {self.group_size}: GVPO compares the completions of "
                "one prompt with each other."
            )
        for name in ("prompts_per_rollout", "prompts_per_update", "epochs_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("micro_batch_size", "micro_batch_tokens", "max_completion_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("truncated", "zero_variance"):
            if getattr(self, name) not in ("keep", "drop"):
                raise ValueError(f"rollout.{name} must be 'keep' or 'drop', got {getattr(self, name)!r}.")

    @property
    def limits(self) -> Limits:
        """What one micro-batch may hold."""
        return Limits(self.micro_batch_size, self.micro_batch_tokens)

    @property
    def updates_per_pass(self) -> int:
        """Optimizer updates that one pass over a rollout makes."""
        return math.ceil(self.prompts_per_rollout / self.prompts_per_update)


@dataclass
class Rollout:
    """Completions of some prompts: the tensors to train on, and the text behind them.

    Attributes:
        index: counts the rollouts of a run.
        batch: a row a completion, on the CPU; those of one prompt are adjacent, and group ids count the prompts.
        prompts: one entry a group.
        completions, sources, lengths: one entry a row of `batch`; lengths in tokens, of dropped ones too.
        components: for each of the run's rewards, by name, one entry a row; NaN where it does not apply or has failed.
        dropped: how many completions have left their groups, by reason.
        failures: how often rewards have failed, where they were asked; not part of checkpoints.
        metrics: what is logged with every update of the rollout.
    """

    index: int
    batch: CompletionBatch
    prompts: list[Any]
    completions: list[str]
    sources: list[str]
    lengths: list[int]
    components: dict[str, list[float]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: FailureTally = field(default_factory=FailureTally)

    def group_shapes(self) -> list[GroupShape]:
        """The kept completions of each group, for the update plan."""
        kept: list[list[int]] = [[] for _ in self.prompts]
        group_ids = self.batch.group_ids.tolist()
        for row in self.batch.kept.nonzero().squeeze(-1).tolist():
            kept[group_ids[row]].append(row)
        lengths, prompts = self.batch.lengths.tolist(), self.batch.prompt_mask.sum(dim=1).tolist()
        return [
            GroupShape(tuple(rows), prompts[rows[0]] if rows else 0, tuple(lengths[row] for row in rows))
            for rows in kept
        ]

    def micro_batch(self, rows: Sequence[int], device: torch.device) -> CompletionBatch:
        """Some rows of the batch, on `device`; without any, a dropped completion, since ranks must step together."""
        return (self.batch.select(torch.tensor(rows)) if rows else dropped_completion()).to(device)

    def drop(self, rows: Tensor, reason: str) -> None:
        """Take the completions marked in `rows`, (S,) bool, out of their groups, and count them."""
        self.dropped[reason] = int((rows & self.batch.kept).sum())
        self.batch.drop(rows)

    def kept_components(self) -> dict[str, list[float]]:
        """Of each reward, what it gives the kept completions to which it applies."""
        kept = self.batch.kept.tolist()
        return {
            name: [value for value, is_kept in zip(values, kept, strict=True) if is_kept and value == value]
            for name, values in self.components.items()
        }

    def component_columns(self) -> dict[str, list[float | None]]:
        """`reward/<name>` of several rewards, one entry a row; nothing of a single one, which is `rewards` itself."""
        components = self.components if len(self.components) > 1 else {}
        return {f"{COMPONENT}{name}": _nan_as_none(values) for name, values in components.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One dict a group, in the offline format; rewards are None where there is none."""
        batch = self.batch
        rewards = _nan_as_none(batch.rewards.tolist())
        ids = [row[:n] for row, n in zip(batch.completion_ids.tolist(), self.lengths, strict=True)]
        columns: dict[str, list[Any]] = {
            "completions": self.completions,
            "rewards": rewards,
            "token_ids": ids,
            "truncated": batch.truncated.tolist(),
            "sources": self.sources,
        }
        columns |= self.component_columns()
        groups = batch.group_ids.tolist()
        return [
            {"prompt": prompt}
            | {
                name: [value for value, group in zip(values, groups, strict=True) if group == number]
                for name, values in columns.items()
            }
            for number, prompt in enumerate(self.prompts)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and lists alone, so that checkpoints load with weights_only."""
        state = {**vars(self), "batch": self.batch.state_dict()}
        del state["failures"]
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Rollout":
        """What `state_dict` gave."""
        return cls(**{**state, "batch": CompletionBatch(**state["batch"])})


def _nan_as_none(values: Sequence[float]) -> list[float | None]:
    return [None if value != value else value for value in values]


def sample_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    num_completions: int | Sequence[int],
    settings: GenerationSettings,
    seed: int,
) -> list[list[Completion]]:
    """Fresh completions for each prompt (token ids)."""
    batch = generate_completions(model, tokenizer, prompt_ids, num_completions, settings, seed).to("cpu")
    groups: list[list[Completion]] = [[] for _ in prompt_ids]
    for row, group in enumerate(batch.group_ids.tolist()):
        token_ids = batch.completion_ids[row][batch.completion_mask[row]]
        text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        groups[group].append(Completion(token_ids, text, "policy", bool(batch.truncated[row])))
    return groups


def reward_groups(
    groups: Sequence[Sequence[Completion]], prompts: Sequence[Any], rows: Sequence[Row], rewards: Rewards
) -> FailureTally:
    """Ask the rewards for the completions that have none yet; NaN where there is none."""
    asked = [(completion, number) for number, group in enumerate(groups) for completion in group]
    asked = [(completion, number) for completion, number in asked if completion.reward is None]
    if not asked:
        return FailureTally()
    columns = {name: [rows[n][name] for _, n in asked] for name in reward_columns(rows[0])}
    rewarded, tally = rewards(
        [prompts[n] for _, n in asked],
        [c.text for c, _ in asked],
        columns,
        [c.token_ids.tolist() for c, _ in asked],
    )
    for (completion, _), found in zip(asked, rewarded, strict=True):
        completion.reward, completion.components, completion.failure = found.total, found.components, found.failure
    return tally


def assemble_rollout(
    index: int,
    prompts: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Completion]],
    source_names: Sequence[str],
) -> Rollout:
    """Tensors of the groups' completions; those that are empty or have no finite reward leave their group.

    Which one a completion with several such reasons is counted under: the first, of "empty", a failed reward's, and
    "unrewarded".
    """
    flat = [(completion, group) for group, completions in enumerate(groups) for completion in completions]
    completions, group_ids = [c for c, _ in flat], [g for _, g in flat]
    batch = collate_completions(
        [prompt_ids[g] for g in group_ids],
        [c.token_ids for c in completions],
        [c.truncated for c in completions],
        group_ids,
        pad_token_id=0,  # is masked wherever it stands
    )
    rewards = [math.nan if c.reward is None else c.reward for c in completions]
    batch.rewards = torch.tensor(rewards, dtype=torch.float32)
    batch.source_ids = torch.tensor([source_names.index(c.source) for c in completions], dtype=torch.int64)
    for row, completion in enumerate(completions):
        if completion.reference_logprobs is not None:
            batch.reference_logprobs[row, : len(completion.token_ids)] = completion.reference_logprobs
    rollout = Rollout(
        index,
        batch,
        list(prompts),
        [c.text for c in completions],
        [c.source for c in completions],
        [len(c.token_ids) for c in completions],
    )
    rollout.dropped["empty"] = rollout.lengths.count(0)
    names = dict.fromkeys(name for c in completions for name in c.components)
    rollout.components = {name: [c.components.get(name, math.nan) for c in completions] for name in names}
    for reason in REASONS if names else ():
        rollout.drop(torch.tensor([c.failure == reason for c in completions]), reason)
    rollout.drop(~torch.isfinite(rollout.batch.rewards), "unrewarded")
    return rollout


def sample_rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    group_size: int,
    settings: GenerationSettings,
    rewards: Rewards | None = None,
    *,
    seed: int,
    index: int = 0,
) -> Rollout:
    """`group_size` fresh completions for the prompt of each row, with rewards where there are some to ask."""
    prompts = [row["prompt"] for row in rows]
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    # evaluation's inference tensors must stay neither in the model's caches nor here: training would fail on them later
    with torch.inference_mode(False):
        groups = sample_groups(model, tokenizer, prompt_ids, group_size, settings, seed)
        tally = FailureTally()
        if rewards is not None:
            tally = reward_groups(groups, prompts, rows, rewards)
        rollout = assemble_rollout(index, prompts, prompt_ids, groups, ["policy"])
        rollout.failures = tally
        return rollout


def drop_by_settings(rollout: Rollout, settings: RolloutSettings) -> tuple[int, int]:
    """Take out of their groups what the settings do not want trained.

    Returns:
        groups whose rewards are all equal, dropped or not, and groups with kept completions.
    """
    batch = rollout.batch
    if settings.truncated == "drop":
        rollout.drop(batch.truncated, "truncated")
    statistics = group_statistics(batch.rewards, batch.rewards, batch.rewards, batch.group_ids, batch.kept)
    flat = (statistics.size >= 2) & (statistics.reward_range == 0)
    if settings.zero_variance == "drop":
        rollout.drop(flat[statistics.index], "zero_variance")
    return int(flat.sum()), int((statistics.size >= 1).sum())


def component_metrics(rollout: Rollout) -> dict[str, float]:
    """`reward/<name>/*`: mean and std over the kept completions to which a reward applies (NaN: to none)."""
    metrics = {}
    for name, values in rollout.kept_components().items():
        own = torch.tensor(values)
        metrics[f"reward/{name}/mean"] = float(own.mean())
        metrics[f"reward/{name}/std"] = float(own.std(correction=0)) if len(own) else math.nan
        metrics[f"reward/{name}/failed_fraction"] = rollout.failures.fraction(name)
    return metrics


def rollout_metrics(batch: Any) -> dict[str, float]:
    """`reward/*` and `completion/*` over the completions that have not been dropped; NaN where all were."""
    kept = batch.kept
    rewards, lengths = batch.rewards[kept].float(), batch.lengths[kept].float()
    nan = torch.full((), torch.nan)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)) if len(rewards) else float(nan),
        "completion/length_mean": float(lengths.mean()),
        "completion/length_min": float(lengths.min() if len(lengths) else nan),
        "completion/length_max": float(lengths.max() if len(lengths) else nan),
        "completion/truncated_fraction": float(batch.truncated.float().mean()),
        "completion/dropped_fraction": float((~kept).float().mean()),
    }
