"""Architectures of transformers: each trains with the log-probs and gradients of its own logits, or is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gvpo_lightning import GenerationSettings, RolloutSettings
from gvpo_lightning.policy.head import completion_logprobs
from tests.error_budget import assert_within, logprob_budget, sum_budget
from tests.policy.architectures import OFTEN, REFUSED, SETTINGS, config_of
from tests.policy.conftest import ARCHITECTURES
from tests.policy.eager_scores import eager, gradients, uneven_size
from tests.update_budget import own_logits, scores_budget


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def test_it_trains_right_or_is_refused(name, make_module, fit, tokenizer, ragged):
    torch.manual_seed(0)
    ragged.prompt_ids, ragged.completion_ids = (
        ids % len(tokenizer) for ids in (ragged.prompt_ids, ragged.completion_ids)
    )
    policy = AutoModelForCausalLM.from_config(config_of(name, len(tokenizer)))
    module = make_module(
        policy=policy,
        rollout=RolloutSettings(group_size=3, prompts_per_rollout=4, prompts_per_update=4),
        generation=GenerationSettings(max_new_tokens=6),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"(?s){REFUSED[name]}"):
            fit(module, max_steps=1)
        return
    rows = [{"prompt": "1" * length} for length in (1, 3, 5, 9)]
    metrics = fit(module, rows=rows, max_steps=1).callback_metrics
    budget = 2 * 6 * logprob_budget(own_logits(policy, module.rollout.batch))  # of six tokens under two models
    assert float(metrics["log_ratio/policy/max"]) <= budget

    logprobs, _ = completion_logprobs(policy, ragged)
    expected, _ = eager(policy, ragged)
    assert_within(logprobs, expected, scores_budget(policy, ragged))
    ours, theirs = gradients(policy, logprobs), gradients(policy, expected)
    budget = sum_budget(uneven_size(policy, expected, ragged))
    for parameter, gradient in theirs.items():
        assert_within(ours[parameter], gradient, budget, parameter)


def test_the_docs_list_what_trains_and_what_is_refused(root):
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    listed: dict[str, set[str]] = {"train": set(), "refused": set()}
    for line in text[text.index("## Architectures") : text.index("## LoRA")].splitlines():
        cells = line.split("|")
        if len(cells) == 4 and cells[1].startswith((" train", " refused")):
            names = {name.split()[0] for name in cells[2].split(",")}
            listed["refused" if "refused" in cells[1] else "train"] |= names
    others = {settings["model_type"] for settings in ARCHITECTURES.values()}
    assert listed["train"] == (set(SETTINGS) - set(REFUSED)) | others
    assert listed["refused"] == set(REFUSED) | {"gemma3n_text"}
