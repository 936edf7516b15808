"""GVPO's loss in plain torch, any floating dtype: the truth that every faster path is tested against.

Source: Group Variance Policy Optimization (arXiv 2504.19599), equations of section 3; departures:

* the batch loss is the mean over the groups with two or more kept completions, for every way the
  batch is cut (the authors' code sums per micro-batch, so its scale moves with the micro-batch size);
* groups may have different sizes k, each with its own unbiased 1 / (k - 1).

With l_i = log pi(y_i|x) - log pi'(y_i|x) summed over a completion's tokens, means over the group:

    d_i = beta (l_i - mean l) - (R_i - mean R),      L = mean over groups of  sum_i d_i^2 / (2 (k - 1)).
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GroupStatistics:
    """What a completion must know of its group; once it is known, a group may be cut into pieces.

    Attributes:
        index: (S,) row of each completion's group in the (G,) tensors below.
        size: (G,) number of kept completions, k. 0 or 1 means that the group contributes nothing.
        mean_log_ratio: (G,) mean log-ratio of the kept completions, in nats.
        mean_reward: (G,) mean reward of the kept completions.
        mean_logprob: (G,) mean sequence log-prob under the policy, in nats (the RL view alone needs it).
        reward_range: (G,) largest minus smallest reward of the kept completions: exactly 0 where all are equal.
    """

    index: Tensor
    size: Tensor
    mean_log_ratio: Tensor
    mean_reward: Tensor
    mean_logprob: Tensor
    reward_range: Tensor

    @property
    def num_groups(self) -> int:
        """Groups that count: those with two or more kept completions."""
        return int((self.size >= 2).sum())

    def weight(self, kept: Tensor) -> Tensor:
        """(S,) 1 / (k - 1) for the kept completions of groups with k >= 2, else 0."""
        size = self.size[self.index]
        weight = 1.0 / (size - 1).clamp(min=1).to(self.mean_reward.dtype)
        return torch.where(kept & (size >= 2), weight, torch.zeros_like(weight))


def group_statistics(
    log_ratios: Tensor,
    rewards: Tensor,
    sequence_logprobs: Tensor,
    group_ids: Tensor,
    kept: Tensor,
    process_group: "dist.ProcessGroup | None" = None,
) -> GroupStatistics:
    """Sizes and means of every group; without gradient, which changes nothing since residuals sum to 0.

    Args:
        log_ratios, rewards, sequence_logprobs: (S,) floating; values of completions that are not kept are ignored.
        group_ids: (S,) integers in any order; equal ids are one group.
        kept: (S,) bool.
        process_group: if given, groups may be spread over its ranks (ids must agree between them); every
            rank must make this call. Differing S are allowed.
    """
    with torch.no_grad():
        num_local = len(group_ids)
        columns = [group_ids.to(torch.int64), kept, log_ratios, rewards.to(log_ratios.dtype), sequence_logprobs]
        offset = 0
        if process_group is not None:
            columns, offset = gather_rows(columns, process_group)
        ids, kept, *values = columns
        unique, index = torch.unique(ids, return_inverse=True)
        zeros = values[0].new_zeros(len(unique))
        size = torch.zeros_like(zeros, dtype=torch.int64).index_add_(0, index, kept.to(torch.int64))
        divisor = size.clamp(min=1).to(zeros.dtype)
        means = [zeros.index_add(0, index, torch.where(kept, v, torch.zeros_like(v))) / divisor for v in values]
        highest, lowest = (
            zeros.scatter_reduce(0, index[kept], values[1][kept], extreme, include_self=False)
            for extreme in ("amax", "amin")
        )
        means_and_range = (*means, highest - lowest)
        return GroupStatistics(index[offset : offset + num_local], size, *means_and_range)


def reward_statistics(rewards: Tensor, group_ids: Tensor, kept: Tensor) -> GroupStatistics:
    """The same of rewards, or of whatever else completions have one number of, alone: (S,) each; the rest is 0."""
    zeros = torch.zeros_like(rewards)
    return group_statistics(zeros, rewards, zeros, group_ids, kept)


def gather_rows(columns: list[Tensor], process_group: "dist.ProcessGroup") -> tuple[list[Tensor], int]:
    """Concatenate (S_rank,) tensors over the ranks; also the row at which this rank's own part starts."""
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=columns[0].device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.full_like(lengths[0], len(columns[0])), group=process_group)
    counts = [int(length) for length in lengths]
    gathered = []
    for column in columns:
        padded = column.new_zeros(max(counts))
        padded[: len(column)] = column
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=process_group)
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))
    return gathered, sum(counts[:rank])


