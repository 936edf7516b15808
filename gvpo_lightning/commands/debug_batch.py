"""`gvpo debug-batch`: what in the update that a run stopped at is to blame.

Shows what the run saw, and computes it again, one group at a time, under the policy of the config or of a checkpoint.
The computation is in float32 and unsharded: what is finite here and was not in the run is a matter of the weights at
that time, or of the run's precision.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gvpo_lightning.checkpointing.weights import load_weights
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives import make_objective
from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.objectives.gvpo import gvpo_loss
from gvpo_lightning.policy.head import Scoring, completion_logprobs
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.seeding import derive_seed, run_seed
from gvpo_lightning.updates.failed_update import OffendingUpdate, load_offending_update, not_finite_parameters

SHOWN = 32  # rows of a table
NAMED = 8  # parameters in a list


@dataclass
class GroupFindings:
    """What one group gives now.

    Attributes:
        rows: (n,) its completions in the update.
        log_ratios: (n,) log pi - log pi' in nats.
        bad_tokens: (n, T) bool: tokens whose log-prob, under policy or reference, is not finite.
        loss: its share of the update's loss.
        gradient_norm: over all trainable parameters.
        bad_gradients: names of parameters whose gradient is not finite.
    """

    rows: Tensor
    log_ratios: Tensor
    bad_tokens: Tensor
    loss: float
    gradient_norm: float
    bad_gradients: list[str]


def debug_batch(
    source: PolicySource, objective: Objective, scoring: Scoring, batch: str | Path, ckpt_path: str | Path | None = None
) -> None:
    """Print what the run saw of the update in the file `batch`, and what it gives now, the worst first.

    Raises:
        FileNotFoundError, ValueError: one of the files is not there or not what it should be.
    """
    update = load_offending_update(batch)
    name, saved = str(objective.settings), update.settings.get("objective", "gvpo")
    if name != saved:
        raise ValueError(
            f"{str(batch)!r} is an update of objective: {saved}, the config says {name}: give the config of that run."
        )
    seed, loading = derive_seed(run_seed(), "lora"), replace(source.loading, dtype="float32", attn_implementation=None)
    policy = source.load(seed, loading)
    if ckpt_path is not None:
        load_weights(policy, ckpt_path)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    scoring = replace(scoring, temperature=update.settings["temperature"])
    present = update.batch.group_ids[update.batch.kept].unique().tolist()
    groups = [recompute(policy, objective, scoring, update, group) for group in present]
    console = Console()
    facts = ", ".join(f"{name} {value}" for name, value in update.settings.items())
    console.print(Text(f"{batch}: {len(update.batch)} completions in {len(groups)} groups; {facts}"))
    console.print(completions_table(update, groups, source.tokenizer))
    console.print(groups_table(update, groups))
    weights = f"the weights of {ckpt_path or source.given!r:.200}"
    lines = ["In the run:", *run_lines(update), f"Under {weights}:", *now_lines(policy, update, groups)]
    console.print(Text("\n".join(lines)))


def recompute(
    policy: Any, objective: Objective, scoring: Scoring, update: OffendingUpdate, group: int
) -> GroupFindings:
    """Log-probs, loss and gradient of one group under the policy."""
    rows = (update.batch.group_ids == group).nonzero().squeeze(-1)
    part = update.batch.select(rows).to(policy.device)
    logprobs, _ = completion_logprobs(policy, part, scoring)
    token_ratios = (logprobs - part.reference_logprobs).detach()
    own = make_objective(objective.settings, update.settings["beta"], objective.max_completion_tokens)
    loss = share_of_loss(own, logprobs, part, update, rows)
    policy.zero_grad()
    loss.backward()
    norms = [parameter.grad.norm() for parameter in policy.parameters() if parameter.grad is not None]
    bad = not_finite_parameters(policy)["gradients"]
    policy.zero_grad()
    return GroupFindings(
        rows=rows,
        log_ratios=token_ratios.sum(dim=1).cpu(),
        bad_tokens=(~torch.isfinite(token_ratios) & part.completion_mask).cpu(),
        loss=float(loss.detach()),
        gradient_norm=float(torch.stack(norms).norm()) if norms else 0.0,
        bad_gradients=bad,
    )


def share_of_loss(
    objective: Objective, logprobs: Tensor, part: CompletionBatch, update: OffendingUpdate, rows: Tensor
) -> Tensor:
    """One group's share of the update's loss; where it is not GVPO's, of this rank's part of the update."""
    if not objective.is_fused:
        return objective.loss(logprobs, part, objective.terms(update.batch).select(rows.tolist())).loss
    columns = (part.reference_logprobs, part.completion_mask, part.rewards, part.group_ids, objective.beta)
    return gvpo_loss(logprobs, *columns, num_groups=update.settings["num_groups"]).loss


def completions_table(update: OffendingUpdate, groups: Iterable[GroupFindings], tokenizer: Any) -> Table:
    """One row a completion; first those that are not finite, then by the size of their log-ratio."""
    rows = []
    for group in groups:
        for number, row in enumerate(group.rows.tolist()):
            seen, now = float(update.log_ratios[row]), float(group.log_ratios[number])
            problems = _problems(update, row, group.bad_tokens[number], tokenizer)
            rows.append((_badness(seen), _badness(now), row, seen, now, problems))
    rows.sort(key=lambda entry: entry[:2], reverse=True)
    table = Table(title="completions, worst first")
    for name in ("row", "group", "source", "reward", "in the run", "now", "prompt and completion", "not finite"):
        table.add_column(name, overflow="fold")
    for *_, row, seen, now, problems in rows[:SHOWN]:
        cells = [str(row), str(int(update.batch.group_ids[row])), update.sources[row]]
        cells += [f"{float(update.batch.rewards[row]):.3g}", f"{seen:.4g}", f"{now:.4g}"]
        table.add_row(*map(Text, [*cells, _shown(update.prompts[row], update.texts[row]), problems]))
    more = f"; {len(rows) - SHOWN} more, no worse" if len(rows) > SHOWN else ""
    table.caption = f"log-ratios in nats, as the run saw them and as computed now{more}"
    return table


def groups_table(update: OffendingUpdate, groups: list[GroupFindings]) -> Table:
    """One row a group, the largest gradient first."""
    table = Table(title="groups, the largest gradient first", caption="loss and gradient as computed now")
    for name in ("group", "completions", "rewards", "loss", "gradient norm", "gradients not finite"):
        table.add_column(name, overflow="fold")
    ordered = sorted(groups, key=lambda group: _badness(group.gradient_norm), reverse=True)
    for group in ordered[:SHOWN]:
        number, rewards = int(update.batch.group_ids[group.rows[0]]), update.batch.rewards[group.rows]
        cells = [str(number), str(len(group.rows)), f"{float(rewards.min()):.3g} to {float(rewards.max()):.3g}"]
        cells += [f"{group.loss:.4g}", f"{group.gradient_norm:.4g}", _names(group.bad_gradients)]
        table.add_row(*map(Text, cells))
    return table


def run_lines(update: OffendingUpdate) -> list[str]:
    """What the run saw, in words."""
    limit = update.settings["max_log_ratio"]
    not_finite, beyond = _count(update.log_ratios, limit)
    return [
        f"  log-ratios not finite: {not_finite} of {len(update.batch)}; finite, but beyond {limit:g}: {beyond}",
        *(f"  {kind} not finite: {_names(names)}" for kind, names in update.parameters.items()),
    ]


def now_lines(policy: Any, update: OffendingUpdate, groups: list[GroupFindings]) -> list[str]:
    """What the same completions give under the policy at hand, in words."""
    weights = not_finite_parameters(policy)["weights"]
    gradients = list(dict.fromkeys(name for group in groups for name in group.bad_gradients))
    log_ratios = torch.zeros_like(update.log_ratios)
    for group in groups:
        log_ratios[group.rows] = group.log_ratios
    limit = update.settings["max_log_ratio"]
    not_finite, beyond = _count(log_ratios, limit)
    lines = [
        f"  log-ratios not finite: {not_finite} of {len(log_ratios)}; finite, but beyond {limit:g}: {beyond}",
        f"  weights not finite: {_names(weights)}",
        f"  gradients not finite: {_names(gradients)}",
    ]
    if weights:
        return [*lines, "The policy is broken, whatever the batch: give --ckpt_path of an earlier checkpoint."]
    if not_finite or beyond or gradients:
        return [*lines, "The weights are finite: completions and groups at the top of the tables are to blame."]
    if update.settings.get("num_ranks", 1) > 1:
        lines.append("Each rank has left a file of its own part of the update: look into the others as well.")
    return [*lines, "All is sound here: the weights that the run had by then, or its precision, are to blame."]


def _count(log_ratios: Tensor, limit: float) -> tuple[int, int]:
    """How many are not finite, and how many are finite but beyond the limit."""
    finite = torch.isfinite(log_ratios)
    return int((~finite).sum()), int((finite & (log_ratios.abs() > limit)).sum())


def _problems(update: OffendingUpdate, row: int, bad_now: Tensor, tokenizer: Any) -> str:
    """Which tokens are not finite, and where."""
    batch = update.batch
    reference = ~torch.isfinite(batch.reference_logprobs[row]) & batch.completion_mask[row]
    found = []
    for name, marked in (("reference", reference), ("in the run", update.bad_tokens[row]), ("now", bad_now)):
        positions = marked.nonzero().squeeze(-1).tolist()
        if len(positions) == int(batch.lengths[row]):
            found.append(f"{name}: all tokens")
        elif positions:
            tokens = tokenizer.convert_ids_to_tokens(batch.completion_ids[row, positions[:4]].tolist())
            some = ", ".join(f"{token!r} at {position}" for position, token in zip(positions, tokens, strict=False))
            found.append(f"{name}: {some}{', …' if len(positions) > 4 else ''}")
    return "; ".join(found)


def _badness(value: float) -> float:
    return abs(value) if math.isfinite(value) else math.inf


def _shown(prompt: Any, completion: str) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    return f"{text[-60:]} → {completion[:60]}"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) or "none") + more
