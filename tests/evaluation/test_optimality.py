import itertools
import math

import pytest
import torch

from gvpo_lightning.callbacks.optimality import answer_probabilities, optimal_accuracy
from gvpo_lightning.policy.prepare import prepare_policy
from gvpo_lightning.rollout.generate import generate_completions
from gvpo_lightning.rollout.settings import GenerationSettings


@pytest.fixture
def policy(tiny_policy):
    model = tiny_policy(initializer_range=0.3)
    prepare_policy(model)
    return model


def naive_probability(model, tokenizer, prompt, answer, stops, temperature=1.0):
    """Token by token, no batch, no padding, no cache."""
    ids, total = tokenizer(prompt)["input_ids"], 0.0
    answer_ids = tokenizer(answer)["input_ids"] if answer else []
    for stop in stops:
        probability = 1.0
        for position, token in enumerate([*answer_ids, stop]):
            context = torch.tensor([[*ids, *answer_ids[:position]]])
            with torch.no_grad():
                logits = model(context).logits[0, -1].double() / temperature
            probability *= float(torch.softmax(logits, dim=-1)[token])
        total += probability
    return total


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 7.0])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.37, 0.999, 1.0])
def test_optimal_accuracy_is_the_closed_form(p, beta):
    weight = p * math.exp(1 / beta)
    expected = weight / (weight + 1 - p)
    found = optimal_accuracy(torch.tensor([p], dtype=torch.float64), beta)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_optimal_accuracy_by_maximising_the_objective():
    """E[reward] - beta KL over two outcomes, maximised on a grid: the closed form's definition."""
    p, beta = 0.3, 0.7
    q = torch.linspace(1e-6, 1 - 1e-6, 1_000_001, dtype=torch.float64)
    objective = q - beta * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())
    assert float(optimal_accuracy(torch.tensor(p), beta)) == pytest.approx(float(q[objective.argmax()]), abs=2e-6)


def test_optimal_accuracy_is_taken_per_prompt_before_the_mean():
    p = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert float(optimal_accuracy(p, 1.0).mean()) < float(optimal_accuracy(p.mean(), 1.0)) - 0.1


@pytest.mark.parametrize("stops", [[1], [7, 9]])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_answer_probabilities_are_those_of_a_naive_computation(policy, tokenizer, stops, temperature, batch_size):
    policy.double().generation_config.eos_token_id = stops
    prompts, answers = ["3+4=", "12+7=", "5", "9+9="], ["7", "19", "", "8888"]
    found = answer_probabilities(policy, tokenizer, prompts, answers, temperature=temperature, batch_size=batch_size)
    every_stop = sorted({*stops, 1})  # the tokenizer's own is 1
    expected = [
        naive_probability(policy, tokenizer, prompt, answer, every_stop, temperature)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6)  # log-probs come as float32


def test_probabilities_of_all_answers_and_of_going_on_add_up_to_one(policy, tokenizer):
    symbols = [token for token in tokenizer.get_vocab() if len(token) == 1]
    answers = ["", *("".join(pair) for length in (1, 2) for pair in itertools.product(symbols, repeat=length))]
    finished = float(answer_probabilities(policy, tokenizer, ["3+4="] * len(answers), answers, batch_size=256).sum())
    settings = GenerationSettings(max_new_tokens=3)
    batch = generate_completions(policy, tokenizer, [tokenizer("3+4=")["input_ids"]], 4000, settings, seed=0)
    special = (batch.completion_ids == 0).logical_and(batch.completion_mask).any(dim=1)  # <pad> is in no answer
    sampled = float((~batch.truncated & ~special).double().mean())
    assert 0.02 < finished < 1
    assert abs(finished - sampled) < 4 * math.sqrt(finished * (1 - finished) / 4000)


def test_conversations_have_probabilities_too(policy, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}=")
    talk = [{"role": "user", "content": "3+4"}]
    found = answer_probabilities(policy, tokenizer, [talk, "3+4="], ["7", "7"])
    assert found[0] == found[1] > 0


def test_the_policys_training_mode_is_kept(policy, tokenizer):
    answer_probabilities(policy, tokenizer, ["3+4="], ["7"])
    assert policy.training
