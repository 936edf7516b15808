"""What a run does where completions are short, and where they are long."""

from typing import Any

import torch
from torch import Tensor

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.objectives.gvpo import length_scaled_gvpo_loss
from gvpo_lightning.policy.head import Scoring, score


class LengthMeter:
    """Measures a policy on prompts in parts of about equal size, from those with short completions to long ones.

    Args:
        batch: of the policy as it is at the start: its lengths decide on the parts, and log-ratios are of these
            completions, whatever the policy has become. Of its own it might say nothing wrong any more.
        num_prompts, num_parts: how many.
    """

    def __init__(self, module: GVPOModule, batch: CompletionBatch, num_prompts: int, num_parts: int) -> None:
        self.batch, self.num_parts = batch, num_parts
        self._parts = parts_of_prompts(batch.lengths, batch.group_ids, num_prompts, num_parts)
        self._start = self._score(module)

    def measure(self, module: GVPOModule, fresh: CompletionBatch) -> list[dict[str, Any]]:
        """For each part `length`, mean tokens of the start's completions, `accuracy` and `length_now` of fresh ones,
        and what `describe_part` says of the log-ratios to the start.
        """
        log_ratios = (self._score(module) - self._start).double().sum(dim=1)
        exponent = module.objective_settings.length_exponent or 0.0
        scales = self.batch.lengths.clamp(min=1).double().pow(-exponent)
        columns = (scales, self.batch.kept, self.batch.rewards, self.batch.group_ids)
        residuals = length_scaled_gvpo_loss(log_ratios, *columns, module.beta or 1.0).residuals
        found = []
        for part in range(self.num_parts):
            now = self._parts[fresh.group_ids] == part
            then = self._parts[self.batch.group_ids] == part
            described = describe_part(
                log_ratios[then], residuals[then], self.batch.rewards[then], self.batch.group_ids[then]
            )
            found.append(
                {"length": float(self.batch.lengths[then].double().mean())}
                | {"length_now": float(fresh.lengths[now].double().mean())}
                | {"accuracy": float(fresh.rewards[now].double().mean())}
                | described
            )
        return found

    def _score(self, module: GVPOModule) -> Tensor:
        with module.placement.forward_context():
            size = module.generation.batch_size
            return score(module.policy, self.batch, Scoring(module.temperature), batch_size=size)


def parts_of_prompts(lengths: Tensor, group_ids: Tensor, num_prompts: int, num_parts: int) -> Tensor:
    """(num_prompts,) int64: to which part each prompt belongs by the mean length of its completions.

    Args:
        lengths, group_ids: (S,), one entry a completion.
    """
    count = torch.bincount(group_ids, minlength=num_prompts).clamp(min=1)
    means = torch.zeros(num_prompts, dtype=torch.float64).index_add(0, group_ids, lengths.double()) / count
    ranks = means.argsort(stable=True).argsort()
    return ranks * num_parts // num_prompts


def describe_part(log_ratios: Tensor, residuals: Tensor, rewards: Tensor, group_ids: Tensor) -> dict[str, Any]:
    """How log-ratios stand to rewards, of some prompts' completions; all (S,).

    Returns:
        `separation`: nats between the better and the worse completions of a prompt (above and below its mean reward),
            averaged over prompts that have both; None without any. 1/beta at GVPO's optimum, for 0/1 rewards.
        `noise`: nats, the standard deviation of log-ratios among a prompt's better, or its worse, completions. 0 there.
        `residual_rms`: of the reward's unit, GVPO's. 0 there.
    """
    separations, squares, freedom = [], 0.0, 0
    for group in group_ids.unique():
        mine = group_ids == group
        ratios, better = log_ratios[mine], rewards[mine] > rewards[mine].mean()
        cells = [cell for cell in (ratios[better], ratios[~better]) if len(cell)]
        squares += sum(float((cell - cell.mean()).square().sum()) for cell in cells)
        freedom += len(ratios) - len(cells)
        if len(cells) == 2:
            separations.append(float(cells[0].mean() - cells[1].mean()))
    return {
        "separation": sum(separations) / len(separations) if separations else None,
        "noise": (squares / max(freedom, 1)) ** 0.5,
        "residual_rms": float(residuals.square().mean().sqrt()),
    }
