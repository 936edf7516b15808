"""`Collector`: completions from the run's sources, their rewards and their log-probs under the reference.

The ranks share the work completion by completion, and then tell each other what came of it: every rank has the whole
rollout, in host memory, so that an update may train any completion anywhere.
"""

import functools
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gvpo_lightning.data.batch import Completion, CompletionBatch
from gvpo_lightning.data.rows import Row, encode_prompt
from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.rewards.protocol import RewardError, SharedContractError
from gvpo_lightning.rewards.run import FailureTally
from gvpo_lightning.rollout.groups import Sampling, assemble_rollout, drop_by_settings, reward_groups, sample_groups
from gvpo_lightning.rollout.plan import Limits, Update, plan_updates
from gvpo_lightning.rollout.rollout import Rollout, measure_rollout
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.seeding import derive_seed
from gvpo_lightning.sources.mixture import SourceMixture
from gvpo_lightning.sources.offline import prompt_key

Groups = list[list[Completion]]


class Clock:
    """Seconds by phase, and the phase that the run is in; where an error has ended one, the phase stays."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "train"), 0.0)
        self.phase = "train"

    def restart(self) -> None:
        """Nothing has been spent yet."""
        self.seconds.update(dict.fromkeys(self.seconds, 0.0))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what is spent inside to the phase; after it the run trains again."""
        start, self.phase = time.perf_counter(), phase
        yield
        self.seconds[phase] += time.perf_counter() - start
        self.phase = "train"


