"""Exact probabilities of right answers, and those that the theory predicts."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.data.rows import encode_prompt
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.prepare import stop_token_ids


def optimal_accuracy(p: Tensor, beta: float) -> Tensor:
    """Accuracy of the optimal policy where the reference is right with probability p; any shape."""
    p = p.double()
    return torch.sigmoid(torch.logit(p) + 1.0 / beta)


@torch.no_grad()
def answer_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    answers: list[str],
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Tensor:
    """(num_prompts,) exact probabilities, float64, of completing each prompt with its answer and an end token."""
    stops = stop_token_ids(model, tokenizer)
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    answer_ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for stop in stops:
        completions = [[*ids, stop] for ids in answer_ids]
        batch = collate_completions(prompt_ids, completions, [False] * len(prompts), [0] * len(prompts), stop)
        token_logprobs = score(model, batch.to(model.device), Scoring(temperature), batch_size=batch_size)
        total += token_logprobs.double().sum(dim=1).exp().cpu()
    assert not math.isnan(float(total.sum()))
    return total


@dataclass(frozen=True)
class RightAnswers:
    """Prompts of this rank with the one right answer of each.

    Attributes:
        prompts, answers: texts or messages, and texts.
        tokenizer, temperature, batch_size: how their probabilities are taken.
        placement: where the models are.
    """

    prompts: list[Any]
    answers: list[str]
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    batch_size: int
    placement: Placement

    def accuracy_of(self, model: PreTrainedModel) -> Tensor:
        """(num_prompts,) of the prompts of all ranks: the exact probability of the right answer; all must call this."""
        options: dict[str, Any] = {"temperature": self.temperature, "batch_size": self.batch_size}
        with self.placement.forward_context(), self.placement.callable():
            own = answer_probabilities(model, self.tokenizer, self.prompts, self.answers, **options)
        return torch.cat(self.placement.ranks.gather(own))
