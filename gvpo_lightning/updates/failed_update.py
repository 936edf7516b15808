"""The update that a run stopped at, saved with all that made it, for `gvpo debug-batch`.

Only tensors, numbers, strings, lists and dicts, so that it loads with weights_only=True.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.distributed.sharding import local_tensor
from gvpo_lightning.rewards.values import as_json
from gvpo_lightning.updates.loss import UpdateLoss

FORMAT = "gvpo offending update 1"


@dataclass
class OffendingUpdate:
    """An update as the run saw it, of one rank.

    Attributes:
        batch: its S completions.
        log_ratios: (S,) log pi - log pi' in nats.
        bad_tokens: (S, T) bool: tokens that count and whose log-prob, under policy or reference, is not finite.
        texts, prompts, sources: one entry a completion.
        settings: at least `beta`, `temperature`, `max_log_ratio`, `num_groups` and `step`.
        parameters: names of those not finite, by "weights" and "gradients".
    """

    batch: CompletionBatch
    log_ratios: Tensor
    bad_tokens: Tensor
    texts: list[str]
    prompts: list[Any]
    sources: list[str]
    settings: dict[str, Any]
    parameters: dict[str, list[str]]

    def save(self, path: Path) -> None:
        """Write it to a file; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"format": FORMAT, **vars(self), "batch": self.batch.state_dict()}, path)


def load_offending_update(path: str | Path) -> OffendingUpdate:
    """What `OffendingUpdate.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"batch={str(path)!r} is not a file: give the one that the stopped run names.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of an arbitrary file
        raise ValueError(f"batch={str(path)!r} can't be loaded: {error}") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ValueError(f"batch={str(path)!r} is not an update that a stopped run has saved.")
    return OffendingUpdate(**{**state, "batch": CompletionBatch(**state["batch"])})


def save_update_of(folder: Path, loss: UpdateLoss, token_logprobs: Sequence[Tensor], step: int) -> str:
    """Save this rank's part of an update, and say where and how to look into it; before its gradients are cleared.

    Args:
        token_logprobs: (N,) of each of the update's micro-batches, as the loss saw them.
        step: the run's updates, this one included.
    """
    update, rollout, rules = loss.update, loss.rollout, loss.rules
    rows = [row for micro_batch in update.micro_batches for row in micro_batch]
    batch = rollout.micro_batch(rows, torch.device("cpu"))
    groups = rollout.batch.group_ids.tolist()
    path = folder / f"offending_update_rank{rules.placement.rank}.pt"
    token_ratios = batch.unpack(torch.cat(list(token_logprobs)).float().cpu()) - batch.reference_logprobs.float()
    failed = OffendingUpdate(
        batch,
        token_ratios.sum(dim=1),
        ~torch.isfinite(token_ratios) & batch.completion_mask,
        texts=[rollout.completions[row] for row in rows] or [""],
        prompts=[as_json(rollout.prompts[groups[row]]) for row in rows] or [""],
        sources=[rollout.sources[row] for row in rows] or [""],
        settings={
            "beta": loss.objective.beta,
            "objective": str(loss.objective.settings),
            "temperature": rules.scoring.temperature,
            "max_log_ratio": rules.max_log_ratio,
            "num_groups": max(update.num_groups, 1),
            "step": step,
            "rank": rules.placement.rank,
            "num_ranks": rules.placement.num_ranks,
        },
        parameters=not_finite_parameters(loss.policy),
    )
    try:
        failed.save(path)
    except OSError as error:  # the run has worse troubles
        return f"could not be saved: {error}."
    config = path.with_name("config.yaml")  # the command line leaves one
    command = f"gvpo debug-batch --config {config if config.exists() else 'CONFIG'} --batch {path}"
    return f"{path}: `{command}` shows what is to blame."


def not_finite_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Names of parameters with "weights" and with "gradients" that are not finite; of sharded ones, on this rank."""
    parameters = list(model.named_parameters())
    return {
        "weights": [name for name, parameter in parameters if not _is_finite(parameter)],
        "gradients": [name for name, parameter in parameters if not _is_finite(parameter.grad)],
    }


def _is_finite(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    return bool(torch.isfinite(local_tensor(tensor)).all())
