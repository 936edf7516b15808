"""The same log-probs and gradients from a model's own logits and torch's autograd, a row at a time."""

import torch

from tests.update_budget import gradient_size


def eager(model, batch, temperature=1.0):
    """The same from the model's own logits, one completion at a time, without any padding; and the entropies."""
    logprobs = torch.zeros(batch.completion_mask.shape, dtype=model.dtype)
    entropies = torch.zeros_like(logprobs)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        completion = batch.completion_ids[row][batch.completion_mask[row]]
        if not len(completion):
            continue
        logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        distribution = torch.distributions.Categorical(logits=logits / temperature)
        logprobs[row, : len(completion)] = distribution.log_prob(completion)
        entropies[row, : len(completion)] = distribution.entropy()
    return logprobs, entropies


def uneven(logprobs):
    return torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype).view(logprobs.shape)


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * uneven(logprobs)).sum().backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def uneven_size(model, logprobs, batch):
    """The size of what these gradients are sums of."""
    coefficients = (uneven(logprobs).abs() * batch.completion_mask).amax(dim=1)
    return gradient_size(logprobs, coefficients, [p for p in model.parameters() if p.requires_grad])
