"""How far trained policies are from each other, and from the closed-form optimum."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.paper.meter import right_probabilities
from gvpo_lightning.callbacks.optimality import validation_rows
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.data.rows import Row
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.head import Scoring, evaluating, padded_inputs, score
from gvpo_lightning.policy.prepare import load_policy
from gvpo_lightning.rollout.groups import sample_rollout

LARGEST = 2**25  # numbers of one forward pass's logits


class PolicyDistances(L.Callback):
    """Compares policies on the prompts that `gvpo validate` is given, before it validates its own, the reference.

    Writes `output`, JSON: for each group, by its name, `kl`, a list for each policy p with KL(p || q) for every q, in
    nats a completion, and `optimum`, KL(p || reference e^(R/beta) / Z) for each p, or null where Z is not known.

    Args:
        output: the file.
        groups: folders of policies, by name; those of one group are compared.
        completions: of each prompt, sampled from p.
        answers: the column with what is right, as in `PaperMeter`; then Z is known.
    """

    def __init__(
        self, output: str, groups: dict[str, list[str]], completions: int = 8, answers: str | None = None
    ) -> None:
        self.output, self.groups = Path(output), groups
        self.completions, self.answers = completions, answers

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and write."""
        assert isinstance(pl_module, GVPOModule)
        datamodule = getattr(trainer, "datamodule", None)
        rows = validation_rows(trainer.val_dataloaders, datamodule, trainer.limit_val_batches)
        found = {name: self._measure_group(pl_module, rows, folders) for name, folders in self.groups.items()}
        self.output.write_text(json.dumps(found))

    def _measure_group(self, module: GVPOModule, rows: list[Row], folders: list[str]) -> dict[str, Any]:
        log_z = None
        if self.answers is not None:
            p = right_probabilities(module, module.policy, rows, self.answers)
            log_z = float(log_normalizer(p, module.beta).mean())
        found: dict[str, list[Any]] = {"kl": [], "optimum": []}
        for folder in folders:
            own = load_policy(folder, module.source.loading_of(folder)).to(module.policy.device)
            batch = sample(module, own, rows, self.completions)
            found["kl"].append([divergence(module, own, other, batch) if other != folder else 0.0 for other in folders])
            found["optimum"].append(None if log_z is None else distance_to_optimum(module, own, batch, log_z))
        return found


def sample(module: GVPOModule, policy: Any, rows: list[Row], completions: int) -> CompletionBatch:
    """Completions of a policy at the temperature of log-probs, rewarded; those without a reward are left out."""
    generation = replace(module.generation, temperature=module.temperature, top_k=0, top_p=1.0, min_p=0.0)
    with module.placement.forward_context():
        batch = sample_rollout(
            policy, module.tokenizer, rows, completions, generation, module.rewards, seed=module.seed
        ).batch
    return batch.select(batch.kept.nonzero().squeeze(-1))


def log_normalizer(p: Tensor, beta: float) -> Tensor:
    """log Z = log(1 - p + p e^(1/beta)) of a 0/1 reward, where the reference is right with probability p."""
    return torch.logaddexp(torch.log1p(-p), p.log() + 1.0 / beta)


def distance_to_optimum(module: GVPOModule, policy: Any, batch: CompletionBatch, log_z: float) -> float:
    """KL(policy || optimum) from the policy's completions: the mean of log p - log reference - R / beta, plus log Z.

    At the optimum each completion gives 0, so that the estimate has no noise there.
    """
    scoring, size = Scoring(module.temperature), module.generation.batch_size
    with module.placement.forward_context():
        log_ratios = score(policy, batch, scoring, batch_size=size) - score(
            module.policy, batch, scoring, batch_size=size
        )
    return float((log_ratios.double().sum(dim=1) - batch.rewards.double() / module.beta).mean()) + log_z


@torch.no_grad()
def divergence(module: GVPOModule, policy: Any, other: str, batch: CompletionBatch) -> float:
    """KL(policy || other) in nats a completion, from the policy's completions: summed over their positions, the KL of
    the two next-token distributions, over the whole vocabulary."""
    second = load_policy(other, module.source.loading_of(other)).to(module.policy.device)
    total = 0.0
    with module.placement.forward_context(), evaluating(policy), evaluating(second):
        for part in chunks(batch, policy.config.get_text_config().vocab_size):
            part = part.to(policy.device)
            first, then = (next_token_logprobs(model, part, module.temperature) for model in (policy, second))
            total += float(((first.exp() * (first - then)).sum(dim=-1) * part.completion_mask).double().sum())
    return total / len(batch)


def chunks(batch: CompletionBatch, vocab_size: int) -> Iterator[CompletionBatch]:
    """As many completions at a time as `LARGEST` has room for."""
    width = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]
    for rows in torch.arange(len(batch)).split(max(1, math.floor(LARGEST / width / vocab_size))):
        yield batch.select(rows)


def next_token_logprobs(model: Any, batch: CompletionBatch, temperature: float) -> Tensor:
    """(S, T, vocabulary) float32: before each completion token, the model's log-probs of all that may come."""
    inputs, _ = padded_inputs(batch)
    logits = model(**inputs, use_cache=False).logits[:, batch.prompt_ids.shape[1] - 1 : -1]
    return (logits.float() / temperature).log_softmax(dim=-1)
