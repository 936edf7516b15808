"""Collecting a rollout: completions from the run's sources, their rewards and their log-probs under the reference.

The ranks share the work completion by completion, and then tell each other what came of it: every rank has the whole
rollout, in host memory, so that an update may train any completion anywhere.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gvpo_lightning.data.batch import Completion, CompletionBatch
from gvpo_lightning.data.rows import Row
from gvpo_lightning.distributed.gather import callable_outside_steps, gathered, reshard
from gvpo_lightning.policy.prompts import encode_prompt
from gvpo_lightning.policy.score import score
from gvpo_lightning.rewards.protocol import RewardError, SharedContractError
from gvpo_lightning.rewards.tally import FailureTally
from gvpo_lightning.rollout.groups import assemble_rollout, drop_by_settings, reward_groups, sample_groups
from gvpo_lightning.rollout.metrics import measure_rollout
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.seeding import derive_seed
from gvpo_lightning.sources.offline import prompt_key

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule


Groups = list[list[Completion]]


def collect_rollout(module: "GVPOModule", rows: list[Row], index: int) -> Rollout:
    """The rollout that a micro-batch of `rows` starts: drawn, sampled, rewarded, scored and measured.

    Every rank must call this, with the same rows. What it takes is added to the module's `seconds`.
    """
    prompts = [row["prompt"] for row in rows]
    prompt_ids = [encode_prompt(prompt, module.tokenizer) for prompt in prompts]
    reshard(module)
    module.reference.refresh(module.policy, rollout=index, update=module.num_updates)
    with module.timed("rollout"):
        recorded = module.sources.draw(rows, derive_seed(module.seed, "sources", index), module.reference.version)
        fresh = sample_share(module, prompt_ids, module.sources.num_fresh(recorded), index)
    with module.timed("reward"):
        groups, failures = reward_shares(module, rows, fresh, recorded)
    rollout = assemble_rollout(index, prompts, prompt_ids, groups, module.sources.names)
    rollout.failures = failures
    flat_groups = drop_by_settings(rollout, module.rollout_settings)
    module.objective.check_rewards(rollout.batch)
    with module.timed("reference"):
        score_rollout(module, rollout, groups)
        if module.objective.needs_sampler_logprobs:
            rollout.batch.sampler_logprobs = torch.zeros_like(rollout.batch.reference_logprobs)
            score_rows(
                module, rollout.batch, rollout.batch.kept, rollout.batch.sampler_logprobs, nullcontext(module.policy)
            )
    module.sources.remember(index, prompts, groups)
    module.num_completion_tokens += int(rollout.batch.lengths.sum())
    rollout.metrics = measure_rollout(rollout, module.sources.names, module.vocab_size(), flat_groups)
    module.guard.negligible(
        {name: rollout.metrics.get(f"source/{name}/negligible_fraction", 0.0) for name in module.sources.names},
        module.vocab_size(),
    )
    return rollout


def sample_share(module: "GVPOModule", prompt_ids: list[list[int]], num_fresh: Sequence[int], index: int) -> Groups:
    """This rank's part of the fresh completions, of which each prompt gets `num_fresh`."""
    ranks = module.data_ranks
    owners = [group for group, count in enumerate(num_fresh) for _ in range(count)]
    mine = Counter(owners[number] for number in ranks.share(len(owners)))
    if not owners:
        return [[] for _ in prompt_ids]
    with module.trainer.precision_plugin.forward_context(), gathered(module):
        return sample_groups(
            module.policy,
            module.tokenizer,
            prompt_ids,
            [mine[group] for group in range(len(prompt_ids))],
            module.generation,
            derive_seed(module.seed, "completions", index, ranks.rank),
        )


