"""Groups of completions: sampled, rewarded, and put together as a rollout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_kernels import reward_statistics
from gvpo_lightning.data.batch import Completion, collate_completions
from gvpo_lightning.data.rows import Row, completion_text, encode_prompt
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.guard import Guard
from gvpo_lightning.policy.prepare import stop_token_ids
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.rewards import reward_columns
from gvpo_lightning.rewards.protocol import REASONS
from gvpo_lightning.rewards.run import FailureTally, Rewards
from gvpo_lightning.rollout.generate import generate_completions
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.seeding import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How a run samples and rewards completions, in training and in evaluation; None: they bring their rewards."""

    source: PolicySource
    generation: GenerationSettings
    rewards: Rewards | None
    placement: Placement
    guard: Guard
    seed: int

    def start_rewards(self, *, ranks_here: int, has_bar: bool) -> None:
        """Tell the rewards where they are, and start the processes that they run in."""
        if self.rewards is not None:
            shows_progress = has_bar and self.placement.rank == 0
            self.rewards.place(self.placement.device, ranks_here=ranks_here, shows_progress=shows_progress)
            if self.placement.ranks.is_first_of_model:
                self.rewards.start()

    def report(self, failures: Sequence[FailureTally]) -> FailureTally:
        """Those of all ranks together; RewardError where rewards have failed too often, else a warning.

        All ranks must call this.
        """
        together = sum(failures[1:], failures[0])
        if self.rewards is not None and together.counts:
            together.report(self.rewards.settings.max_failed_fraction, self.guard)
        return together


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
    stops = stop_token_ids(model, tokenizer)
    for row, group in enumerate(batch.group_ids.tolist()):
        token_ids = batch.completion_ids[row][batch.completion_mask[row]]
        text = completion_text(token_ids.tolist(), tokenizer, stops)
        groups[group].append(Completion(token_ids, text, "policy", bool(batch.truncated[row])))
    return groups


def reward_groups(
    groups: Sequence[Sequence[Completion]], prompts: Sequence[Any], rows: Sequence[Row], rewards: Rewards, seed: int = 0
) -> FailureTally:
    """Ask the rewards for the completions that have none yet; NaN where there is none.

    `seed`: what the rewards' random numbers start from.
    """
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
        seed,
    )
    for (completion, _), found in zip(asked, rewarded, strict=True):
        completion.set_reward(found.total, found.components, found.failure)
    return tally


def assemble_rollout(
    index: int,
    prompts: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Completion]],
    source_names: Sequence[str],
    failures: FailureTally,
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
    names = dict.fromkeys(name for c in completions for name in c.components)
    lengths = [len(c.token_ids) for c in completions]
    rollout = Rollout(
        index,
        batch,
        list(prompts),
        [c.text for c in completions],
        [c.source for c in completions],
        lengths,
        components={name: [c.components.get(name, math.nan) for c in completions] for name in names},
        dropped={"empty": lengths.count(0)},
        failures=failures,
    )
    failed = {reason: torch.tensor([c.failure == reason for c in completions]) for reason in REASONS if names}
    rollout.drop(failed | {"unrewarded": ~torch.isfinite(batch.rewards)})
    return rollout


class RewardsFailed(Exception):
    """Rewards have raised `error`; `rollout` is what was sampled, without them."""

    def __init__(self, rollout: Rollout, error: Exception) -> None:
        super().__init__(str(error))
        self.rollout, self.error = rollout, error


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
    """`group_size` fresh completions for the prompt of each row, with rewards where there are some to ask.

    Raises:
        RewardsFailed: rewards have raised.
    """
    prompts = [row["prompt"] for row in rows]
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    # evaluation's inference tensors must stay neither in the model's caches nor here: training would fail on them later
    with torch.inference_mode(False):
        groups = sample_groups(model, tokenizer, prompt_ids, group_size, settings, seed)
        tally, error = FailureTally(), None
        try:
            if rewards is not None:
                tally = reward_groups(groups, prompts, rows, rewards, derive_seed(seed, "rewards"))
        except Exception as raised:
            error = raised
        rollout = assemble_rollout(index, prompts, prompt_ids, groups, ["policy"], tally)
        if error is not None:
            raise RewardsFailed(rollout, error) from error
        return rollout


def drop_by_settings(rollout: Rollout, settings: RolloutSettings) -> tuple[int, int]:
    """Take out of their groups what the settings do not want trained.

    Returns:
        groups whose rewards are all equal, dropped or not, and groups with kept completions.
    """
    batch = rollout.batch
    if settings.truncated == "drop":
        rollout.drop({"truncated": batch.truncated})
    statistics = reward_statistics(batch.rewards, batch.group_ids, batch.kept)
    flat = (statistics.size >= 2) & (statistics.reward_range == 0)
    if settings.zero_variance == "drop":
        rollout.drop({"zero_variance": flat[statistics.index]})
    return int(flat.sum()), int((statistics.size >= 1).sum())
