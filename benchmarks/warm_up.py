"""Supervised warm-up, which makes the small policies that the shipped configs start from."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its completion, end token included


def warm_up(
    model: PreTrainedModel, next_batch: Callable[[], list[Pair]], *, steps: int, lr: float, pad_token_id: int
) -> None:
    """Train on the completions of `next_batch()`, which is called once a step; one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    for step in range(steps):
        pairs = next_batch()
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = torch.full((len(pairs), width), pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, completion) in enumerate(pairs):
            stop = len(prompt) + len(completion)
            ids[row, :stop] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : stop] = torch.tensor(completion)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
