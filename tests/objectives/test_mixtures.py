"""The optimum does not depend on who sampled: groups with fixed counts from several sources, float64 tables."""

import pytest
import torch

from gvpo_lightning.objectives import gvpo as objectives
from tests.objectives.test_optimum import REFERENCE, REWARDS, kl, optimum

BETA = 0.5
RANDOM = torch.tensor([0.1, 0.15, 0.2, 0.3, 0.25], dtype=torch.float64)
# each source: how many of a group of 8, and from what it draws; "policy" and "history" follow the training
MIXTURES = {
    "fresh": {"policy": 8},
    "fresh and historical": {"policy": 4, "history": 4},
    "historical alone": {"history": 8},
    "fresh and one demonstration": {"policy": 7, "demonstration": 1},
    "offline from the reference": {"reference": 8},
    "offline from another policy": {"random": 8},
    "all of them": {"policy": 3, "history": 2, "demonstration": 1, "random": 2},
}


def train(mixture: dict[str, int], steps: int = 1200, num_prompts: int = 8) -> torch.Tensor:
    """A softmax table trained by GVPO on sampled groups, in rollouts of four updates; its probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=4.0)
    history = [REFERENCE]
    for step in range(steps):
        if step % 4 == 0:
            policy = logits.detach().softmax(-1)
            history = [*history[-20:], policy]
            sources = {
                "policy": policy,
                "history": torch.stack(history).mean(0),
                "demonstration": torch.eye(5, dtype=torch.float64)[1],  # the best response: no support of its own
                "reference": REFERENCE,
                "random": RANDOM,
            }
            drawn = [
                torch.multinomial(sources[name].expand(num_prompts, -1), count, True, generator=generator)
                for name, count in mixture.items()
            ]
            responses = torch.cat(drawn, dim=1).flatten()
            groups = torch.arange(num_prompts).repeat_interleave(8)
        loss = objectives.gvpo_loss(
            logits.log_softmax(-1)[responses][:, None],
            REFERENCE.log()[responses][:, None],
            torch.ones(len(responses), 1),
            REWARDS[responses],
            groups,
            BETA,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_every_mixture_of_sources_ends_at_the_same_optimum(mixture):
    assert sum(mixture.values()) == 8
    expected = optimum(REFERENCE, REWARDS, BETA)
    assert kl(expected, REFERENCE) > 0.1
    assert kl(train(mixture), expected) < 1e-6


def test_demonstrations_alone_do_not():
    """The support is missing: one response compared with itself says nothing."""
    assert kl(train({"demonstration": 8}, steps=200), optimum(REFERENCE, REWARDS, BETA)) > 0.1