def reward_shares(
    module: "GVPOModule", rows: list[Row], fresh: Groups, recorded: Groups
) -> tuple[Groups, FailureTally]:
    """The groups of all ranks, and how often rewards have failed on them.

    Each rank rewards what it has sampled, and a part of what is recorded.

    Raises:
        RewardError: on all ranks, if on one.
    """
    ranks = module.data_ranks
    flat = [(group, completion) for group, completions in enumerate(recorded) for completion in completions]
    share: Groups = [[] for _ in recorded]
    for number in ranks.share(len(flat)):
        group, completion = flat[number]
        share[group].append(completion)
    error: Exception | None = None
    failures = FailureTally()
    if module.rewards is not None and ranks.is_first_of_model:
        own = [[*new, *old] for new, old in zip(fresh, share, strict=True)]
        try:
            failures = reward_groups(own, [row["prompt"] for row in rows], rows, module.rewards)
        except Exception as raised:
            error = raised
    told = (fresh, share, row_hash(rows), None if error is None else str(error), failures)
    parts = ranks.gather(ranks.agree(told))
    if isinstance(error, ValueError):
        raise SharedContractError(str(error)) from error
    if error is not None:
        raise RewardError(f"{type(error).__name__}: {error}") from error
    for rank, (_, _, of_rows, message, _) in enumerate(parts):  # or this rank would wait for one that has ended
        if message is not None:
            raise RewardError(f"The reward failed on rank {rank}: {message}")
        if of_rows != row_hash(rows):
            raise ValueError(
                f"Rank {rank} was given other prompts than rank {ranks.rank}, but ranks share every rollout: give "
                "RolloutLoader the same dataset in the same order on all of them, without a sampler that differs."
            )
    failures = sum((part[4] for part in parts), FailureTally())
    module.report_failures(failures)
    groups = [
        [completion for kind in (0, 1) for part in parts for completion in part[kind][group]]
        for group in range(len(rows))
    ]
    return groups, failures


def row_hash(rows: list[Row]) -> str:
    """Changes with the prompts and their order."""
    return hashlib.sha256("\0".join(prompt_key(row["prompt"]) for row in rows).encode()).hexdigest()


def score_rollout(module: "GVPOModule", rollout: Rollout, groups: Groups) -> None:
    """Reference log-probs of the kept completions that have none of this version yet."""
    batch = rollout.batch
    completions = [completion for group in groups for completion in group]
    unscored = torch.tensor([c.reference_logprobs is None for c in completions], dtype=torch.bool)
    reference = module.reference.applied(module.policy)
    score_rows(module, batch, unscored & batch.kept, batch.reference_logprobs, reference)
    for row in batch.kept.nonzero().squeeze(-1).tolist():
        completions[row].reference_logprobs = batch.reference_logprobs[row, : len(completions[row].token_ids)].clone()
        completions[row].reference_version = module.reference.version


def score_rows(
    module: "GVPOModule", batch: CompletionBatch, marked: Tensor, values: Tensor, scorer: AbstractContextManager[Any]
) -> None:
    """Fill the rows of (S, T) `values` that are `marked`, (S,) bool, with log-probs under the model of `scorer`."""
    rows, ranks = marked.nonzero().squeeze(-1), module.data_ranks
    if not len(rows):
        return
    width = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]
    limits = module.rollout_settings.limits
    by_tokens = max(1, limits.tokens // width) if limits.tokens else module.generation.batch_size
    size = limits.completions or by_tokens
    mine = batch.select(rows[torch.tensor(ranks.share(len(rows)), dtype=torch.int64)])
    with (
        module.trainer.precision_plugin.forward_context(),
        scorer as model,
        callable_outside_steps(module),
    ):
        own = score(
            model,
            mine,
            temperature=module.temperature,
            batch_size=size,
            num_parts=math.ceil(math.ceil(len(rows) / ranks.size) / size),
            implementation=module.loss_implementation,
            padding_free=module.padding_free,
        )
    scored = (row for part in ranks.gather(own) for row in part)
    for row, logprobs in zip(rows.tolist(), scored, strict=True):
        values[row, : len(logprobs)] = logprobs
