"""The typed batch of completions that everything downstream of generation works on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass
class Completion:
    """One completion on its own, as a source gives it.

    Attributes:
        token_ids: (T,) int64 on the CPU, the end token included where there is one.
        text: what people and rewards read, as it stands behind the prompt: with its special tokens, but for those
            that end completions, the padding token and the one for what is unknown.
        source: where it comes from, such as "policy" or "replay".
        truncated: it has no end token.
        reward: None = still to be asked for; NaN = asked for, and there is none.
        components: what each of the run's rewards gives, by its name; NaN where it does not apply or has failed.
        failure: the reason why one has failed, or None.
        reference_logprobs: (T,) float32 on the CPU under the reference, or None = still to be computed.
        reference_version: which version of the reference that was.
    """

    token_ids: Tensor
    text: str
    source: str
    truncated: bool
    reward: float | None = None
    components: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    reference_logprobs: Tensor | None = None
    reference_version: int = 0

    def set_reward(self, total: float, components: dict[str, float], failure: str | None) -> None:
        """What the rewards have said of it."""
        self.reward, self.components, self.failure = total, components, failure

    def set_reference(self, logprobs: Tensor, version: int) -> None:
        """What it has come to under a version of the reference; of (T or more,) log-probs its own are copied."""
        self.reference_logprobs, self.reference_version = logprobs[: len(self.token_ids)].clone(), version


@dataclass
class CompletionBatch:
    """S completions of P prompt columns (padded left) and T completion columns (padded right).

    Attributes:
        prompt_ids, prompt_mask: (S, P) token ids and bool; mask 1 = a real token.
        completion_ids, completion_mask: (S, T) token ids and bool; mask 1 = a token that counts, from the
            first generated one up to and with the first EOS. A row of zeros is a dropped completion.
        rewards: (S,) float32; NaN where the completion was dropped for want of a reward.
        group_ids: (S,) int64; completions of one prompt share an id.
        truncated: (S,) bool; no EOS within the token limit.
        source_ids: (S,) int64, which of the run's sources a completion comes from.
        reference_logprobs: (S, T) float32 log-probs under the reference, 0 where completion_mask is 0.
        sampler_logprobs: the same under the policy that the rollout was sampled from; None where no one needs them.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    rewards: Tensor
    group_ids: Tensor
    truncated: Tensor
    source_ids: Tensor
    reference_logprobs: Tensor
    sampler_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.group_ids)

    @property
    def kept(self) -> Tensor:
        """(S,) bool: the completions that have not been dropped."""
        return self.completion_mask.any(dim=1)

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens that count."""
        return self.completion_mask.sum(dim=1)

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) where each completion's tokens start and end when packed one after another."""
        return torch.nn.functional.pad(self.lengths.cumsum(dim=0), (1, 0))

    def unpack(self, values: Tensor) -> Tensor:
        """(N,) values of the tokens that count, packed -> (S, T), 0 elsewhere."""
        return values.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, values)

    def select(self, rows: Tensor) -> "CompletionBatch":
        """The given rows, without the columns that are padding in all of them."""
        part = CompletionBatch(**{name: tensor[rows] for name, tensor in self.state_dict().items()})
        start = int(part.prompt_mask.any(dim=0).to(torch.int8).argmax()) if len(part) else 0
        stop = int(part.lengths.max()) if len(part) else 0
        part.prompt_ids, part.prompt_mask = part.prompt_ids[:, start:], part.prompt_mask[:, start:]
        for name in ("completion_ids", "completion_mask", "reference_logprobs", "sampler_logprobs"):
            if getattr(part, name) is not None:
                setattr(part, name, getattr(part, name)[:, : max(stop, 1)])
        return part

    def drop(self, rows: Tensor) -> None:
        """Take the completions marked in `rows`, (S,) bool, out of their groups."""
        self.completion_mask = self.completion_mask & ~rows[:, None]

    def add_sampler_logprobs(self) -> Tensor:
        """(S, T) zeros, to be filled in."""
        self.sampler_logprobs = torch.zeros_like(self.reference_logprobs)
        return self.sampler_logprobs

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, those that there are."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "CompletionBatch":
        """The same batch on another device."""
        return CompletionBatch(**{name: tensor.to(device) for name, tensor in self.state_dict().items()})


def collate_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int] | Tensor],
    truncated: Sequence[bool],
    group_ids: Sequence[int],
    pad_token_id: int,
) -> CompletionBatch:
    """Token ids, one pair a completion -> a batch on the CPU; rewards NaN, reference log-probs and source ids 0.

    Dtypes are explicit: Lightning's "true" low precisions change torch's default dtype around this.
    """
    prompt_ids, prompt_mask = _pad(prompts, pad_token_id, left=True)
    completion_ids, completion_mask = _pad(completions, pad_token_id, left=False)
    return CompletionBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        rewards=torch.full((len(prompts),), torch.nan, dtype=torch.float32),
        group_ids=torch.tensor(group_ids, dtype=torch.int64),
        truncated=torch.tensor(truncated, dtype=torch.bool),
        source_ids=torch.zeros(len(prompts), dtype=torch.int64),
        reference_logprobs=torch.zeros(completion_ids.shape, dtype=torch.float32),
    )


def dropped_completion() -> CompletionBatch:
    """One completion that counts for nothing: what a rank runs that must step with the others."""
    batch = collate_completions([[0]], [[0]], [True], [0], pad_token_id=0)
    batch.drop(torch.ones(1, dtype=torch.bool))
    batch.add_sampler_logprobs()  # whoever needs them may take them
    return batch


def _pad(sequences: Sequence[Sequence[int] | Tensor], pad_token_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max((len(s) for s in sequences), default=0) or 1
    ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, columns] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, columns] = True
    return ids, mask