@dataclass(frozen=True)
class Collector:
    """Draws, samples, rewards, scores and measures a run's rollouts; `clock` counts what each of these takes."""

    sampling: Sampling
    sources: SourceMixture
    reference: Reference
    scoring: Scoring
    objective: Objective
    settings: RolloutSettings
    clock: Clock

    @functools.cached_property
    def _limits(self) -> Limits:
        """What a micro-batch may hold."""
        settings = self.settings
        return Limits(settings.micro_batch_size, settings.micro_batch_tokens, self.scoring.padding_free)

    def collect(self, policy: Any, rows: list[Row], index: int, num_updates: int) -> Rollout:
        """The rollout number `index`, of these prompts, after so many updates.

        Every rank must call this, with the same rows.

        Raises:
            RewardError: rewards have failed, on any rank.
            ValueError: ranks have different rows, or rewards that the objective has no meaning for.
        """
        sampling = self.sampling
        prompts = [row["prompt"] for row in rows]
        prompt_ids = [encode_prompt(prompt, sampling.source.tokenizer) for prompt in prompts]
        sampling.placement.reshard()
        self.reference.refresh(policy, rollout=index, update=num_updates)
        with self.clock.timed("rollout"):
            recorded = self.sources.draw(rows, (sampling.seed, "sources", index), self.reference.version)
            num_fresh, names = self.sources.num_fresh(recorded), self.sources.names
            fresh = self.sample_share(policy, prompt_ids, num_fresh, index)
        with self.clock.timed("reward"):
            groups, failures = self.reward_shares(rows, fresh, recorded, index)
        rollout = assemble_rollout(index, prompts, prompt_ids, groups, names, failures)
        flat_groups = drop_by_settings(rollout, self.settings)
        self.objective.check_rewards(rollout.batch)
        with self.clock.timed("reference"):
            self._score(policy, rollout.batch, groups)
        self.sources.remember(index, prompts, groups)
        vocab_size = sampling.source.vocab_size()
        metrics = measure_rollout(rollout, names, vocab_size, flat_groups)
        rollout.metrics.update(metrics)
        negligible = {name: metrics.get(f"source/{name}/negligible_fraction", 0.0) for name in names}
        sampling.guard.negligible(negligible, vocab_size)
        return rollout

    def plan(self, rollout: Rollout, accumulate: int) -> list[Update]:
        """The optimizer updates of a rollout, all passes over it, as this rank sees them."""
        settings, ranks, seed = self.settings, self.sampling.placement.ranks, self.sampling.seed
        options: dict[str, Any] = {"accumulate": accumulate, "limits": self._limits}
        options |= {"num_updates": settings.updates_per_pass, "rank": ranks.rank, "num_ranks": ranks.size}
        shapes, updates = rollout.group_shapes(), list[Update]()
        for number in range(settings.epochs_per_rollout):
            of_pass = derive_seed(seed, "update", rollout.index, number)
            updates += plan_updates(shapes, **options, seed=of_pass)
        return updates

    def sample_share(self, policy: Any, prompt_ids: list[list[int]], num_fresh: Sequence[int], index: int) -> Groups:
        """This rank's part of the fresh completions, of which each prompt gets `num_fresh`."""
        sampling, ranks = self.sampling, self.sampling.placement.ranks
        owners = [group for group, count in enumerate(num_fresh) for _ in range(count)]
        if not owners:
            return [[] for _ in prompt_ids]
        seed = derive_seed(sampling.seed, "completions", index, ranks.rank)
        mine = Counter(owners[number] for number in ranks.share(len(owners)))
        counts = [mine[group] for group in range(len(prompt_ids))]
        with sampling.placement.forward_context(), sampling.placement.gathered():
            return sample_groups(policy, sampling.source.tokenizer, prompt_ids, counts, sampling.generation, seed)

    def reward_shares(
        self, rows: list[Row], fresh: Groups, recorded: Groups, index: int = 0
    ) -> tuple[Groups, FailureTally]:
        """The groups of all ranks in rollout `index`, and how often rewards have failed on them.

        Each rank rewards what it has sampled, and a part of what is recorded.
        """
        ranks, rewards = self.sampling.placement.ranks, self.sampling.rewards
        flat = [(group, completion) for group, completions in enumerate(recorded) for completion in completions]
        share: Groups = [[] for _ in recorded]
        for number in ranks.share(len(flat)) if flat else ():
            group, completion = flat[number]
            share[group].append(completion)
        error: Exception | None = None
        failures = FailureTally()
        if rewards is not None and ranks.is_first_of_model:
            own = [[*new, *old] for new, old in zip(fresh, share, strict=True)]
            try:
                seed = derive_seed(self.sampling.seed, "rewards", index, ranks.rank)
                failures = reward_groups(own, [row["prompt"] for row in rows], rows, rewards, seed)
            except Exception as raised:
                error = raised
        of_rows = hashed(rows) if ranks.size > 1 else ""
        parts = ranks.gather(ranks.agree((fresh, share, of_rows, None if error is None else str(error), failures)))
        if isinstance(error, ValueError):
            raise SharedContractError(str(error)) from error
        if error is not None:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        # Another rank has failed: without this error, this rank would hang in the next collective.
        for rank, (_, _, their_rows, message, _) in enumerate(parts):
            if message is not None:
                raise RewardError(f"The reward failed on rank {rank}: {message}")
            if their_rows != of_rows:
                raise ValueError(
                    f"Rank {rank} was given other prompts than rank {ranks.rank}, but ranks share every rollout: give "
                    "RolloutLoader the same dataset in the same order on all of them, without a sampler that differs."
                )
        groups = [
            [completion for kind in (0, 1) for part in parts for completion in part[kind][group]]
            for group in range(len(rows))
        ]
        return groups, self.sampling.report([part[4] for part in parts])

    def _score(self, policy: Any, batch: CompletionBatch, groups: Groups) -> None:
        """Log-probs of the kept completions: the reference's where they have none of this version, the sampler's."""
        kept, version = batch.kept, self.reference.version
        completions = [completion for group in groups for completion in group]
        unscored = torch.tensor([c.reference_logprobs is None for c in completions], dtype=torch.bool)
        self._fill(batch.reference_logprobs, batch, unscored & kept, self.reference.applied(policy))
        for row in kept.nonzero().squeeze(-1).tolist():
            completions[row].set_reference(batch.reference_logprobs[row], version)
        if self.objective.needs_sampler_logprobs:
            self._fill(batch.add_sampler_logprobs(), batch, kept, nullcontext(policy))

    def _fill(
        self, values: Tensor, batch: CompletionBatch, marked: Tensor, scorer: AbstractContextManager[Any]
    ) -> None:
        """Fill the rows of (S, T) `values` that are `marked`, (S,) bool, with log-probs under the model of `scorer`."""
        rows, placement = marked.nonzero().squeeze(-1), self.sampling.placement
        if not len(rows):
            return
        limits, ranks = self._limits, placement.ranks
        width = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]
        by_tokens = max(1, limits.tokens // width) if limits.tokens else self.sampling.generation.batch_size
        size = limits.completions or by_tokens
        mine = batch.select(rows[torch.tensor(ranks.share(len(rows)), dtype=torch.int64)])
        num_parts = math.ceil(math.ceil(len(rows) / ranks.size) / size)
        with placement.forward_context(), scorer as model, placement.callable():
            own = score(model, mine, self.scoring, batch_size=size, num_parts=num_parts)
        scored = (row for part in ranks.gather(own) for row in part)
        for row, logprobs in zip(rows.tolist(), scored, strict=True):
            values[row, : len(logprobs)] = logprobs


def hashed(rows: list[Row]) -> str:
    """Changes with the prompts and their order."""
    return hashlib.sha256("\0".join(prompt_key(row["prompt"]) for row in rows).encode()).hexdigest()
