"""Collecting a rollout: completions from the run's sources, their rewards and their log-probs under the reference."""

from typing import TYPE_CHECKING

import torch

from gvpo_lightning.batch import Completion
from gvpo_lightning.meters import measure_rollout
from gvpo_lightning.reference import score
from gvpo_lightning.rollout.generation import encode_prompt
from gvpo_lightning.rollout.loader import Row
from gvpo_lightning.rollout.sampling import Rollout, assemble_rollout, drop_by_settings, reward_groups, sample_groups
from gvpo_lightning.seeding import derive_seed

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule


def collect_rollout(module: "GVPOModule", rows: list[Row], index: int) -> Rollout:
    """The rollout that a micro-batch of `rows` starts: drawn, sampled, rewarded, scored and measured.

    Every rank must call this. What it takes is added to the module's `seconds`.
    """
    prompts = [row["prompt"] for row in rows]
    prompt_ids = [encode_prompt(prompt, module.tokenizer) for prompt in prompts]
    module.reference.refresh(module.policy, rollout=index, update=module.num_updates)
    with module.timed("rollout"), module.trainer.precision_plugin.forward_context():
        recorded = module.sources.draw(rows, derive_seed(module.seed, "sources", index), module.reference.version)
        fresh = sample_groups(
            module.policy,
            module.tokenizer,
            prompt_ids,
            module.sources.num_fresh(recorded),
            module.generation,
            derive_seed(module.seed, "completions", index, module.global_rank),
        )
        groups = [[*new, *old] for new, old in zip(fresh, recorded, strict=True)]
    with module.timed("reward"):
        if module.reward is not None:
            reward_groups(groups, prompts, rows, module.reward)
    rollout = assemble_rollout(index, prompts, prompt_ids, groups, module.sources.names, module.policy.device)
    flat_groups = drop_by_settings(rollout, module.rollout_settings)
    with module.timed("reference"):
        score_rollout(module, rollout, groups)
    module.sources.remember(index, prompts, groups)
    module.num_completion_tokens += int(rollout.batch.lengths.sum())
    rollout.metrics = measure_rollout(rollout, module.sources.names, module.vocab_size(), flat_groups)
    module.guard.negligible(
        {name: rollout.metrics.get(f"source/{name}/negligible_fraction", 0.0) for name in module.sources.names},
        module.vocab_size(),
    )
    return rollout


def score_rollout(module: "GVPOModule", rollout: Rollout, groups: list[list[Completion]]) -> None:
    """Reference log-probs of the kept completions that have none of this version yet."""
    batch = rollout.batch
    completions = [completion for group in groups for completion in group]
    unscored = torch.tensor([c.reference_logprobs is None for c in completions], dtype=torch.bool)
    rows = (unscored.to(batch.kept.device) & batch.kept).nonzero().squeeze(-1)
    if len(rows):
        width = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]
        limits = module.rollout_settings.limits
        size = limits.completions or (limits.tokens or 0) // width or module.generation.batch_size
        with module.trainer.precision_plugin.forward_context(), module.reference.applied(module.policy) as model:
            values = score(
                model,
                batch.select(rows),
                temperature=module.temperature,
                batch_size=size,
                implementation=module.loss_implementation,
            )
        batch.reference_logprobs[rows, : values.shape[1]] = values
    logprobs = batch.reference_logprobs.cpu()
    for row in batch.kept.nonzero().squeeze(-1).tolist():
        completions[row].reference_logprobs = logprobs[row, : len(completions[row].token_ids)].clone()
        completions[row].reference_version = module.reference.version
