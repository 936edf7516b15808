"""GRPO on recorded completions, for `benchmarks.sampling`: importance ratios, clipping, a KL penalty.

Per token: min(r A, clip(r, 0.8, 1.2) A) - beta k3, with r = policy / sampler, k3 = reference / policy - 1 -
log(reference / policy), and A = R - mean R of the group, divided by its standard deviation in the variant "GRPO".
The mean over all tokens of an update is maximised. On the policy's own samples and with no clipping, "GRPO without
std" has GVPO's optimum; "GRPO" has it at beta * std of the prompt's rewards.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.sampling_settings import Settings
from gvpo_lightning.callbacks.optimality import answer_probabilities
from gvpo_lightning.data.batch import CompletionBatch, collate_completions
from gvpo_lightning.data.rows import encode_prompt
from gvpo_lightning.objectives import baselines
from gvpo_lightning.policy.head import Scoring, completion_logprobs, score
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer
from gvpo_lightning.seeding import seeded_permutation

VARIANTS = ("GRPO", "GRPO without std")
CLIP = 0.2


def grpo_loss(
    token_logprobs: Tensor, sampler_logprobs: Tensor, batch: CompletionBatch, beta: float, *, divide: bool
) -> Tensor:
    """Scalar; (S, T) log-probs of the policy and of the sampler, and a batch with rewards and reference log-probs."""
    columns = (
        batch.completion_mask,
        baselines.group_advantages(batch.rewards, batch.group_ids, batch.kept, divide_by_std=divide),
    )
    return baselines.grpo_loss(
        token_logprobs,
        sampler_logprobs,
        batch.reference_logprobs,
        *columns,
        beta=beta,
        clip=CLIP,
        denominator=int(batch.lengths.sum()),  # the mean is over tokens, and not within each completion first
        max_completion_tokens=1,
    ).loss


def train_grpo(
    variant: str, model: str, data: tuple[list[dict[str, Any]], list[dict[str, Any]]], settings: Settings, seed: int
) -> list[tuple[int, float]]:
    """[update, accuracy] of a run on the rows of a file, measured on validation rows; settings as for GVPO."""
    policy, tokenizer = load_policy(model), load_tokenizer(model)
    recorded, validation = data
    batch, sampler_logprobs = read_batch(recorded, tokenizer)
    batch.reference_logprobs = score(policy, batch, Scoring(1.0), batch_size=2048)
    optimizer = settings.optimizer(policy.parameters())
    scheduler = settings.scheduler(optimizer)

    def accuracy() -> float:
        prompts, answers = [row["prompt"] for row in validation], [row["answer"] for row in validation]
        return float(answer_probabilities(policy, tokenizer, prompts, answers, batch_size=512).mean())

    trace = [(0, accuracy())]
    policy.train()
    for update in range(settings.updates):
        rows = torch.tensor(draw(len(recorded), update, settings, seed))
        part = batch.select(rows)
        token_logprobs, _ = completion_logprobs(policy, part)
        own = sampler_logprobs[rows, : token_logprobs.shape[1]]
        loss = grpo_loss(token_logprobs, own, part, settings.beta, divide=variant == "GRPO")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.gradient_clip)
        optimizer.step()
        scheduler.step()
        if (update + 1) % settings.trace_every == 0 or update + 1 == settings.updates:
            trace.append((update + 1, accuracy()))
    return trace


def read_batch(recorded: list[dict[str, Any]], tokenizer: Any) -> tuple[CompletionBatch, Tensor]:
    """All completions of a file, those of one prompt adjacent, and their (S, T) log-probs under the sampler."""
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in recorded]
    flat = [(number, i) for number, row in enumerate(recorded) for i in range(len(row["completions"]))]
    batch = collate_completions(
        [prompts[number] for number, _ in flat],
        [recorded[number]["token_ids"][i] for number, i in flat],
        [recorded[number]["truncated"][i] for number, i in flat],
        [number for number, _ in flat],
        pad_token_id=0,
    )
    batch.rewards = torch.tensor([recorded[number]["rewards"][i] for number, i in flat])
    values = torch.tensor([value for number, i in flat for value in recorded[number]["sampler_logprobs"][i]])
    return batch, batch.unpack(values)


def draw(num_prompts: int, update: int, settings: Settings, seed: int) -> list[int]:
    """Rows of an update: prompts in the order of shuffled passes, and for each some of its completions, anew."""
    count, rows = settings.completions_per_prompt, list[int]()
    for position in range(update * settings.prompts_per_update, (update + 1) * settings.prompts_per_update):
        number, place = divmod(position, num_prompts)
        prompt = seeded_permutation(num_prompts, seed, "prompt order", number)[place]
        chosen = seeded_permutation(count, seed, "completions", update, prompt)[: settings.group_size]
        rows += [prompt * count + i for i in chosen]
    return rows