@dataclass(frozen=True)
class GVPOLoss:
    """The loss of a batch of S completions and what it was made from.

    Attributes:
        loss: scalar, differentiable in the token log-probs it was given.
        residuals: (S,) centred implicit reward minus advantage, detached; 0 where it does not count.
        log_ratios: (S,) log pi - log pi' of each completion in nats, detached; 0 for dropped ones.
        metrics: detached scalars, see `gvpo_metrics`.
    """

    loss: Tensor
    residuals: Tensor
    log_ratios: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def sum_completion_tokens(token_values: Tensor, completion_mask: Tensor) -> Tensor:
    """(S, T) per-token values -> (S,) sums over each completion's own tokens, in max(fp32, input dtype)."""
    dtype = torch.promote_types(token_values.dtype, torch.float32)
    return torch.where(completion_mask, token_values.to(dtype), 0.0).sum(dim=1)


def gvpo_loss(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    *,
    num_groups: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> GVPOLoss:
    """The GVPO loss of a batch of completions (its mean-squared-error view).

    Args:
        token_logprobs: (S, T) log-probs of the completions' tokens under the policy, in nats.
        reference_logprobs: (S, T) the same under the reference.
        completion_mask: (S, T) bool or 0/1; 1 = a token that counts (EOS included, prompt and padding
            not). An all-zero row is a dropped completion: it leaves its group, its reward is ignored
            (it may be NaN) and its residual is 0.
        rewards: (S,) finite for every kept completion.
        group_ids: (S,) integers in any order; completions of one prompt share an id.
        beta: strength of the implicit reward, > 0.
        num_groups: denominator of the mean over groups; default: this batch's groups with two or more
            kept completions. Give the whole update's number when the batch is one of its micro-batches.
        process_group: groups may be spread over the ranks of this process group. The loss is then scaled
            so that the MEAN over the ranks of loss and gradients (what DDP takes) is that of one big batch.

    Returns:
        a record with `loss`, `residuals`, `log_ratios`, `metrics`. A batch in which nothing counts has a
        loss of 0 that is still connected to the graph.

    Raises:
        ValueError: wrong shapes or dtypes, beta <= 0, or a kept completion whose reward is not finite.
    """
    batch = prepare(
        token_logprobs, reference_logprobs, completion_mask, rewards, group_ids, beta, num_groups, process_group
    )
    loss = 0.5 * (batch.share * batch.residuals.square()).sum()
    return GVPOLoss(loss, batch.residuals.detach(), batch.log_ratios.detach(), gvpo_metrics(batch))


def gvpo_loss_of_log_ratios(
    log_ratios: Tensor, kept: Tensor, rewards: Tensor, group_ids: Tensor, beta: float, *, num_groups: int | None = None
) -> GVPOLoss:
    """`gvpo_loss` of (S,) log-ratios, which are all that it needs of the tokens; kept: (S,) bool; the rest as there.

    The record's `objective/*` metrics are those of a reference whose log-probs are 0.
    """
    ratios = log_ratios[:, None]  # every completion as one token
    return gvpo_loss(ratios, torch.zeros_like(ratios), kept[:, None], rewards, group_ids, beta, num_groups=num_groups)


@dataclass(frozen=True)
class PreparedBatch:
    """A checked batch reduced to completions; every tensor is (S,) but those of `statistics`.

    `share` is what one completion's squared residual weighs in twice the loss: world_size / ((k - 1) n),
    with n the number of groups, and 0 where it does not count.
    """

    sequence_logprobs: Tensor
    reference_sequence_logprobs: Tensor
    log_ratios: Tensor
    rewards: Tensor
    kept: Tensor
    statistics: GroupStatistics
    residuals: Tensor
    share: Tensor
    beta: float


def prepare(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> PreparedBatch:
    """What every view of the loss starts from; arguments as in `gvpo_loss`."""
    completion_mask = check_loss_inputs(token_logprobs, reference_logprobs, completion_mask, rewards, group_ids, beta)
    reference_logprobs = reference_logprobs.detach()
    kept = completion_mask.any(dim=1)
    # per token first, then the sum: two large sums subtracted would lose what the loss is made of
    dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
    log_ratios = sum_completion_tokens(token_logprobs.to(dtype) - reference_logprobs.to(dtype), completion_mask)
    sequence_logprobs = sum_completion_tokens(token_logprobs, completion_mask)
    rewards = torch.where(kept, rewards.detach().to(log_ratios.dtype), torch.zeros_like(log_ratios))
    statistics = group_statistics(log_ratios, rewards, sequence_logprobs, group_ids, kept, process_group)
    denominator = max(statistics.num_groups if num_groups is None else num_groups, 1)
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    return PreparedBatch(
        sequence_logprobs=sequence_logprobs,
        reference_sequence_logprobs=sum_completion_tokens(reference_logprobs, completion_mask),
        log_ratios=log_ratios,
        rewards=rewards,
        kept=kept,
        statistics=statistics,
        residuals=compute_residuals(log_ratios, rewards, statistics, kept, beta),
        share=statistics.weight(kept) * (world_size / denominator),
        beta=beta,
    )


def compute_residuals(
    log_ratios: Tensor, rewards: Tensor, statistics: GroupStatistics, kept: Tensor, beta: float
) -> Tensor:
    """(S,) residuals d_i = beta (l_i - mean l) - (R_i - mean R); 0 for dropped completions and lone ones."""
    implicit_reward = beta * (log_ratios - statistics.mean_log_ratio[statistics.index])
    advantage = rewards - statistics.mean_reward[statistics.index]
    counts = kept & (statistics.size[statistics.index] >= 2)
    return torch.where(counts, implicit_reward - advantage, torch.zeros_like(implicit_reward))


def rl_terms(batch: PreparedBatch) -> dict[str, Tensor]:
    """The reinforcement-learning view: three sample (co)variances whose sum is the loss up to a constant.

    Scalars, differentiable in the policy's log-probs; means over the groups with k >= 2, with the signs
    with which they enter the loss:  -beta Cov(R, log pi) - beta^2 Cov(log pi, log pi') + beta^2 Var(log pi) / 2.
    """
    statistics, beta = batch.statistics, batch.beta
    mean_reference = statistics.mean_logprob - statistics.mean_log_ratio

    def centred(values: Tensor, means: Tensor) -> Tensor:
        return torch.where(batch.share > 0, values - means[statistics.index], torch.zeros_like(values))

    policy = centred(batch.sequence_logprobs, statistics.mean_logprob)
    reference = centred(batch.reference_sequence_logprobs, mean_reference)
    reward = centred(batch.rewards, statistics.mean_reward)
    return {
        "objective/reward_term": -beta * (batch.share * reward * policy).sum(),
        "objective/covariance_term": -(beta**2) * (batch.share * policy * reference).sum(),
        "objective/variance_term": 0.5 * beta**2 * (batch.share * policy.square()).sum(),
    }


@torch.no_grad()
def gvpo_metrics(batch: PreparedBatch) -> dict[str, Tensor]:
    """Detached scalars that say how far a batch is from the optimum.

    `residual/rms` is 0 and `implicit_reward/slope` (of centred implicit reward on centred reward) is 1 at
    the optimum; the slope is NaN where no group's rewards differ. `log_ratio/max` is the largest absolute
    one. `group/*` count groups; `objective/*` are `rl_terms`.
    """
    index, mean_reward = batch.statistics.index, batch.statistics.mean_reward
    counts, groups = batch.share > 0, batch.statistics.size >= 2
    flat = groups & (batch.statistics.reward_range == 0)
    num_counted, num_groups = counts.sum().clamp(min=1), groups.sum().clamp(min=1)
    zero = torch.zeros_like(batch.log_ratios)
    # equal rewards may differ from their own mean by rounding: not a slope
    advantage = torch.where(counts & ~flat[index], batch.rewards - mean_reward[index], zero)
    implicit_reward = torch.where(counts, batch.residuals + advantage, zero)
    log_ratios = torch.where(counts, batch.log_ratios, zero)
    metrics = {
        "residual/rms": (batch.residuals.square().sum() / num_counted).sqrt(),
        "implicit_reward/slope": (implicit_reward * advantage).sum() / advantage.square().sum(),
        "log_ratio/mean": log_ratios.sum() / num_counted,
        "log_ratio/max": log_ratios.abs().max() if len(log_ratios) else zero.sum(),
        "group/zero_variance_fraction": flat.sum() / num_groups,
        "group/dropped": (~groups).sum().to(zero.dtype),
    }
    return metrics | rl_terms(batch)


def check_loss_inputs(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
) -> Tensor:
    """Check the arguments of `gvpo_loss`; returns completion_mask as bool."""
    if token_logprobs.dim() != 2 or not token_logprobs.is_floating_point():
        raise ValueError(
            f"token_logprobs must be floating with shape (S, T), got {token_logprobs.dtype} "
            f"{tuple(token_logprobs.shape)}: one row a completion, one column a token."
        )
    shape, num_sequences = token_logprobs.shape, len(token_logprobs)
    for name, tensor in (("reference_logprobs", reference_logprobs), ("completion_mask", completion_mask)):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have token_logprobs' shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    for name, tensor in (("rewards", rewards), ("group_ids", group_ids)):
        if tensor.shape != (num_sequences,):
            raise ValueError(
                f"{name} must have one entry a completion, shape ({num_sequences},), got {tuple(tensor.shape)}."
            )
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}: completions of one prompt share an id.")
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}: it scales log-ratios to rewards (0.1 is a good start).")
    completion_mask = completion_mask.to(torch.bool)
    bad = completion_mask.any(dim=1) & ~torch.isfinite(rewards)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"rewards must be finite for every kept completion, got {float(rewards[row])} in row {row}: "
            "drop that completion by zeroing its completion_mask row."
        )
    return completion_mask


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """(N,) log-probs of the targets by plain autograd, all (N, V) logits stored: the truth for `linear_logprob`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_softmax = torch.log_softmax(logits / temperature, dim=-1)
    token_logprobs = log_softmax.gather(-1, targets[:, None]).squeeze(-1)
    if not return_entropy:
        return token_logprobs
    with torch.no_grad():
        # probability 0 adds nothing, also where the log-prob is -inf
        return token_logprobs, -(log_softmax.exp() * log_softmax.nan_to_num(neginf=0.0)).sum(dim=-1)
